"""Qwen-Image: 2 by 2 packed latents of a video autoencoder, and masked text of any length."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pad

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Config, Family, own_size, pack, unpack
from mi_ray.diffusion.flows import FlowTimes, evenly, linear_mu
from mi_ray.diffusion.sizes import Sizes

_TEXT_LENGTH = 512  # the pipeline's default


def _sizes(transformer: Config, vae: Config) -> Sizes:
    scale = 2 ** len(vae.get("temperal_downsample", (False, True, True)))
    return own_size(None, scale, 2 * scale)


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Zeros follow the prompt, and the mask (n, 512) hides them."""
    embeds, mask = pipeline.encode_prompt(
        prompts, device=pipeline.text_encoder.device, max_sequence_length=_TEXT_LENGTH
    )
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
    missing = _TEXT_LENGTH - embeds.shape[1]
    return {"embeds": pad(embeds, (0, 0, 0, missing)), "mask": pad(mask, (0, missing))}


def _encode_null(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """The pipeline guides only if it is given a negative prompt; the model's authors give a space."""
    return _encode(pipeline, [" "], image_size)


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    height, width = x_t.shape[2:]
    velocity = transformer(
        hidden_states=pack(x_t),
        timestep=timesteps / 1000,
        encoder_hidden_states=conditioning["embeds"],
        encoder_hidden_states_mask=conditioning["mask"],
        img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
        return_dict=False,
    )[0]
    return unpack(velocity, x_t.shape)


def _to_conditional_norm(guided: Tensor, conditional: Tensor) -> Tensor:
    """Every token of the guided prediction gets the norm of the conditional one."""
    tokens = pack(guided)
    wanted = pack(conditional.float()).norm(dim=-1, keepdim=True)
    return unpack(tokens * (wanted / tokens.norm(dim=-1, keepdim=True)), guided.shape)


def _statistics(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C, 1, 1)."""
    values = (torch.tensor(v).view(-1, 1, 1).to(like) for v in (vae.config.latents_mean, vae.config.latents_std))
    mean, deviation = values
    return mean, deviation


def _decode(vae: nn.Module, latents: Tensor) -> Tensor:
    mean, deviation = _statistics(vae, latents)
    frame = (latents * deviation + mean)[:, :, None]
    return vae.decode(frame.to(vae.dtype)).sample[:, :, 0]


def _encode_image(vae: nn.Module, images: Tensor) -> Tensor:
    latents = vae.encode(images[:, :, None].to(vae.dtype)).latent_dist.mode()[:, :, 0].float()
    mean, deviation = _statistics(vae, latents)
    return (latents - mean) / deviation


QWEN_IMAGE = Family(
    title="Qwen-Image",
    network="transformer",
    parts={
        "transformer": ("QwenImageTransformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
        "tokenizer": (),
    },
    sizes=_sizes,
    channels=lambda transformer: transformer.get("in_channels", 64) // 4,
    latent_channels=lambda vae: vae.get("z_dim", 16),
    encode=_encode,
    conditioning=lambda transformer, length: {
        "embeds": (length, transformer["joint_attention_dim"]),
        "mask": (length,),
    },
    encode_null=_encode_null,
    predict=_prediction,
    text_limit=_TEXT_LENGTH,
    flow=FlowTimes(sigmas=evenly, mu=linear_mu, rounds=True),
    decode=_decode,
    encode_image=_encode_image,
    rescale=_to_conditional_norm,
    comfyui="diffusion_model.{}".format,
)
