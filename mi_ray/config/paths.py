"""Paths of a configuration. They are made absolute when it is read, so they mean the same in every process of a run."""

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from mi_ray.config.section import flatten

SHIPPED = ("shapes",)  # models inside the package
_PACKAGES = "/runtime_resources/working_dir_files/"  # where Ray unpacks what `ray job submit --working-dir` uploads


def absolute(path: str) -> str:
    """The absolute form of a local path, with `~` expanded. A URI is returned unchanged.

    Raises:
        ValueError: the path is empty, or it begins with `~` and the user does not exist.
    """
    if "://" in path:
        return path
    if not path:
        raise ValueError("the path is empty; give a path or a URI")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path!r} cannot be expanded, because the user after ~ does not exist; give an absolute path")
    return str(Path(expanded).absolute())


def folder_name(name: str) -> str:
    """The name of a folder for a control or a model. A name with a slash, such as that of a metric name@PATH, gets its
    last part and a hash instead of the path. Other names are unchanged."""
    if "/" not in name:
        return name
    start, end = re.match(r"[\w.-]*", name)[0], re.sub(r"[^\w.:-]", "-", name.rpartition("/")[2])
    return "-".join(part for part in (start, end, hashlib.sha256(name.encode()).hexdigest()[:8]) if part)


def shared(path: str) -> str:
    """The path unchanged, if all nodes can reach it.

    Raises:
        ValueError: the path is in Ray's copy of the working directory, which only one node has.
    """
    if _PACKAGES in path:
        raise ValueError(
            f"{path!r} lies in Ray's copy of the working directory: each node has its own copy, and Ray deletes it"
            " after the job; give an absolute path that all nodes share, or an s3:// or gs:// URI"
        )
    return path


def model_place(path: str) -> str:
    """The absolute path of a model folder. The name of an embedded model or a hub id is returned unchanged.

    Raises:
        ValueError: as `absolute` and `shared` do.
    """
    is_path = path not in SHIPPED and (path.startswith((".", "/", "~")) or os.path.exists(path))
    return shared(absolute(path)) if is_path else path


def hashed_fields(results: dict) -> dict:
    """The fields of a `results_config` that identify a run, as a flat dictionary.

    It leaves out the paths of files whose content is compared instead (prompts, weights of a model folder). So a run
    continues after its inputs were moved.
    """
    flat = flatten(results)
    for name in {"prompts.file", "evaluation.file"} & flat.keys():
        del flat[name]
    for name in {"model", "model.path"} & flat.keys():
        flat[name] = "a folder" if model_place(flat[name]).startswith("/") else flat[name]
    if "input" in flat:  # a run that began before paths were made absolute has a relative one
        flat["input"] = absolute(flat["input"])
    return flat


LocalOrUri = Annotated[str, AfterValidator(absolute)]  # only the driver reads it
SharedPath = Annotated[LocalOrUri, AfterValidator(shared)]  # actors and workers use it too, or it must outlive the job
ModelPath = Annotated[str, AfterValidator(model_place)]


def without_revision(path: str) -> str:
    """A hub id without its revision. Any other model is returned unchanged."""
    name, _, revision = path.partition("@")
    return name if revision and name.count("/") == 1 and path[0] != "/" and not Path(path).is_dir() else path


def pinned(path: str, commit: str | None) -> str:
    """A hub id pinned to a commit (`without_revision` undoes it). Other paths are unchanged."""
    return f"{without_revision(path)}@{commit}" if commit and not path.startswith("/") else path
