"""What all metrics with a transformers model share: where the model is found, how it is checked, loaded and named.

This file imports neither torch nor transformers before the first image is measured.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_ray.alignment.metric import Column, Metric, Unusable
from mi_ray.diffusion.hub import files_digest, hub_id

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
EMBEDDED = "shapes"  # name of the judges of the embedded world, which are in the package by their model_type
READERS = {"tokenizer": "AutoTokenizer", "processor": "AutoProcessor", "image processor": "AutoImageProcessor"}
_REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what does not fit is in the report
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP, used by BLIP too


class Model:
    """A transformers model that a metric uses: where it is found, how it is checked, loaded and named.

    Args:
        model: a local folder, owner/name or owner/name@revision of the hub, or shapes: the judge of the embedded world;
            empty: `default`.

    Raises:
        Unusable: there is no such model, its files are incomplete, or it is of another type.
    """

    default: str  # hub id of the model that the metric was published with
    model_class: str  # of transformers
    model_types: tuple[str, ...] = ()  # values of model_type in the model's config.json; empty: any
    template: str | None = None  # text that the model gets for a prompt; None: it reads no text
    reader: str | None = None  # what makes the model's input besides its class, a key of `READERS`; None: nothing
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
        if self.model == EMBEDDED:
            for kind in self.model_types:
                if (folder := Path(str(files("mi_ray") / "shapes" / "judge_weights" / kind))).is_dir():
                    return folder, "", _digest(folder)
        if Path(self.model).is_dir():
            folder = Path(self.model)
            return folder, "", _digest(folder)
        if not (known := hub_id(self.model)):
            raise Unusable(
                f"names the model {self.model!r}, which is neither an existing folder nor a hub id: write"
                " name@FOLDER, name@owner/name or name@owner/name@revision"
            )
        config = self._fetched(known[0], self.config_file, known[1])
        self._check_type(config.parent)
        return config.parent, known[0], config.parent.name

    def _fetched(self, hub_id: str, name: str, revision: str | None = None) -> Path:
        """A file of a hub repository. The name of its folder is the commit; without a network it is the cached one."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(hub_id, name, revision=revision))
        except (OSError, ValueError) as error:
            raise Unusable(
                f"needs the model {hub_id!r}, which cannot be fetched from the hub: check the name and the network, or"
                f" fetch it elsewhere and write name@FOLDER ({reason(error)})"
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

    def check(self):
        """Compare a local folder's weights with the class and the configuration, and load the tokenizer or processor.

        The values of the weights are not loaded. Of a hub model only the tokenizer or processor is fetched.

        Raises:
            Unusable: as `load_reader`; a file is damaged, the configuration describes no model, or some weights would
                be random.
        """
        if not self.hub_id:
            self._check_weights()
        if self.reader:
            self.load_reader()

    def _check_weights(self):
        """Compare safetensors with the class, see `check`."""
        if not (names := _weight_files(self.folder)):
            return
        import torch
        from safetensors import SafetensorError, safe_open

        weights = {}
        for name in names:
            try:
                with safe_open(self.folder / name, framework="pt") as file:
                    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise Unusable(f"cannot read {name} of the model {self.model!r} ({error}): fetch it again") from error
            weights |= {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        config = self._config()
        try:
            kind = self._class()
            kind = kind._model_mapping[type(config)] if hasattr(kind, "_model_mapping") else kind
            place = {"config": config, "state_dict": weights, "device_map": {"": "meta"}}
            report = kind.from_pretrained(None, **place, **_REPORT)[1]
        except Exception as error:  # transformers raises anything on a wrong value
            raise self._wrong_config(error) from error
        self._refuse_lacking(report)

    def _config(self) -> "PretrainedConfig":
        """The configuration of the model.

        Raises:
            Unusable: it is no configuration of transformers.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder)
        except Exception as error:  # as above
            raise self._wrong_config(error) from error

    def _wrong_config(self, error: Exception) -> Unusable:
        return Unusable(
            f"cannot build the model {self.model!r} from its config.json ({reason(error)}): fetch it again, or give"
            " another model"
        )

    def load_reader(self) -> "PreTrainedTokenizerBase | ProcessorMixin | BaseImageProcessor":
        """The tokenizer or the processor of the model.

        Raises:
            Unusable: it is missing or damaged, it has no vocabulary, or a library that it needs is missing.
        """
        import transformers

        try:
            reader = getattr(transformers, READERS[self.reader]).from_pretrained(**self.source)
        except Exception as error:  # transformers and tokenizers raise anything on a wrong file
            mend = "install the missing library" if isinstance(error, ImportError) else "complete its files"
            raise Unusable(f"cannot load the {self.reader} of {self.model!r}: {mend} ({reason(error)})") from error
        # Without its files transformers makes a tokenizer of special tokens only, for which all prompts are the same.
        if self.reader == "tokenizer" and len(reader) <= len(set(reader.all_special_ids)):
            raise Unusable(f"needs a tokenizer, and that of {self.model!r} has no vocabulary: complete its files")
        return reader

    def load(self, dtype: str = "float32") -> "torch.nn.Module":
        """The model on its device, without dropout.

        Raises:
            Unusable: they cannot be read, or do not fit the class: some would be random.
        """
        try:
            model, report = self._class().from_pretrained(**self.source, dtype=dtype, **_REPORT)
        except (ImportError, OSError) as error:
            raise Unusable(f"cannot load the model {self.model!r}: complete its files ({reason(error)})") from error
        self._refuse_lacking(report)
        return model.eval().to(device())

    def _class(self) -> type:
        import transformers

        return getattr(transformers, self.model_class)

    def _refuse_lacking(self, report: Mapping[str, Any]):
        lacking = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
        if lacking:
            raise Unusable(
                f"{self.model!r} lacks {len(lacking)} of the weights of {self.model_class}, such as {lacking[0]}:"
                " give another model"
            )

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


def reason(error: Exception) -> str:
    """The beginning of the text of an error of another library, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _weight_files(folder: Path) -> list[str]:
    """The names of the safetensors of a model in a folder; none if its weights have another form.

    Raises:
        Unusable: the index of the files is damaged.
    """
    if (folder / WEIGHTS[0]).is_file():
        return [WEIGHTS[0]]
    if not (folder / WEIGHTS[1]).is_file():
        return []
    try:
        return sorted(set(json.loads((folder / WEIGHTS[1]).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"cannot read {folder / WEIGHTS[1]} ({error!r}): fetch it again") from error


def _digest(folder: Path) -> str:
    """The digest of all files of a folder, without its subfolders."""
    return files_digest(folder, sorted(path.name for path in folder.iterdir() if path.is_file()))
