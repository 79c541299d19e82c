"""Model folders: a shipped name, a diffusers folder or a hub id is found, checked, fetched and pinned to a commit.

Only safetensors are read, and no code from the model's repository.
"""

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path

import diffusers
import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedTokenizerBase

from mi_ray.diffusion.architectures import architecture_folder, is_architecture
from mi_ray.diffusion.families import FAMILIES, Family
from mi_ray.diffusion.folder_checks import (
    INDEX,
    class_faults,
    config_name,
    family_of,
    folder_faults,
    folder_parts,
    has_weights,
    index_faults,
    read_index,
    read_part_config,
    schedule_of,
    vocabulary_faults,
)
from mi_ray.diffusion.hub import files_digest, hub_id
from mi_ray.diffusion.schedules import NoiseSchedule, Schedule
from mi_ray.diffusion.single_files import SUFFIXES, single_file_fault
from mi_ray.diffusion.sizes import Sizes
from mi_ray.diffusion.weights import on_meta, part_class, weight_names

SHIPPED = {"shapes": "shapes/weights"}  # name -> folder inside the package

_POSITIONS = 77  # of a CLIP text encoder whose configuration names no number
_NO_WEIGHTS = "Could not find the necessary `safetensors` weights"  # diffusers: the repository has no such files
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load_schedule(path: str, size: tuple[int | None, int | None] = (None, None)) -> Schedule:
    """The noise schedule alone, cheap to load.

    Args:
        size: height and width of the images in pixels, on which the noise levels of some flow models depend.

    Raises:
        ValueError: if the model has none that is supported, or the hub cannot be asked.
    """
    family, config = model_family(path), part_config(path, "scheduler")
    if family.flow is None:
        return NoiseSchedule.from_config(config)
    sizes, channels = load_sizes(path), family.channels(part_config(path, family.network))
    index = read_index(_folder_with(path, INDEX))
    return schedule_of(index, config, (channels, *sizes.latent(sizes.image(*size))))


