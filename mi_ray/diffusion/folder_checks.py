"""What a diffusers folder must hold: its parts by the model's family, read without loading a weight.

Only safetensors are accepted, and no code from the model's repository.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mi_ray.diffusion.families import FAMILIES, Family
from mi_ray.diffusion.flows import FlowSchedule
from mi_ray.diffusion.schedules import NoiseSchedule, Schedule

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
    faults = []
    for part, classes in FAMILIES[pipeline].parts.items():
        library, name = index.get(part) or (None, None)
        if name is not None and (library not in _LIBRARIES or (classes and name not in classes)):
            known = ", ".join(classes) or "a class of transformers"
            faults.append(f"has as its {part} a {name} of {library}, which is not supported; supported: {known}")
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
            continue
        configs[part] = config
        if part.startswith("tokenizer"):
            faults += vocabulary_faults(folder, part)
        elif has_weights(part):
            faults += _weight_faults(folder, index, part)
    if family.network not in configs or "vae" not in configs:
        return faults
    latent_shape = (family.channels(configs[family.network]), 2, 2)
    if "scheduler" in configs:
        try:
            schedule_of(index, configs["scheduler"], latent_shape)
        except ValueError as error:
            faults += [f"has in scheduler/scheduler_config.json {fault}" for fault in str(error).split("\n")]
    try:
        family.sizes(configs[family.network], configs["vae"])
    except ValueError as error:
        faults.append(str(error))
    if family.network == "unet":
        channels = configs["unet"].get("in_channels", 4), configs["unet"].get("out_channels", 4)
        wanted = configs["vae"].get("latent_channels", 4)
        if channels != (wanted, wanted):
            faults.append(
                f"has a UNet that takes {channels[0]} and gives {channels[1]} channels for latents of {wanted}"
                " (an inpainting or upscaling model?); give a text-to-image model"
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
    """Whether the tokenizer's vocabulary is there: transformers builds an empty one without a word."""
    names = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    if any((folder / part / name).is_file() for name in names):
        return []
    return [f"lacks its {part}'s vocabulary, {part}/tokenizer.json or {part}/vocab.json; complete the folder"]


def weight_names(folder: Path, index: dict, part: str) -> list[str]:
    """The files of a part's weights: several if there is an index."""
    whole = "model.safetensors" if index[part][0] == "transformers" else "diffusion_pytorch_model.safetensors"
    split = folder / part / f"{whole}.index.json"
    return sorted(set(read_json(split)["weight_map"].values())) if split.is_file() else [whole]


def _weight_faults(folder: Path, index: dict, part: str) -> list[str]:
    """Whether the safetensors are there and whole; reads their headers only."""
    faults = []
    for name in weight_names(folder, index, part):
        try:
            with safe_open(folder / part / name, framework="pt"):
                pass
        except FileNotFoundError:
            faults.append(f"lacks {part}/{name}; complete the folder (only safetensors are read, no pickled weights)")
        except (SafetensorError, OSError) as error:
            faults.append(f"has a {part}/{name} that cannot be read ({error}); fetch it again, whole (git lfs pull?)")
    return faults
