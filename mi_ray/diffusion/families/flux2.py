"""FLUX.2 klein: latents of 128 channels, normalised by running statistics, at a sixteenth of the image's sides."""

import math

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Config, Family, own_size, vae_scale
from mi_ray.diffusion.flows import FlowTimes, evenly
from mi_ray.diffusion.sizes import Sizes

_TEXT_LENGTH = 512  # padding is attended, so the length is a part of the model


def _sizes(transformer: Config, vae: Config) -> Sizes:
    scale = 2 * vae_scale(vae)
    return own_size(64, scale, scale)


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    device = pipeline.text_encoder.device
    embeds, _ = pipeline.encode_prompt(prompts, device=device, max_sequence_length=_TEXT_LENGTH)
    return {"embeds": embeds}


def _ids(count: int, height: int, width: int, length: int, device: torch.device) -> Tensor:
    """Image index, row, column and place in the text of each token: (count, tokens, 4)."""
    ids = torch.cartesian_prod(*map(torch.arange, (1, height, width, length)))
    return ids.to(device).expand(count, -1, -1)


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    count, _, height, width = x_t.shape
    embeds = conditioning["embeds"]
    velocity = transformer(
        hidden_states=x_t.flatten(2).transpose(1, 2),
        timestep=timesteps / 1000,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=_ids(count, 1, 1, embeds.shape[1], x_t.device),
        img_ids=_ids(count, height, width, 1, x_t.device),
        return_dict=False,
    )[0]
    return velocity.transpose(1, 2).reshape(x_t.shape)


def _statistics(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each of the 128 channels, (128, 1, 1)."""
    norm = vae.bn
    deviation = (norm.running_var + vae.config.batch_norm_eps).sqrt()
    return norm.running_mean.view(-1, 1, 1).to(like), deviation.view(-1, 1, 1).to(like)


def _decode(vae: nn.Module, latents: Tensor) -> Tensor:
    mean, deviation = _statistics(vae, latents)
    count, channels, height, width = latents.shape
    squares = (latents * deviation + mean).reshape(count, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return vae.decode(squares.reshape(count, channels // 4, 2 * height, 2 * width).to(vae.dtype)).sample


def _encode_image(vae: nn.Module, images: Tensor) -> Tensor:
    latents = vae.encode(images.to(vae.dtype)).latent_dist.mode().float()
    count, channels, height, width = latents.shape
    squares = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    latents = squares.reshape(count, 4 * channels, height // 2, width // 2)
    mean, deviation = _statistics(vae, latents)
    return (latents - mean) / deviation


def _distilled(transformer: Config, index: Config) -> str | None:
    return "this FLUX.2 klein is distilled for its steps and its guidance" if index.get("is_distilled") else None


FLUX_2_KLEIN = Family(
    title="FLUX.2 klein",
    network="transformer",
    parts={
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
        "text_encoder": ("Qwen3ForCausalLM",),
        "tokenizer": (),
    },
    sizes=_sizes,
    channels=lambda transformer: transformer.get("in_channels", 128),
    latent_channels=lambda vae: 4 * vae.get("latent_channels", 32),
    encode=_encode,
    conditioning=lambda transformer, length: {"embeds": (length, transformer["joint_attention_dim"])},
    predict=_prediction,
    text_limit=_TEXT_LENGTH,
    flow=FlowTimes(
        sigmas=evenly,
        mu=lambda config, tokens, steps: compute_empirical_mu(tokens, steps),
        tokens=lambda shape: math.prod(shape[1:]),
        rounds=True,
    ),
    decode=_decode,
    encode_image=_encode_image,
    distilled=_distilled,
)
