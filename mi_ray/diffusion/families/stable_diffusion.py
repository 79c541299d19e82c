"""Stable Diffusion 1 and 2, and SDXL: a UNet on a variance-preserving schedule."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Config, Family
from mi_ray.diffusion.sizes import Sizes

_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_NOT_LOADED = {"image_encoder": None, "feature_extractor": None}


def _channels(unet) -> int:
    return unet.get("in_channels", 4)


# ---------------------------------------------------------------------------------------------- 1 and 2
def unet_prediction(unet: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The UNet of Stable Diffusion 1 and 2."""
    return unet(x_t, timesteps, encoder_hidden_states=conditioning["embeds"]).sample


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    encoder, limit = pipeline.text_encoder, STABLE_DIFFUSION.max_tokens(pipeline)
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    return {"embeds": encoder(ids.input_ids.to(encoder.device)).last_hidden_state}


STABLE_DIFFUSION = Family(
    title="Stable Diffusion 1 and 2",
    network="unet",
    parts={
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": _TOKENIZERS,
    },
    sizes=Sizes.of_unet,
    channels=_channels,
    encode=_encode,
    conditioning=lambda unet, length: {"embeds": (length, unet["cross_attention_dim"])},
    predict=unet_prediction,
    half="float16",
    unused={**_NOT_LOADED, "safety_checker": None, "requires_safety_checker": False},
)


# ---------------------------------------------------------------------------------------------- XL
def _xl_prediction(unet: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["size"]}
    return unet(x_t, timesteps, encoder_hidden_states=conditioning["embeds"], added_cond_kwargs=added).sample


def _encode_xl(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """The size of the image before and after a crop that cut nothing, as the pipeline's default."""
    device = pipeline.text_encoder_2.device
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    size = torch.tensor([[*image_size, 0, 0, *image_size]], dtype=embeds.dtype, device=device)
    return {"embeds": embeds, "pooled": pooled, "size": size.repeat(len(prompts), 1)}


def _encode_xl_null(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    rows = _encode_xl(pipeline, prompts, image_size)
    if pipeline.config.force_zeros_for_empty_prompt:
        rows |= {name: torch.zeros_like(rows[name]) for name in ("embeds", "pooled")}
    return rows


def _xl_shapes(unet: Config, length: int) -> dict[str, tuple[int, ...]]:
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    return {"embeds": (length, unet["cross_attention_dim"]), "pooled": (pooled,), "size": (6,)}


STABLE_DIFFUSION_XL = Family(
    title="Stable Diffusion XL",
    network="unet",
    parts=STABLE_DIFFUSION.parts | {"text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer_2": _TOKENIZERS},
    sizes=Sizes.of_unet,
    channels=_channels,
    encode=_encode_xl,
    conditioning=_xl_shapes,
    encode_null=_encode_xl_null,
    predict=_xl_prediction,
    half="float16",
    unused={**_NOT_LOADED, "add_watermarker": False},
)
