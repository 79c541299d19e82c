"""The adapter that a run starts from: a user's LoRA or DoRA, kept in the run folder in PEFT's form."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mi_ray.config import RunConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.adapter_files import CONFIG, WEIGHTS, convert_adapter
from mi_ray.diffusion.folders import load_network_on_meta, pipeline_class
from mi_ray.storage import exists, join, local_folder, read_bytes, write_bytes

_FOLDER = "start"  # in the run folder


def check_start(config: RunConfig):
    """Check the adapter of `finetune.start_from`; reads no weights of the model, and writes nothing in the run folder.

    Raises:
        ConfigError: it is none, or not one of the model, or a DoRA, which other settings do not allow.
    """
    if not config.finetune.start_from:
        return
    kept = join(config.run_dir, _FOLDER, CONFIG)
    if exists(kept):
        return _check_kind(config, read_bytes(kept))
    with _converted(config):
        pass


def start_adapter(config: RunConfig) -> str | None:
    """URI of the folder of the adapter that the run starts from; None: it starts from the model as it is.

    The first call writes it, so that the run continues after the user's file has changed.

    Raises:
        ConfigError: as `check_start`.
    """
    if not config.finetune.start_from:
        return None
    destination = join(config.run_dir, _FOLDER)
    if not exists(join(destination, CONFIG)):
        with _converted(config) as folder:
            for name in (WEIGHTS, CONFIG):  # the second one says that it is complete
                write_bytes(join(destination, name), (folder / name).read_bytes())
    return destination


def local_start(config: RunConfig) -> str | None:
    """The same folder on this machine's disk, for actors."""
    uri = start_adapter(config)
    return uri and local_folder(uri)


@contextmanager
def _converted(config: RunConfig) -> Iterator[Path]:
    """Context with a temporary folder that has the adapter in PEFT's form.

    Raises:
        ConfigError: as `check_start`.
    """
    path, place = config.model.path, config.finetune.start_from
    with tempfile.TemporaryDirectory(prefix="mi_ray-") as folder, tempfile.TemporaryDirectory() as copy:
        try:
            convert_adapter(_local(place, Path(copy)), Path(folder), pipeline_class(path), load_network_on_meta(path))
        except (ValueError, OSError) as error:
            raise ConfigError([f"finetune.start_from: {error}"]) from error
        _check_kind(config, (Path(folder) / CONFIG).read_bytes())
        yield Path(folder)


def _check_kind(config: RunConfig, settings: bytes):
    """
    Args:
        settings: adapter_config.json of the adapter.

    Raises:
        ConfigError: with one message for each setting that a DoRA does not allow.
    """
    if not json.loads(settings).get("use_dora"):
        return
    tuning, faults = config.finetune, []
    it = f"finetune.start_from: {tuning.start_from!r} is a DoRA"
    if tuning.baseline:
        faults.append(f"{it}, and updates of DoRA cannot be subtracted: set finetune.baseline: 0")
    for option, value in (("model.quantize", config.model.quantize), ("finetune.shard", tuning.shard)):
        if value:
            faults.append(
                f"{it}, which needs the whole weights, but {option} is {value}: set {option} to none, or start from a"
                " LoRA"
            )
    if faults:
        raise ConfigError(faults)


def _local(place: str, copy: Path) -> str:
    """A file or folder on this machine's disk."""
    if not place.endswith(".safetensors") or "://" not in place:
        return place if "://" not in place else local_folder(place)
    file = copy / place.rpartition("/")[2]
    file.write_bytes(read_bytes(place))
    return str(file)
