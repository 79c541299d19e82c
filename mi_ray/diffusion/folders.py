"""Model folders: a shipped name, a diffusers folder or a hub id is found, checked, fetched and pinned to a commit.

Only safetensors are read, and no code from the model's repository.
"""

import hashlib
import json
import os
import re
from importlib.resources import files
from pathlib import Path

from diffusers import StableDiffusionPipeline
from huggingface_hub import snapshot_download
from transformers import CLIPTokenizer

from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.diffusion.sizes import Sizes
from mi_ray.diffusion.weights import WEIGHTS, weight_faults, weight_names, width_faults

SHIPPED = {"shapes": "shapes/weights"}  # name -> folder inside the package

_SUPPORTED = "supported is the Stable Diffusion 1 and 2 family (StableDiffusionPipeline; epsilon- or v-prediction)"
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_POSITIONS = 77  # of a text encoder whose configuration names no number: the default of CLIPTextConfig
_PIECES, _PIECE = 64, 4096  # of a file, evenly from its beginning to its end, and bytes of each
_SINGLE = (".safetensors", ".ckpt")  # suffixes of checkpoints in a single file
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")  # and a branch, a tag or a commit
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load_schedule(path: str) -> NoiseSchedule:
    """The noise schedule alone, cheap to load.

    Raises:
        ValueError: if the model has none that is supported, or the hub cannot be asked.
    """
    return NoiseSchedule.from_config(part_config(path, "scheduler"))


def load_sizes(path: str) -> Sizes:
    """The image sizes that the model can make; reads the configurations of its UNet and autoencoder alone.

    Raises:
        ValueError: the model lacks one of them, or the hub cannot be asked.
    """
    unet, vae = part_config(path, "unet"), part_config(path, "vae")
    try:
        return Sizes.of_unet(unet, vae)
    except ValueError as error:
        raise ValueError(f"{path!r} {error}") from error


def load_tokenizer(path: str) -> CLIPTokenizer:
    """The tokenizer alone, cheap to load: for counting a prompt's tokens before the model is there. Its
    `model_max_length` is what the text encoder reads at most, also where the tokenizer's configuration names none.

    Raises:
        ValueError: if the model has none, or the hub cannot be asked.
    """
    folder = _folder_with(path, "tokenizer/*")
    _refuse(path, _vocabulary_faults(folder))
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    longest = part_config(path, "text_encoder").get("max_position_embeddings", _POSITIONS)
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def resolve_model(path: str) -> str:
    """The folder of a shipped name, a folder as it is, or a hub id as it is, with its revision if it has one.

    Raises:
        ValueError: if `path` has the form of none of them.
    """
    if path in SHIPPED:
        return str(files("mi_ray") / SHIPPED[path])
    single = path.endswith(_SINGLE) or (path and Path(path).is_file())
    if (path and Path(path).is_dir()) or (_HUB_ID.fullmatch(path) and not single):
        return path
    if single and path.endswith(_SINGLE):
        raise ValueError(
            f"{path!r} is a checkpoint in a single file, and a diffusers folder is needed; convert it once:"
            f" StableDiffusionPipeline.from_single_file({path!r}).save_pretrained(FOLDER)"
        )
    if single:
        raise ValueError(f"{path!r} is a file; give the folder of a diffusers pipeline")
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
    folder = _local_folder(path)
    if folder is not None:
        _refuse(path, _folder_faults(folder))


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
    name, revision = _HUB_ID.fullmatch(path).groups()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[pattern]))
    except OSError as error:
        raise _not_had(path, error) from error


def model_commit(path: str) -> str | None:
    """What tells a model's weights from others: the commit of a hub model as it is now, or a digest of a folder's
    files; None of a shipped model.

    Raises:
        ValueError: the hub cannot be asked, or it is a pipeline that is not supported.
    """
    if (local := _local_folder(path)) is not None:
        return None if path in SHIPPED else _folder_digest(local)
    folder = _folder_with(path, "model_index.json")
    _refuse(path, _index_faults(folder))
    return folder.name


def _folder_digest(folder: Path) -> str:
    """16 digits over the configurations and, of the weights, the sizes and some of the bytes: fast for gigabytes too.

    Any training changes nearly every weight, so that a few thousand bytes of each file tell two models apart.
    """
    names = [f"{part}/{_CONFIGS[part]}" for part in _CONFIGS]
    names += [f"{part}/{name}" for part in WEIGHTS for name in weight_names(folder, part)]
    digest = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{name} {size}\n".encode())
            for piece in range(_PIECES):
                file.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


