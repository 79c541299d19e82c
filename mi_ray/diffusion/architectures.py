"""Published models without their weights: `architecture:NAME`, for a dry run and for benchmarks.

The configurations are in architectures.yaml.
"""

import json
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import diffusers
import yaml

from mi_ray.diffusion.families import FAMILIES

PREFIX = "architecture:"


@cache
def _architectures() -> dict[str, dict]:
    content = yaml.safe_load((files("mi_ray") / "diffusion/architectures.yaml").read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name != "shared"}


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="mi_ray-architectures-")  # removed when the process ends


def architecture_names() -> list[str]:
    return list(_architectures())


def is_architecture(path: str) -> bool:
    return path.startswith(PREFIX)


@cache
def architecture_folder(path: str) -> Path:
    """A diffusers folder with the configurations of an architecture, without weights and vocabularies.

    Args:
        path: architecture:NAME.

    Raises:
        ValueError: no architecture has this name.
    """
    name = path.removeprefix(PREFIX)
    if name not in _architectures():
        raise ValueError(f"{path!r} is no architecture; the names are {', '.join(architecture_names())}")
    content = _architectures()[name]
    family, folder = FAMILIES[content["pipeline"]], Path(_folder().name) / name
    classes = {part: known[0] for part, known in family.parts.items() if known} | content.get("tokenizers", {})
    scheduler = dict(content["scheduler"])
    classes["scheduler"] = scheduler["_class_name"]
    index = {"_class_name": content["pipeline"], **content.get("settings", {})}
    index |= {part: _entry(kind) for part, kind in classes.items()}
    _write(folder / "model_index.json", index)
    for part, kind in classes.items():
        if part == "scheduler":
            _write(folder / part / "scheduler_config.json", scheduler)
        elif not part.startswith("tokenizer"):
            _write(folder / part / "config.json", {"_class_name": kind, **content[part]})
    return folder


def _entry(kind: str) -> list[str]:
    return ["diffusers" if hasattr(diffusers, kind) else "transformers", kind]


def _write(path: Path, content: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
