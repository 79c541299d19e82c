"""Paths of a configuration: made absolute when it is read, so that all processes of a run, wherever they run, agree."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from mi_ray.config.section import flatten

SHIPPED = ("shapes",)  # models inside the package
_PACKAGES = "/runtime_resources/working_dir_files/"  # where Ray unpacks what `ray job submit --working-dir` uploads


def absolute(path: str) -> str:
    """A local path from the root, with `~` expanded; a URI as it is.

    Raises:
        ValueError: the path is empty, or begins with `~` and there is no such user.
    """
    if "://" in path:
        return path
    if not path:
        raise ValueError("the path is empty; give a path or a URI")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path!r} begins with the home folder of an unknown user; write the whole path")
    return str(Path(expanded).absolute())


def shared(path: str) -> str:
    """A path, refused where one node alone would find it.

    Raises:
        ValueError: it lies in Ray's copy of the working directory.
    """
    if _PACKAGES in path:
        raise ValueError(
            f"{path!r} lies in Ray's copy of the working directory, which each node has for itself and which Ray"
            " deletes after the job; give an absolute path that all nodes share, or an s3:// or gs:// URI"
        )
    return path


def model_place(path: str) -> str:
    """The absolute path of a model's folder; a shipped name or a hub id as it is.

    Raises:
        ValueError: as `absolute` and `shared` do.
    """
    is_path = path not in SHIPPED and (path.startswith((".", "/", "~")) or os.path.exists(path))
    return shared(absolute(path)) if is_path else path


def counted(results: dict) -> dict:
    """What of a `results_config` tells one run from another, flat: everything but where a file or folder lies whose
    content is compared instead (the prompts, the weights of a model's folder). So a run goes on after its inputs moved.
    """
    flat = flatten(results)
    for name in {"prompts.file", "evaluation.file"} & flat.keys():
        del flat[name]
    for name in {"model", "model.path"} & flat.keys():
        flat[name] = "a folder" if model_place(flat[name]).startswith("/") else flat[name]
    if "input" in flat:  # of a run that began before paths were made absolute
        flat["input"] = absolute(flat["input"])
    return flat


LocalOrUri = Annotated[str, AfterValidator(absolute)]  # the driver alone reads it
SharedPath = Annotated[LocalOrUri, AfterValidator(shared)]  # also for actors and workers, or meant to stay
ModelPath = Annotated[str, AfterValidator(model_place)]


def without_revision(path: str) -> str:
    """A hub id without the revision that it is pinned to; any other model as it is."""
    name, _, revision = path.partition("@")
    return name if revision and name.count("/") == 1 and path[0] != "/" and not Path(path).is_dir() else path


def pinned(path: str, commit: str | None) -> str:
    """A hub id, pinned to a commit, which without_revision takes off; a folder or a shipped name as it is."""
    return f"{without_revision(path)}@{commit}" if commit and not path.startswith("/") else path
