"""The adapter that a run starts from: a user's LoRA or DoRA, kept in the run folder in PEFT's form."""

import tempfile
from pathlib import Path

from peft import LoraConfig

from mi_ray.config import RunConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.adapter_files import CONFIG, WEIGHTS, convert_adapter
from mi_ray.diffusion.folders import load_network_on_meta, pipeline_class
from mi_ray.storage import exists, join, local_folder, read_bytes, write_bytes

_FOLDER = "start"  # in the run folder


def check_start(config: RunConfig):
    """Check the adapter of `finetune.start_from`; reads no weights of the model.

    Raises:
        ConfigError: it is none, or not one of the model.
    """
    if config.finetune.start_from and not exists(join(config.run_dir, _FOLDER, CONFIG)):
        with tempfile.TemporaryDirectory() as folder:
            _convert(config, Path(folder))


def start_adapter(config: RunConfig) -> str | None:
    """URI of the folder of the adapter that the run starts from; None: it starts from the model as it is.

    The first call writes it, so that the run continues after the user's file has changed.
    """
    if not config.finetune.start_from:
        return None
    destination = join(config.run_dir, _FOLDER)
    if not exists(join(destination, CONFIG)):
        with tempfile.TemporaryDirectory() as folder:
            _convert(config, Path(folder))
            for name in (WEIGHTS, CONFIG):  # the second one says that it is complete
                write_bytes(join(destination, name), (Path(folder) / name).read_bytes())
    return destination


def local_start(config: RunConfig) -> str | None:
    """The same folder on this machine's disk, for actors."""
    uri = start_adapter(config)
    return uri and local_folder(uri)


def _convert(config: RunConfig, folder: Path):
    path, place = config.model.path, config.finetune.start_from
    try:
        convert_adapter(_local(place, folder / "download"), folder, pipeline_class(path), load_network_on_meta(path))
    except (ValueError, OSError) as error:
        raise ConfigError([f"finetune.start_from: {error}"]) from error
    if config.finetune.baseline and LoraConfig.from_pretrained(str(folder)).use_dora:
        fault = f"finetune.start_from: {place!r} is a DoRA, and updates of DoRA cannot be subtracted"
        raise ConfigError([f"{fault}: set finetune.baseline: 0"])


def _local(place: str, copy: Path) -> str:
    """A file or folder on this machine's disk."""
    if not place.endswith(".safetensors") or "://" not in place:
        return place if "://" not in place else local_folder(place)
    copy.mkdir()
    file = copy / place.rpartition("/")[2]
    file.write_bytes(read_bytes(place))
    return str(file)
