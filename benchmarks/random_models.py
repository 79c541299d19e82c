"""Pipelines to measure: published architectures with random weights, without a download, or a folder.

The tokenizers of an architecture are those of the embedded world, padded to the length of the real ones. They do not
change the amount of work. Stable Diffusion 3.5 has no T5; as in its pipeline, zeros take the place of T5's states.
"""

from pathlib import Path

import torch
from torch import nn

from mi_ray.diffusion.architectures import PREFIX, architecture_folder
from mi_ray.diffusion.denoisers import PipelineDenoiser
from mi_ray.diffusion.folder_checks import family_of, read_config, read_index, schedule_of
from mi_ray.diffusion.folders import load_encoders_on_meta, load_network_on_meta
from mi_ray.shapes.model import build_tokenizer

import diffusers  # isort: skip
from diffusers import DiffusionPipeline

TEXT_LENGTH = 77
_T5 = ("text_encoder_3", "tokenizer_3")


def filled(module: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """A module of the meta device with random matrices. Vectors are 1 (weights of norms) or 0, whole numbers count."""
    module = module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    module = module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in (module.state_dict() | dict(module.named_buffers())).items():
        if not tensor.is_floating_point():
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))  # positions
        elif tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.fill_(float(name.endswith("weight")))
    return module.eval().requires_grad_(False)


def model_folder(model: str) -> Path:
    """The folder of the configurations: of an architecture by its name, or as it is."""
    return Path(model) if Path(model).is_dir() else architecture_folder(PREFIX + model)


def pipeline_of(model: str, dtype: torch.dtype, device: str) -> DiffusionPipeline:
    """The stock pipeline of an architecture, with random weights, or of a folder. On a CPU its text encoders and its
    autoencoder are in fp32, as in a run."""
    folder = model_folder(model)
    index, family = read_index(folder), family_of(folder)
    if Path(model).is_dir():
        return DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    path, around = PREFIX + model, torch.float32 if device == "cpu" else dtype
    parts = {name: part for name, part in load_encoders_on_meta(path).items() if name not in _T5}
    given = {name: filled(part, around, device) for name, part in parts.items()}
    given[family.network] = filled(load_network_on_meta(path), dtype, device)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TEXT_LENGTH
    given |= {part: tokenizer for part in family.parts if part.startswith("tokenizer") and part not in _T5}
    given |= {part: None for part in _T5 if part in family.parts}
    scheduler = read_config(folder, "scheduler")
    given["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    return getattr(diffusers, index["_class_name"])(**given, **family.unused)


def denoiser_of(model: str, pipeline: DiffusionPipeline, side: int | None = None) -> PipelineDenoiser:
    """Our denoiser with the modules of a pipeline of `pipeline_of`.

    Args:
        side: height and width of the images in pixels; None: the model's own.
    """
    folder = model_folder(model)
    index, family = read_index(folder), family_of(folder)
    network = getattr(pipeline, family.network)
    sizes = family.sizes(network.config, pipeline.vae.config)
    image_size = sizes.image(side, side)
    latent_shape = (family.channels(network.config), *sizes.latent(image_size))
    return PipelineDenoiser(
        family=family,
        network=network,
        pipeline=pipeline,
        schedule=schedule_of(index, read_config(folder, "scheduler"), latent_shape, network.dtype),
        sizes=sizes,
        image_size=image_size,
        dtype=network.dtype,
        device=network.device,
    )
