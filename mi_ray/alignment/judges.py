"""What all metrics with a transformers model share: where the model is found, how it is checked, loaded and named.

This file imports neither torch nor transformers before the first image is measured.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mi_ray.alignment.metric import Column, Metric, Unusable

if TYPE_CHECKING:
    import torch

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")  # and a branch, a tag or a commit
_PIECES, _PIECE = 64, 4096  # of a file, evenly from its beginning to its end, and bytes of each
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP, used by BLIP too


class Model:
    """A transformers model that a metric uses: where it is found, how it is checked, loaded and named.

    Args:
        model: a local folder, or owner/name or owner/name@revision of the hub; empty: `default`.

    Raises:
        Unusable: there is no such model, its files are incomplete, or it is of another type.
    """

    default: str  # hub id of the model that the metric was published with
    model_types: tuple[str, ...] = ()  # values of model_type in the model's config.json; empty: any
    template: str | None = None  # text that the model gets for a prompt; None: it reads no text
    weights: tuple[str, ...] = WEIGHTS  # names of files; the model has one of them
    config_file: str = "config.json"  # file of the hub repository that names the commit
    batch_size = 32  # images that the model reads at once

    def __init__(self, model: str = ""):
        self.model = model or self.default
        self.folder, self.hub_id, self.revision = self._find()
        if not self.hub_id:
            self._check(self.folder)

    def _find(self) -> tuple[Path, str, str]:
        """The local folder (of a hub model: with its configuration only), the hub id or "", and the revision."""
        if Path(self.model).is_dir():
            folder = Path(self.model)
            return folder, "", _digest(folder)
        if not (known := _HUB_ID.fullmatch(self.model)):
            raise Unusable(
                f"names the model {self.model!r}, which is neither an existing folder nor a hub id: write"
                " name@FOLDER, name@owner/name or name@owner/name@revision"
            )
        config = self._fetched(known[1], self.config_file, known[2])
        self._check_type(config.parent)
        return config.parent, known[1], config.parent.name

    def _fetched(self, hub_id: str, name: str, revision: str | None = None) -> Path:
        """A file of a hub repository. The name of its folder is the commit; without a network it is the cached one."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(hub_id, name, revision=revision))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise Unusable(
                f"needs the model {hub_id!r}, which cannot be had from the hub: check the name and the network, or"
                f" fetch it elsewhere and write name@FOLDER ({reason})"
            ) from error

    def _check(self, folder: Path):
        """Check a local folder without loading the model."""
        self._check_type(folder)
        if not any((folder / name).is_file() for name in self.weights):
            raise Unusable(f"needs weights, and {self.model!r} has none of {', '.join(self.weights)}: complete it")

    def _check_type(self, folder: Path):
        if not self.model_types:
            return
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise Unusable(
                f"cannot read config.json of the model {self.model!r} ({error}): give a folder that save_pretrained of"
                " transformers wrote"
            ) from error
        if found not in self.model_types:
            raise Unusable(
                f"needs a model of type {' or '.join(self.model_types)}, but {self.model!r} is a {found}: give another"
            )

    @property
    def source(self) -> dict[str, str]:
        """The model in the form of the arguments of from_pretrained. A hub model is pinned to the commit checked."""
        place = self.hub_id or str(self.folder)
        return {"pretrained_model_name_or_path": place} | ({"revision": self.revision} if self.hub_id else {})

    def load(self, model_class: type, dtype: str = "float32") -> "torch.nn.Module":
        """The model on its device, without dropout.

        Raises:
            Unusable: its weights do not fit its class: some would be random.
        """
        model, report = model_class.from_pretrained(**self.source, dtype=dtype, output_loading_info=True)
        lacking = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
        if lacking:
            raise Unusable(
                f"{self.model!r} lacks {len(lacking)} of the weights of {model_class.__name__}, such as {lacking[0]}:"
                " give another model"
            )
        return model.eval().to(device())

    def batches(self, count: int) -> Iterator[slice]:
        """Slices of at most `batch_size` that cover `count` rows."""
        yield from (slice(start, start + self.batch_size) for start in range(0, count, self.batch_size))


class Judge(Model, Metric):
    """A metric that a transformers model computes. Its columns carry the model, revision, template and library.

    A subclass declares the fields of `Model` and `declared`, and implements `measure`. It loads its model with `load`.
    """

    declared: tuple[Column, ...]  # the columns without their model

    def __init__(self, model: str = ""):
        super().__init__(model)
        self.columns = tuple(described(column, self) for column in self.declared)


def several(argument: str, count: int) -> list[str]:
    """The models of a metric that has `count` of them, from the text after @: A+B+C. Empty: the default one.

    Raises:
        Unusable: there are more.
    """
    models = argument.split("+")
    if len(models) > count:
        raise Unusable(f"takes {count} models, but {argument!r} names {len(models)}: write at most {count}, A+B")
    return models + [""] * (count - len(models))


def described(column: Column, *models: Model) -> Column:
    """A column with the model, revision and template of each of its models, and the version of transformers."""
    known = {
        key: "; ".join(filter(None, (getattr(model, key) for model in models))) or None
        for key in ("model", "revision", "template")
    }
    return replace(column, **known, library=f"transformers {version('transformers')}")


def device() -> str:
    """The device of all judges in this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def normalised(
    images: list[np.ndarray], mean: tuple[float, ...] = _MEAN, std: tuple[float, ...] = _STD
) -> "torch.Tensor":
    """Images (h, w, 3) uint8 as the input of a model, by default of CLIP and BLIP: (n, 3, h, w) fp32."""
    import torch

    scaled = (np.stack(images).astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).to(device())


def resized(image: np.ndarray, height: int, width: int, how: str = "bicubic") -> np.ndarray:
    """An image (h, w, 3) uint8 at another size, bicubic or bilinear, with antialiasing."""
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[how.upper()]))


def fitted_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """The (height, width) with the short side `short`, or less if the long side would be longer than `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return round(height * scale), round(width * scale)


def cropped(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of an image whose short side is resized to `size`: (h, w, 3) uint8 to (size, size, 3)."""
    height, width = (int(size * side / min(image.shape[:2])) for side in image.shape[:2])
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized(image, height, width)[top : top + size, left : left + size]


def padded(image: np.ndarray, size: int) -> np.ndarray:
    """An image whose long side is resized to `size`, centred on black: (h, w, 3) uint8 to (size, size, 3)."""
    height, width = (round(size / max(image.shape[:2]) * side) for side in image.shape[:2])
    square = np.zeros((size, size, 3), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = resized(image, height, width)
    return square


def _digest(folder: Path) -> str:
    """16 digits over the names and sizes of all files of a folder and some of their bytes: fast for gigabytes too."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size}\n".encode())
            for piece in range(_PIECES):
                file.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
