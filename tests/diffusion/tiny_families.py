"""A tiny random pipeline of each family: the real classes, a few thousand weights, latents of 8 by 8."""

import string
from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch
import transformers

from mi_ray.shapes.model import MAX_TOKENS, build_tokenizer

WIDTH = 16


@dataclass(frozen=True)
class Case:
    """How the stock pipeline of a family is called.

    call: what the stock call is given at the guidance scale w; 1: no guidance.
    packed: our latents -> those of the stock call, and what its scheduler steps; None: the same.
    """

    build: Callable[[], diffusers.DiffusionPipeline]
    call: Callable[[float], dict] = lambda w: {"guidance_scale": w}
    packed: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents
    size: int = 64
    solver: str = "ddim"
    settings: dict = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- parts
def clip(kind: type, projection: int = WIDTH, layers: int = 2):
    tokenizer = build_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        **special,
    )
    return kind(config).eval()


def t5(width: int):
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(letter, -3.0) for letter in string.ascii_lowercase]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    return tokenizer, transformers.T5EncoderModel(config).eval()


def vae(channels: int = 4, **settings) -> diffusers.AutoencoderKL:
    """Images of 64 by 64 have latents of 8 by 8."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        sample_size=64,
        **settings,
    ).eval()


VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(**settings) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**VP, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **settings)


# ---------------------------------------------------------------------------------------------- families
def stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.5, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0]),
        text_encoder=clip(transformers.CLIPTextModel),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(),
        unet=unet.eval(),
        scheduler=ddim(),
        add_watermarker=False,
    )


def stable_diffusion_3() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    tokenizer_3, text_encoder_3 = t5(2 * WIDTH)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=build_tokenizer(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


CASES = {
    "StableDiffusionXLPipeline": Case(stable_diffusion_xl),
    "StableDiffusion3Pipeline": Case(stable_diffusion_3),
}
