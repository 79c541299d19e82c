"""Z-Image: the network takes lists, is told the time 1 - s, and predicts x0 - epsilon.

Its pipeline writes guidance as conditional + g (conditional - unconditional); our guidance_scale is 1 + g.
"""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pad

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Family, own_size, vae_scale
from mi_ray.diffusion.flows import FlowTimes, evenly, linear_mu

_TEXT_LENGTH = 512  # the pipeline's default


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Zeros follow the prompt, and the mask (n, 512) hides them."""
    ragged, _ = pipeline.encode_prompt(
        list(prompts),  # the pipeline writes its chat template into the list
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=_TEXT_LENGTH,
    )
    mask = torch.stack([torch.arange(_TEXT_LENGTH, device=row.device) < len(row) for row in ragged])
    return {"embeds": torch.stack([pad(row, (0, 0, 0, _TEXT_LENGTH - len(row))) for row in ragged]), "mask": mask}


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    lengths = conditioning["mask"].sum(1).tolist()
    texts = [row[:length] for row, length in zip(conditioning["embeds"], lengths, strict=True)]
    outputs = transformer(list(x_t[:, :, None]), (1000 - timesteps) / 1000, texts, return_dict=False)[0]
    return -torch.stack(outputs)[:, :, 0]


Z_IMAGE = Family(
    title="Z-Image",
    network="transformer",
    parts={
        "transformer": ("ZImageTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": (),
        "tokenizer": (),
    },
    sizes=lambda transformer, vae: own_size(None, vae_scale(vae), 2 * vae_scale(vae)),
    channels=lambda transformer: transformer.get("in_channels", 16),
    encode=_encode,
    predict=_prediction,
    text_limit=_TEXT_LENGTH,
    flow=FlowTimes(sigmas=evenly, mu=linear_mu),
    comfyui="diffusion_model.{}".format,
)
