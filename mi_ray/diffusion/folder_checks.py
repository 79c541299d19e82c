"""What a diffusers folder must hold: its parts by the model's family, read without loading a weight.

Only safetensors are accepted, and no code from the model's repository.
"""

import importlib
import json
from pathlib import Path

import torch

from mi_ray.diffusion.families import FAMILIES, Family
from mi_ray.diffusion.flows import FlowSchedule
from mi_ray.diffusion.schedules import NoiseSchedule, Schedule
from mi_ray.diffusion.weights import weight_faults

_SUPPORTED = "supported are " + "; ".join(f"{family.title} ({name})" for name, family in FAMILIES.items())
INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")


def schedule_of(
    index: dict, config: dict, latent_shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Schedule:
    """The noise schedule of a model.

    Args:
        index: the model_index.json.
        config: of its scheduler.
        dtype: of its network.

    Raises:
        ValueError: with a line for each setting that is not supported.
    """
    times = FAMILIES[index["_class_name"]].flow
    if times is None:
        return NoiseSchedule.from_config(config)
    return FlowSchedule.from_config(config, times, latent_shape, index.get("is_distilled", False)).rounded_to(dtype)


def family_of(folder: Path) -> Family:
    """The family of a checked folder."""
    return FAMILIES[read_index(folder)["_class_name"]]


def read_json(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping")
    return content


def class_faults(index: dict) -> list[str]:
    """One line for each class of a model_index.json that is not supported."""
    pipeline = index.get("_class_name")
    if pipeline not in FAMILIES:
        return [f"is a {pipeline}, which is not supported; {_SUPPORTED}"]
    family, faults = FAMILIES[pipeline], []
    for part, classes in family.parts.items():
        library, name = index.get(part) or (None, None)
        if name is None:
            if part not in family.optional:
                faults.append(f"names no {part} in its {INDEX}; give a whole text-to-image model")
        elif library not in _LIBRARIES or (classes and name not in classes):
            known = ", ".join(classes) or "a class of transformers"
            faults.append(f"has as its {part} a {name} of {library}, which is not supported; supported: {known}")
        elif not isinstance(getattr(importlib.import_module(library), name, None), type):
            faults.append(f"has as its {part} a {name}, which the installed {library} does not have; update {library}")
    return faults


def folder_parts(index: dict) -> list[str]:
    """The parts that a folder must hold: those of its family, the scheduler, and optional ones that the index names."""
    family = FAMILIES[index["_class_name"]]
    return [p for p in (*family.parts, "scheduler") if p not in family.optional or (index.get(p) or [None])[0]]


def config_name(part: str) -> str:
    if part.startswith("tokenizer"):
        return "tokenizer_config.json"
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def has_weights(part: str) -> bool:
    return not part.startswith("tokenizer") and part != "scheduler"


def index_faults(folder: Path) -> list[str]:
    """One line for each thing that is wrong with a folder's model_index.json."""
    try:
        return class_faults(read_json(folder / INDEX))
    except FileNotFoundError:
        return ["has no model_index.json; give a folder that a diffusers pipeline's save_pretrained wrote"]
    except ValueError as error:
        return [f"has a model_index.json that is not JSON ({error}); fetch it again"]


def folder_faults(folder: Path) -> list[str]:
    """One line for each thing that is wrong with a diffusers folder."""
    if faults := index_faults(folder):
        return faults
    index = read_index(folder)
    family, configs = FAMILIES[index["_class_name"]], {}
    for part in folder_parts(index):
        config, fault = read_part_config(folder, part)
        if config is None:
            faults.append(fault)
        else:
            configs[part] = config
        if has_weights(part) and (folder / part).is_dir():
            faults += weight_faults(folder, index, part, config)
        elif part.startswith("tokenizer") and config is not None:
            faults += vocabulary_faults(folder, part)
    if "scheduler" in configs:
        try:
            schedule_of(index, configs["scheduler"], (1, 2, 2))  # what is wrong does not depend on the shape
        except ValueError as error:
            faults += [f"has in scheduler/scheduler_config.json {fault}" for fault in str(error).split("\n")]
    try:
        return faults + _width_faults(family, configs)
    except TypeError as error:
        return [*faults, f"has a number of another type in a config.json ({error}); fetch its parts again"]


def _width_faults(family: Family, configs: dict[str, dict]) -> list[str]:
    """One line for each width in which the parts of a model do not agree; parts that are missing are not compared."""
    faults = []
    network, vae = configs.get(family.network), configs.get("vae")
    if network is not None and vae is not None:
        try:
            family.sizes(network, vae)
        except ValueError as error:
            faults.append(str(error))
        takes, wanted = family.channels(network), family.latent_channels(vae)
        gives = network.get("out_channels", 4) if family.network == "unet" else takes  # others may predict a variance
        if (takes, gives) != (wanted, wanted):
            faults.append(
                f"has a {family.network} that takes {takes} and gives {gives} channels for latents of {wanted}"
                " (an inpainting or upscaling model?); give a text-to-image model"
            )
    encoders = [configs.get(part) for part in family.parts if part.startswith("text_encoder")]
    if family.network == "unet" and network is not None and None not in encoders:
        widths, read = [config.get("hidden_size", 512) for config in encoders], network.get("cross_attention_dim", 1280)
        if any(one != sum(widths) for one in (read if isinstance(read, list) else [read])):
            faults.append(
                f"has a text encoder of hidden_size {' and '.join(map(str, widths))} and a UNet of cross_attention_dim"
                f" {read}: they are parts of different models; take both from the same one"
            )
    return faults


def read_index(folder: Path) -> dict:
    """The model_index.json of a checked folder."""
    return read_json(folder / INDEX)


def read_config(folder: Path, part: str) -> dict:
    """The configuration of a part (unet, transformer, vae, scheduler, …) of a checked folder."""
    return read_json(folder / part / config_name(part))


def read_part_config(folder: Path, part: str) -> tuple[dict | None, str]:
    """A part's configuration, or None and what is wrong with it."""
    name = f"{part}/{config_name(part)}"
    try:
        return read_json(folder / name), ""
    except FileNotFoundError:
        return None, f"lacks its {part}: there is no {name}; complete the folder"
    except ValueError as error:
        return None, f"has a {name} that is not JSON ({error}); fetch it again"


def vocabulary_faults(folder: Path, part: str) -> list[str]:
    """A fault if the tokenizer's vocabulary is missing: transformers then makes an empty one, without a warning."""
    names = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    if any((folder / part / name).is_file() for name in names):
        return []
    return [f"lacks its {part}'s vocabulary, {part}/tokenizer.json or {part}/vocab.json; complete the folder"]
