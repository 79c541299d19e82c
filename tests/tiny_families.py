"""A tiny random pipeline of each family: the real classes, a few thousand weights, latents of 8 by 8."""

import string
from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import tokenizers
import torch
import transformers

from mi_ray.diffusion.families.family import pack
from mi_ray.shapes.model import MAX_TOKENS, build_tokenizer

WIDTH = 16


@dataclass(frozen=True)
class Case:
    """How the stock pipeline of a family is called.

    call: what the stock call is given at the guidance scale w; 1: no guidance.
    packed: our latents -> those that the stock scheduler steps.
    given: our latents -> those of the stock call; None: `packed`.
    prompts: that are compared.
    """

    build: Callable[[], diffusers.DiffusionPipeline]
    call: Callable[[float], dict] = lambda w: {"guidance_scale": w}
    packed: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents
    given: Callable[[torch.Tensor], torch.Tensor] | None = None
    prompts: tuple[str, str] = ("a red circle", "a blue star above a green square")
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
def unet(width: int, **settings) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
        **settings,
    ).eval()


def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=vae(scaling_factor=0.5),
        text_encoder=clip(transformers.CLIPTextModel),
        tokenizer=build_tokenizer(),
        unet=unet(WIDTH),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(**settings) -> diffusers.StableDiffusionXLPipeline:
    network = unet(
        2 * WIDTH,
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
        unet=network,
        scheduler=ddim(),
        add_watermarker=False,
        **settings,
    )


def stable_diffusion_3(**parts) -> diffusers.StableDiffusion3Pipeline:
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
    parts = {"text_encoder_3": text_encoder_3, "tokenizer_3": tokenizer_3} | parts
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=build_tokenizer(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=build_tokenizer(),
        **parts,
    )


def flow(**settings) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def flux(guidance_embeds: bool = True) -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 2, 2),
    )
    tokenizer_2, text_encoder_2 = t5(WIDTH)
    return diffusers.FluxPipeline(
        transformer=transformer.eval(),
        scheduler=flow(use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=24),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(transformers.CLIPTextModel),
        tokenizer=build_tokenizer(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def chroma() -> diffusers.ChromaPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    tokenizer, text_encoder = t5(WIDTH)
    return diffusers.ChromaPipeline(
        transformer=transformer.eval(),
        scheduler=flow(use_beta_sigmas=False),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """A token for each byte."""
    letters = sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: number for number, token in enumerate([*letters, *special])}
    return transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], additional_special_tokens=special[1:], chat_template=CHAT, model_max_length=2048
    )


def qwen3(layers: int) -> dict:
    """Settings of a tiny language model."""
    return {
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
    }


def flux2_klein() -> diffusers.Flux2KleinPipeline:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=64
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return diffusers.Flux2KleinPipeline(
        transformer=transformer.eval(),
        scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder.eval(),
        text_encoder=transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**qwen3(28))).eval(),
        tokenizer=qwen_tokenizer(),
    )


def qwen_image_vae() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 1.0, 2.0],
    ).eval()


def qwen_image() -> diffusers.QwenImagePipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    text = {**qwen3(2), "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=300)
    return diffusers.QwenImagePipeline(
        transformer=transformer.eval(),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02),
        vae=qwen_image_vae(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=qwen_tokenizer(),
    )


def z_image() -> diffusers.ZImagePipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer.eval(),
        scheduler=flow(shift=6.0),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**qwen3(2))).eval(),
        tokenizer=qwen_tokenizer(),
    )


def gemma():
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable[:95]]
    tokenizer = transformers.GemmaTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(letters))}, merges=[]
    )
    config = transformers.Gemma2Config(
        **(qwen3(2) | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}), pad_token_id=0
    )
    return tokenizer, transformers.Gemma2Model(config).eval()


