"""What a model family is: all in which one diffusers pipeline class differs from the others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.flows import FlowTimes
from mi_ray.diffusion.sizes import Sizes

Config = Mapping[str, Any]
# (pipeline, prompts, (height, width) in pixels) -> tensors with one row per prompt, padded to one length
Encode = Callable[[DiffusionPipeline, list[str], tuple[int, int]], dict[str, Tensor]]
# (network, x_t (n, *latent_shape), timesteps (n,), conditioning of n rows) -> prediction (n, *latent_shape)
Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
# (guided prediction, conditional prediction), each (n, *latent_shape) -> the prediction that the solver follows
Rescale = Callable[[Tensor, Tensor], Tensor]


def decode_scaled(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents (n, C, h, w) fp32 -> images (n, 3, H, W) in [-1, 1], with the scale, shift, mean and deviation of the
    autoencoder's config; a missing one has no effect."""
    config = vae.config
    scaled = latents / config.scaling_factor
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and deviation is not None:
        scaled = scaled * _by_channel(deviation, scaled) + _by_channel(mean, scaled)
    if shift := getattr(config, "shift_factor", None):
        scaled = scaled + shift
    return vae.decode(scaled.to(vae.dtype)).sample


def encode_scaled(vae: nn.Module, images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] -> latents (n, C, h, w) fp32: the mode of the posterior; inverse of
    `decode_scaled`."""
    config = vae.config
    encoded = vae.encode(images.to(vae.dtype))
    latents = (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent).float()
    if shift := getattr(config, "shift_factor", None):
        latents = latents - shift
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and deviation is not None:
        latents = (latents - _by_channel(mean, latents)) / _by_channel(deviation, latents)
    return latents * config.scaling_factor


def _by_channel(values: list[float], latents: Tensor) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1).to(latents.device, latents.dtype)


def own_size(sample: int | None, scale: int, multiple: int, default: int = 128) -> Sizes:
    """Sizes of a transformer that was trained on latents of `sample` by `sample`; None: of `default`."""
    side = (sample or default) * scale
    return Sizes((side, side), scale, multiple)


def vae_scale(vae: Config) -> int:
    """Image pixels per latent pixel of an AutoencoderKL."""
    return 2 ** (len(vae.get("block_out_channels", (64,))) - 1)


def pack(latents: Tensor) -> Tensor:
    """(n, C, h, w) -> (n, h w / 4, 4 C): squares of 2 by 2 latent pixels become tokens."""
    count, channels, height, width = latents.shape
    squares = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(count, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, latent_shape: torch.Size) -> Tensor:
    """Inverse of `pack`, for latents of shape (n, C, h, w)."""
    count, channels, height, width = latent_shape
    squares = tokens.reshape(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(latent_shape)


@dataclass(frozen=True)
class Family:
    """One family. `families.FAMILIES` names it by the pipeline class in a folder's model_index.json.

    title: as people call it.
    network: name of the part that is the denoiser, "unet" or "transformer".
    parts: every part that a folder must have, with the classes that are supported; no class: any of transformers.
    sizes: (config of the network, config of the autoencoder) -> the image sizes.
    channels: config of the network -> channels of the latents.
    encode: encodes prompts as the stock pipeline does.
    encode_null: likewise the empty prompt, alone, if the stock pipeline treats it in another way.
    conditioning: (config of the network with its defaults, tokens of a prompt) -> shape of one row of every tensor that
        `encode` gives. None: the network reads the values of its input, so it cannot be called on the meta device.
    predict: calls the network as the stock pipeline does, and brings its output to the sign of u = epsilon - x0.
    latent_channels: config of the autoencoder -> channels of the latents that it makes, which must be as many.
    text_limit: tokens of a prompt that the pipeline takes; None: as many as the text encoder does.
    tokenizer: name of the tokenizer that counts them.
    flow: how a flow model takes its noise levels; None: a variance-preserving model.
    decode, encode_image: the autoencoder, as `decode_scaled` and `encode_scaled`.
    rescale: what the stock pipeline does to a guided prediction before the solver; never part of a score.
    comfyui: name of a transformer's layer in diffusers -> its name in an adapter for ComfyUI (comfy/lora.py); None:
        ComfyUI has no such model, or other layers. A UNet has the names of the kohya scripts.
    distilled: (config of the network, model_index.json) -> why there is no trained unconditional prediction; None:
        there is one.
    half: dtype on a GPU if none is asked for. T5, Gemma and Qwen overflow in float16.
    optional: parts that a folder may leave out.
    unused: parts of the pipeline that are not loaded, and settings that go with that.
    """

    title: str
    network: str
    parts: Mapping[str, tuple[str, ...]]
    sizes: Callable[[Config, Config], Sizes]
    channels: Callable[[Config], int]
    encode: Encode
    predict: Predict
    conditioning: Callable[[Config, int], dict[str, tuple[int, ...]]] | None = None
    encode_null: Encode | None = None
    latent_channels: Callable[[Config], int] = lambda vae: vae.get("latent_channels", 4)
    text_limit: int | None = None
    tokenizer: str = "tokenizer"
    flow: FlowTimes | None = None
    decode: Callable[[nn.Module, Tensor], Tensor] = decode_scaled
    encode_image: Callable[[nn.Module, Tensor], Tensor] = encode_scaled
    rescale: Rescale | None = None
    comfyui: Callable[[str], str] | None = "transformer.{}".format
    distilled: Callable[[Config, Config], str | None] = lambda network, index: None
    half: str = "bfloat16"
    optional: tuple[str, ...] = ()
    unused: Mapping[str, Any] = field(default_factory=dict)

    def max_tokens(self, pipeline: DiffusionPipeline) -> int:
        """Tokens of a prompt that the text encoder reads, with those of start and end."""
        if self.text_limit is not None:
            return self.text_limit
        limit = getattr(pipeline, self.tokenizer).model_max_length
        return min(limit, getattr(pipeline.text_encoder.config, "max_position_embeddings", limit))