def load_sizes(path: str) -> Sizes:
    """The image sizes that the model can make; reads the configurations of its network and autoencoder alone.

    Raises:
        ValueError: the model lacks one of them, or the hub cannot be asked.
    """
    family = model_family(path)
    network, vae = part_config(path, family.network), part_config(path, "vae")
    try:
        return family.sizes(network, vae)
    except ValueError as error:
        raise ValueError(f"{path!r} {error}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, cheap to load: for counting a prompt's tokens before the model is there. Its
    `model_max_length` is what the model's pipeline takes.

    Raises:
        ValueError: if the model has none, or the hub cannot be asked.
    """
    family = model_family(path)
    name = family.tokenizer
    folder = _folder_with(path, f"{name}/*")
    _refuse(path, vocabulary_faults(folder, name))
    tokenizer = part_class(read_index(_folder_with(path, INDEX)), name).from_pretrained(folder, subfolder=name)
    limit = family.text_limit
    if limit is None:  # what the text encoder reads, also where the tokenizer's configuration names none
        limit = part_config(path, "text_encoder").get("max_position_embeddings", _POSITIONS)
        limit = min(limit, tokenizer.model_max_length)
    tokenizer.model_max_length = limit
    return tokenizer


def load_network_on_meta(path: str) -> nn.Module:
    """The network without its weights, for its layers' names.

    Raises:
        ValueError: the model has none, or the hub cannot be asked.
    """
    part = model_family(path).network
    return on_meta(part_class(read_index(_folder_with(path, INDEX)), part), part_config(path, part))


def load_encoders_on_meta(path: str) -> dict[str, nn.Module]:
    """The text encoders and the autoencoder without their weights, by the name of the part.

    Raises:
        ValueError: the model lacks a configuration, or the hub cannot be asked.
    """
    index, network = read_index(_folder_with(path, INDEX)), model_family(path).network
    parts = {}
    for part in folder_parts(index):
        if has_weights(part) and part != network:
            kind, config = part_class(index, part), part_config(path, part)
            if hasattr(kind, "config_class") and kind.config_class is not None:  # of transformers
                with torch.device("meta"):
                    parts[part] = kind(kind.config_class.from_dict(config))
            else:
                parts[part] = on_meta(kind, config)
    return parts


def prompt_length(path: str) -> int:
    """Tokens of a prompt that the model reads, without its tokenizer."""
    family = model_family(path)
    return family.text_limit or part_config(path, "text_encoder").get("max_position_embeddings", _POSITIONS)


def weights_are_here(path: str) -> bool:
    """Whether the network's weights are on this machine: in the folder, or in the hub's cache.

    Raises:
        ValueError: it is no model, or the hub cannot be asked.
    """
    part = model_family(path).network
    return any((_folder_with(path, INDEX) / part).glob("*.safetensors"))


def pipeline_class(path: str) -> str:
    """Name of the model's pipeline class in diffusers.

    Raises:
        ValueError: the model has none that is supported, or the hub cannot be asked.
    """
    model_family(path)
    return read_index(_folder_with(path, INDEX))["_class_name"]


def distilled_reason(path: str) -> str | None:
    """Why a model has no trained unconditional prediction, so that scores against the empty prompt and
    classifier-free guidance mean little; None: it has one.

    Raises:
        ValueError: the model lacks a configuration, or the hub cannot be asked.
    """
    family = model_family(path)
    return family.distilled(part_config(path, family.network), read_index(_folder_with(path, INDEX)))


def model_family(path: str) -> Family:
    """The family of a model; reads model_index.json alone.

    Raises:
        ValueError: the model has no supported pipeline class, or the hub cannot be asked.
    """
    folder = _folder_with(path, INDEX)
    _refuse(path, index_faults(folder))
    return family_of(folder)


def resolve_model(path: str) -> str:
    """The folder of a shipped name or an architecture, a folder as it is, or a hub id as it is, with its revision if it
    has one.

    Raises:
        ValueError: if `path` has the form of none of them.
    """
    if path in SHIPPED:
        return str(files("mi_ray") / SHIPPED[path])
    if is_architecture(path):
        return str(architecture_folder(path))
    if path and Path(path).is_dir():
        return path
    if path.endswith(SUFFIXES) or (path and Path(path).is_file()):
        raise ValueError(single_file_fault(path))
    if hub_id(path):
        return path
    shipped = ", ".join(SHIPPED)
    raise ValueError(
        f"{path!r} is no model: give a shipped name ({shipped}), an existing folder or a hub id owner/name, or"
        " owner/name@revision"
    )


def check_model(path: str) -> None:
    """Check all that can be checked of a model without loading it; of a hub id, only its form.

    Raises:
        ValueError: with a line for each thing that is wrong.
    """
    if is_architecture(path):
        architecture_folder(path)
        _refuse(path, ["has no weights; it is for --dry-run and benchmarks; give a model folder or a hub id"])
    folder = _local_folder(path)
    if folder is not None:
        _refuse(path, folder_faults(folder))


def check_adapter(folder: str | Path) -> None:
    """Check that a local folder holds a PEFT adapter.

    Raises:
        ValueError: naming the file that is missing.
    """
    for name in _ADAPTER_FILES:
        if not (Path(folder) / name).is_file():
            raise ValueError(f"{str(folder)!r} is no adapter: it has no {name}; give a folder that PEFT saved")


def _local_folder(path: str) -> Path | None:
    """The folder of a shipped or local model; None of a hub id."""
    folder = Path(resolve_model(path))
    return folder if path in SHIPPED or folder.is_dir() else None


def _folder_with(path: str, pattern: str) -> Path:
    """A folder that holds some files of the model; of a hub id, named by its commit, nothing else is fetched."""
    folder = _local_folder(path)
    if folder is not None:
        return folder
    name, revision = hub_id(path)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[pattern]))
    except OSError as error:
        raise _not_had(path, error) from error


def model_commit(path: str) -> str | None:
    """What identifies a model's weights: the present commit of a hub model, or a digest of a folder's files. None for a
    shipped model or an architecture.

    Raises:
        ValueError: the hub cannot be asked, or it is a pipeline that is not supported.
    """
    if (local := _local_folder(path)) is not None:
        return None if path in SHIPPED or is_architecture(path) else _folder_digest(local)
    folder = _folder_with(path, INDEX)
    _refuse(path, index_faults(folder))
    return folder.name


def _folder_digest(folder: Path) -> str:
    """The digest of the configurations and weights of a model."""
    index = read_index(folder)
    parts = folder_parts(index)
    names = [f"{part}/{config_name(part)}" for part in parts]
    names += [f"{part}/{name}" for part in parts if has_weights(part) for name in weight_names(folder, index, part)]
    return files_digest(folder, names)


def part_config(path: str, part: str) -> dict:
    """The configuration of a part (unet, transformer, vae, scheduler, …) of a model, without its weights.

    Raises:
        ValueError: the model has none, or the hub cannot be asked.
    """
    config, fault = read_part_config(_folder_with(path, f"{part}/{config_name(part)}"), part)
    if config is None:
        _refuse(path, [fault])
    return config


def fetch_model(path: str) -> Path:
    """The model's local folder, checked; a hub id is downloaded, or found in the hub's cache."""
    check_model(path)
    folder = _local_folder(path)
    if folder is not None:
        return folder
    try:
        name, revision = hub_id(path)
        index = diffusers.DiffusionPipeline.load_config(name, revision=revision)
        _refuse(path, class_faults(index))  # before gigabytes are fetched
        unused = {part: None for part, value in FAMILIES[index["_class_name"]].unused.items() if value is None}
        pipeline = getattr(diffusers, index["_class_name"])
        folder = _downloaded(partial(pipeline.download, name, revision=revision, use_safetensors=True, **unused))
    except OSError as error:
        raise _not_had(path, error) from error
    _refuse(path, folder_faults(folder))
    return folder


def _downloaded(download: Callable[..., str]) -> Path:
    """The folder of a hub model; of a repository that has only fp16 weights, with these.

    Raises:
        OSError: it cannot be downloaded.
    """
    try:
        return Path(download())
    except OSError as error:
        if _NO_WEIGHTS not in str(error):  # the hub or the network has failed: another download would, too
            raise
        try:
            return Path(download(variant="fp16"))
        except (OSError, ValueError) as of_variant:
            if isinstance(of_variant, OSError) and _NO_WEIGHTS not in str(of_variant):
                raise
        raise


def _not_had(path: str, error: OSError) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"{path!r} cannot be fetched from the hub: check the name and the network, or give a local folder ({reason})"
    )


def _refuse(path: str, faults: list[str]):
    if faults:
        raise ValueError("\n".join(f"{path!r} {fault}" for fault in faults))
