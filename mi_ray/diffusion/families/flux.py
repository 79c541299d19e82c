"""FLUX.1, and Chroma1, which has its architecture without the distillation: 2 by 2 packed latents."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Config, Family, own_size, pack, unpack, vae_scale
from mi_ray.diffusion.flows import FlowTimes, evenly, linear_mu
from mi_ray.diffusion.sizes import Sizes

EMBEDDED_GUIDANCE = 3.5  # FluxPipeline's default: the guidance scale that FLUX.1-dev is told, which replaces guidance
_TEXT_LENGTH = 512  # padding is attended, so the length is a part of the model


def _positions(x_t: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Row and column of each image token, and zeros for each text token: (tokens, 3) each."""
    height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    return {"img_ids": image.to(texts), "txt_ids": texts.new_zeros(texts.shape[1], 3)}


def _sizes(transformer: Config, vae: Config) -> Sizes:
    return own_size(None, vae_scale(vae), 2 * vae_scale(vae))


def _channels(transformer: Config) -> int:
    return transformer.get("in_channels", 64) // 4


# ---------------------------------------------------------------------------------------------- FLUX.1
def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    device = pipeline.text_encoder.device
    embeds, pooled, _ = pipeline.encode_prompt(prompts, device=device, max_sequence_length=_TEXT_LENGTH)
    rows = {"embeds": embeds, "pooled": pooled}
    if pipeline.transformer.config.guidance_embeds:
        rows["guidance"] = torch.full((len(prompts),), EMBEDDED_GUIDANCE, device=device)
    return rows


def _shapes(transformer: Config, length: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "embeds": (length, transformer["joint_attention_dim"]),
        "pooled": (transformer["pooled_projection_dim"],),
    }
    return shapes | ({"guidance": ()} if transformer["guidance_embeds"] else {})


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    velocity = transformer(
        hidden_states=pack(x_t),
        timestep=timesteps / 1000,
        guidance=conditioning["guidance"] if "guidance" in conditioning.tensors else None,
        pooled_projections=conditioning["pooled"],
        encoder_hidden_states=conditioning["embeds"],
        **_positions(x_t, conditioning["embeds"]),
        return_dict=False,
    )[0]
    return unpack(velocity, x_t.shape)


def _distilled(transformer: Config, index: Config) -> str:
    kind = "its guidance (dev)" if transformer.get("guidance_embeds", False) else "its steps (schnell)"
    return f"FLUX.1 is distilled for {kind}, and has no trained unconditional prediction"


FLUX_1 = Family(
    title="FLUX.1",
    network="transformer",
    parts={
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": (),
    },
    sizes=_sizes,
    channels=_channels,
    encode=_encode,
    conditioning=_shapes,
    predict=_prediction,
    tokenizer="tokenizer_2",
    text_limit=_TEXT_LENGTH,
    flow=FlowTimes(sigmas=evenly, mu=linear_mu, rounds=True),
    distilled=_distilled,
    unused={"image_encoder": None, "feature_extractor": None},
)


# ---------------------------------------------------------------------------------------------- Chroma1
def _encode_chroma(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    device = pipeline.text_encoder.device
    encoded = pipeline.encode_prompt(
        prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=_TEXT_LENGTH
    )
    return {"embeds": encoded[0], "mask": encoded[2]}


def _chroma_prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    tokens, mask = pack(x_t), conditioning["mask"]
    velocity = transformer(
        hidden_states=tokens,
        timestep=timesteps / 1000,
        encoder_hidden_states=conditioning["embeds"],
        attention_mask=torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1),
        **_positions(x_t, conditioning["embeds"]),
        return_dict=False,
    )[0]
    return unpack(velocity, x_t.shape)


CHROMA_1 = Family(
    title="Chroma1",
    network="transformer",
    parts={
        "transformer": ("ChromaTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": (),
    },
    sizes=_sizes,
    channels=_channels,
    encode=_encode_chroma,
    conditioning=lambda transformer, length: {
        "embeds": (length, transformer["joint_attention_dim"]),
        "mask": (length,),
    },
    predict=_chroma_prediction,
    text_limit=_TEXT_LENGTH,
    flow=FlowTimes(sigmas=evenly, mu=linear_mu, rounds=True),
    unused={"image_encoder": None, "feature_extractor": None},
)