def sana() -> diffusers.SanaPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=2,
        timestep_scale=0.7,
    )
    channels, ones = (4, 4, 4, 4, 4, 4), (1, 1, 1, 1, 1, 1)
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=ones,
        decoder_layers_per_block=ones,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )
    tokenizer, text_encoder = gemma()
    return diffusers.SanaPipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
        vae=autoencoder.eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def lumina2() -> diffusers.Lumina2Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH,
    )
    tokenizer, text_encoder = gemma()
    return diffusers.Lumina2Pipeline(
        transformer=transformer.eval(),
        scheduler=flow(shift=6.0),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        norm_num_groups=2,
    )
    tokenizer, text_encoder = t5(WIDTH)
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer.eval(),
        scheduler=ddim(),
        vae=vae(scaling_factor=0.13025),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def krea2(is_distilled: bool = False) -> diffusers.Krea2Pipeline:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    text = {**qwen3(3), "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "mrope_interleaved": True}}
    vision = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return diffusers.Krea2Pipeline(
        transformer=transformer.eval(),
        scheduler=flow(use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=24),
        vae=qwen_image_vae(),
        text_encoder=transformers.Qwen3VLModel(config).eval(),
        tokenizer=qwen_tokenizer(),
        text_encoder_select_layers=(1, 2),
        is_distilled=is_distilled,
    )


def cogview4() -> diffusers.CogView4Pipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    tokenizer, _ = t5(WIDTH)
    config = transformers.GlmConfig(**qwen3(2), pad_token_id=0)
    return diffusers.CogView4Pipeline(
        transformer=transformer.eval(),
        scheduler=flow(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear", base_image_seq_len=256
        ),
        vae=vae(scaling_factor=0.7),
        text_encoder=transformers.GlmModel(config).eval(),
        tokenizer=tokenizer,
    )


def packed_by_row(latents: torch.Tensor) -> torch.Tensor:
    """FLUX.2's tokens: (n, C, h, w) -> (n, h w, C)."""
    return latents.flatten(2).transpose(1, 2)


CASES = {
    "StableDiffusionPipeline": Case(stable_diffusion),
    "StableDiffusionXLPipeline": Case(stable_diffusion_xl),
    "StableDiffusion3Pipeline": Case(stable_diffusion_3),
    "FluxPipeline": Case(flux, lambda w: {"true_cfg_scale": w, "negative_prompt": [""] * 2}, packed=pack),
    "ChromaPipeline": Case(chroma, packed=pack),
    "Flux2KleinPipeline": Case(flux2_klein, packed=packed_by_row, given=lambda latents: latents),
    "QwenImagePipeline": Case(qwen_image, lambda w: {"true_cfg_scale": w, "negative_prompt": [" "] * 2}, packed=pack),
    "Krea2Pipeline": Case(krea2, lambda w: {"guidance_scale": w - 1}, packed=pack),
    "ZImagePipeline": Case(z_image, lambda w: {"guidance_scale": w - 1}),
    "SanaPipeline": Case(sana, solver="dpm++2m", settings={"use_resolution_binning": False}),
    "Lumina2Pipeline": Case(lumina2),
    # The stock pipeline attends the padding to the longest prompt of a batch: only prompts of one length agree.
    "CogView4Pipeline": Case(cogview4, prompts=("a red circle", "a big hearts")),
    "PixArtSigmaPipeline": Case(pixart_sigma, settings={"use_resolution_binning": False, "clean_caption": False}),
}

VARIANTS = {
    "SDXL that encodes the empty prompt": Case(lambda: stable_diffusion_xl(force_zeros_for_empty_prompt=False)),
    "Stable Diffusion 3 without T5": Case(lambda: stable_diffusion_3(text_encoder_3=None, tokenizer_3=None)),
    "FLUX.1-schnell": Case(lambda: flux(guidance_embeds=False), CASES["FluxPipeline"].call, packed=pack),
    "distilled Krea 2": Case(lambda: krea2(is_distilled=True), CASES["Krea2Pipeline"].call, packed=pack),
}
