"""CogView4: the network is told the time before the shift of the noise levels, and the size of the image.

Its padding, to a multiple of 16 tokens, is attended, so the number of tokens is a part of the input. Each prompt is
encoded alone, and rows of one length are predicted together.
"""

import math

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pad

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Config, Family, own_size, vae_scale
from mi_ray.diffusion.flows import FlowTimes

_TEXT_LENGTH = 1024  # the pipeline's default


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Zeros follow the `length` states of a prompt."""
    device = pipeline.text_encoder.device
    arguments = {"do_classifier_free_guidance": False, "device": device, "max_sequence_length": _TEXT_LENGTH}
    rows = [pipeline.encode_prompt([prompt], **arguments)[0][0] for prompt in prompts]
    size = torch.tensor([[*image_size, *image_size, 0, 0]], dtype=rows[0].dtype, device=device)
    return {
        "embeds": torch.stack([pad(row, (0, 0, 0, _TEXT_LENGTH - len(row))) for row in rows]),
        "length": torch.tensor([len(row) for row in rows], device=device),
        "size": size.repeat(len(prompts), 1),
    }


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    lengths, velocity = conditioning["length"], torch.zeros_like(x_t)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        original, target, crop = conditioning["size"][rows].split(2, 1)
        predicted = transformer(
            hidden_states=x_t[rows],
            encoder_hidden_states=conditioning["embeds"][rows, :length],
            timestep=timesteps[rows],
            original_size=original,
            target_size=target,
            crop_coords=crop,
            return_dict=False,
        )[0]
        velocity = velocity.index_copy(0, rows, predicted.to(velocity.dtype))
    return velocity


def _whole_timesteps(count: int) -> np.ndarray:
    """T, ..., 1 without their fractions, over T = 1000."""
    return np.linspace(1000, 1.0, count).astype(np.int64) / 1000


def _mu(config: Config, tokens: int, steps: int) -> float:
    """A shift that grows with the side of the image, in tokens."""
    return config["base_shift"] + config["max_shift"] * math.sqrt(tokens / config["base_image_seq_len"])


COGVIEW_4 = Family(
    title="CogView4",
    network="transformer",
    parts={
        "transformer": ("CogView4Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": (),
        "tokenizer": (),
    },
    sizes=lambda transformer, vae: own_size(
        transformer.get("sample_size"), vae_scale(vae), max(16, vae_scale(vae) * transformer.get("patch_size", 2))
    ),
    channels=lambda transformer: transformer.get("in_channels", 16),
    encode=_encode,
    predict=_prediction,
    text_limit=_TEXT_LENGTH,
    flow=FlowTimes(sigmas=_whole_timesteps, mu=_mu, unshifted=True),
    comfyui=None,  # ComfyUI has no such model
)