def part_config(path: str, part: str) -> dict:
    """The configuration of a part (unet, vae, text_encoder, tokenizer, scheduler) of a model, without its weights.

    Raises:
        ValueError: the model has none, or the hub cannot be asked.
    """
    config, fault = _part_config(_folder_with(path, f"{part}/{_CONFIGS[part]}"), part)
    if config is None:
        _refuse(path, [fault])
    return config


def fetch_model(path: str) -> Path:
    """The model's local folder, checked; a hub id is downloaded, or found in the hub's cache."""
    check_model(path)
    folder = _local_folder(path)
    if folder is not None:
        return folder
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    try:
        name, revision = _HUB_ID.fullmatch(path).groups()
        # Before gigabytes are fetched.
        _refuse(path, _class_faults(StableDiffusionPipeline.load_config(name, revision=revision)))
        folder = Path(StableDiffusionPipeline.download(name, revision=revision, use_safetensors=True, **unused))
    except OSError as error:
        raise _not_had(path, error) from error
    _refuse(path, _folder_faults(folder))
    return folder


def _not_had(path: str, error: OSError) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"{path!r} cannot be had from the hub: check the name and the network, or give a local folder ({reason})"
    )


def _refuse(path: str, faults: list[str]):
    if faults:
        raise ValueError("\n".join(f"{path!r} {fault}" for fault in faults))


def _read_json(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping")
    return content


def _class_faults(index: dict) -> list[str]:
    """One line for each class of a model_index.json that is not supported."""
    pipeline = index.get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        return [f"is a {pipeline}, which is not supported; {_SUPPORTED}"]
    named = {part: (index.get(part) or (None, None))[1] for part in _CLASSES}
    return [
        f"has as its {part} a {name}, which is not supported; {_SUPPORTED}"
        for part, name in named.items()
        if name not in (None, *_CLASSES[part])
    ]


def _index_faults(folder: Path) -> list[str]:
    """One line for each thing that is wrong with a folder's model_index.json."""
    try:
        return _class_faults(_read_json(folder / "model_index.json"))
    except FileNotFoundError:
        return ["has no model_index.json; give a folder that a diffusers pipeline's save_pretrained wrote"]
    except ValueError as error:
        return [f"has a model_index.json that is not JSON ({error}); fetch it again"]


def _folder_faults(folder: Path) -> list[str]:
    """One line for each thing that is wrong with a diffusers folder."""
    if faults := _index_faults(folder):
        return faults
    configs = {}
    for part in _CONFIGS:
        config, fault = _part_config(folder, part)
        if config is None:
            faults.append(fault)
        else:
            configs[part] = config
        if part in WEIGHTS and (folder / part).is_dir():
            faults += weight_faults(folder, part, config)
    if "tokenizer" in configs:
        faults += _vocabulary_faults(folder)
    if "scheduler" in configs:
        try:
            NoiseSchedule.from_config(configs["scheduler"])
        except ValueError as error:
            faults += [f"has in scheduler/scheduler_config.json {fault}" for fault in str(error).split("\n")]
    if "unet" in configs and "vae" in configs:
        try:
            Sizes.of_unet(configs["unet"], configs["vae"])
        except ValueError as error:
            faults.append(str(error))
    return faults + width_faults(configs)


def read_config(folder: Path, part: str) -> dict:
    """The configuration of a part (unet, vae, text_encoder, tokenizer, scheduler) of a checked folder."""
    return _read_json(folder / part / _CONFIGS[part])


def _part_config(folder: Path, part: str) -> tuple[dict | None, str]:
    """A part's configuration, or None and what is wrong with it."""
    name = f"{part}/{_CONFIGS[part]}"
    try:
        return _read_json(folder / name), ""
    except FileNotFoundError:
        return None, f"lacks its {part}: there is no {name}; complete the folder"
    except ValueError as error:
        return None, f"has a {name} that is not JSON ({error}); fetch it again"


def _vocabulary_faults(folder: Path) -> list[str]:
    """Whether the tokenizer's vocabulary is there: transformers builds an empty one without a word."""
    if any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return []
    return ["lacks its tokenizer's vocabulary, tokenizer/tokenizer.json or tokenizer/vocab.json; complete the folder"]
