"""The interface of a metric: the columns that it declares, and a method that measures images. Imports no torch."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

import numpy as np

# The metrics of the package. The name of any other metric is package.module:Class.
METRICS = {
    "oracle": "mi_ray.alignment.oracle:Oracle",
    "clip-score": "mi_ray.alignment.clip_score:ClipScore",
    "clip-cosine": "mi_ray.alignment.clip_cosine:ClipCosine",
    "pick-score": "mi_ray.alignment.pick_score:PickScore",
    "hps-v2.1": "mi_ray.alignment.hps:HpsV21",
    "blip-vqa": "mi_ray.alignment.blip_vqa:BlipVqa",
    "vqa-score": "mi_ray.alignment.vqa_score:VqaScore",
    "soft-tifa": "mi_ray.alignment.soft_tifa:SoftTifa",
    "spatial-proxy": "mi_ray.alignment.spatial_proxy:SpatialProxy",
    "numeracy-proxy": "mi_ray.alignment.numeracy_proxy:NumeracyProxy",
    "3-in-1-proxy": "mi_ray.alignment.three_in_one_proxy:ThreeInOneProxy",
    "geneval-port": "mi_ray.alignment.geneval_port:GenEvalPort",
}
SHOWN_PROMPTS = 3  # number of prompts in a message


@dataclass(frozen=True)
class Column:
    """A number that a metric computes for every image. All fields are stored as Arrow metadata of the table column."""

    name: str  # name of the tables' column, an identifier
    meaning: str
    unit: str = ""  # "share": in [0, 1], shown as per cent; "yes/no": 1 or 0, a mean is shown as per cent
    low: float | None = None  # lower end of the range; None: no lower end
    high: float | None = None  # upper end of the range; None: no upper end
    higher_is_better: bool = True
    model: str | None = None  # model that computes the number, a folder or hub id; None: no model
    revision: str | None = None  # revision of this model
    nullable: bool = False  # whether an image may have no value
    selects: bool = True  # whether selection by the metric uses this column
    template: str | None = None  # text that the model gets, with {} for the prompt or a part of it; None: no text
    library: str | None = None  # library that runs the model, with its version

    @property
    def sign(self) -> int:
        """Factor that makes higher values better: 1 or -1."""
        return 1 if self.higher_is_better else -1

    def as_metadata(self) -> dict[str, str]:
        """All fields except the name, as texts. The meaning is called `description`, as for every column."""
        declared = asdict(self)
        declared["description"] = declared.pop("meaning")
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in declared.items()}
        return {key: text for key, text in texts.items() if key != "name" and declared[key] is not None}

    @classmethod
    def from_metadata(cls, name: str, texts: Mapping[str, str]) -> "Column":
        """The inverse of `as_metadata`."""
        texts = {**texts, "name": name, "meaning": texts["description"]}
        kinds = {field.name: field.type for field in fields(cls) if field.name in texts}
        read = {key: texts[key] if kind in (str, str | None) else json.loads(texts[key]) for key, kind in kinds.items()}
        return cls(**read)


class Unusable(ValueError):
    """A metric cannot work: its model or its file is missing or wrong. The text follows the metric's name."""


class Metric(ABC):
    """Measures images against their prompts. A subclass declares `columns` and implements `measure`.

    It is created in the driver and once in every actor: without arguments, or with the text after @ in its name. The
    constructor raises `Unusable` if it cannot work with this text. If the metric needs a GPU or slow work, such
    as loading weights, it does this in the first call of `measure`.
    """

    columns: tuple[Column, ...]  # the first is the primary one: headline, AUC and calibration use it
    reads_only: str = ""  # the prompts that it can read, for the message that refuses others
    reads_all: bool = True  # False: a prompt that it cannot read has no value; it must read at least one prompt
    image_size: tuple[int, int] | None = None  # (height, width) of the images that it can read; None: any size
    # Real images for the quality measures, if they exist: (prompt, seed) -> (h, w, 3) uint8.
    reference: Callable[[str, int], np.ndarray] | None = None

    def check(self):  # noqa: B027
        """Check in the driver, before a run starts, what takes too long for the constructor, such as weights.

        Raises:
            Unusable: the metric cannot work.
        """

    def reads(self, prompt: str) -> bool:
        """Whether the metric can read a prompt. A run with a prompt that it cannot read is refused at the start, or
        without `reads_all`, a run with no prompt that it can read. `details_of(prompt)` has the prompt's columns."""
        return True

    @abstractmethod
    def measure(self, images: np.ndarray, prompts: list[str]) -> Mapping[str, Sequence[float | None]]:
        """Measure images (n, h, w, 3) uint8 against their n prompts: {column: n values}. None means no value."""


def load_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Load metrics: {name in the configuration: metric}.

    Raises:
        ValueError: with one line per fault: a name is not a metric, or two metrics declare the same column.
    """
    metrics, faults, owners = {}, [], {}
    for name in names:
        try:
            metrics[name] = _load_metric(name)
        except ValueError as error:
            faults.append(str(error))
            continue
        faults += [
            f"{owners[column.name]!r} and {name!r} both declare the column {column.name!r}: remove one of them, or"
            " rename the column in yours"
            for column in metrics[name].columns
            if owners.setdefault(column.name, name) != name
        ]
    if faults:
        raise ValueError("\n".join(faults))
    return metrics


def _load_metric(name: str) -> Metric:
    known, _, argument = name.partition("@")
    module, _, attribute = METRICS.get(known, known).partition(":")
    if not module or not attribute:
        raise ValueError(
            f"{name!r} is not a metric: use one of {', '.join(METRICS)}, or your own as package.module:Class"
        )
    try:
        metric_class = getattr(import_module(module), attribute)
        metric = metric_class(argument) if argument else metric_class()
    except Unusable as error:
        raise ValueError(f"{name!r} {error}") from error
    except Exception as error:  # the user's module may raise anything
        takes = "that takes the text after @" if argument else "without arguments"
        raise ValueError(
            f"{name!r} cannot be loaded ({type(error).__name__}: {error}): it must be a class {takes}, in a module that"
            " can be imported here and on every node: install it there, or set PYTHONPATH to its folder"
        ) from error
    columns = getattr(metric, "columns", ())
    sound = isinstance(metric, Metric) and columns and all(isinstance(column, Column) for column in columns)
    if not sound or not any(c.selects for c in columns) or not all(c.name.isidentifier() for c in columns):
        raise ValueError(
            f"{name!r} is not a valid metric: derive its class from mi_ray.alignment.metric.Metric and declare"
            " `columns`: names are identifiers, and at least one Column has selects=True"
        )
    return metric


def columns_of(metrics: Mapping[str, Metric]) -> dict[str, tuple[Column, ...]]:
    """{name: columns} of metrics, for the schemas of the tables."""
    return {name: tuple(metric.columns) for name, metric in metrics.items()}


def reference_of(metrics: Mapping[str, Metric]) -> Callable[[str, int], np.ndarray] | None:
    """The source of real images for the quality measures: that of the first metric with one. None if there is none."""
    return next((metric.reference for metric in metrics.values() if metric.reference is not None), None)


def check_prompts(metrics: Mapping[str, Metric], prompts: Iterable[str]):
    """Check every metric, and that it can read every prompt, or without `reads_all` at least one.

    Raises:
        ValueError: with one line for each metric that cannot work, or else for each that cannot read the prompts, with
            the first of them.
    """
    faults = []
    for name, metric in metrics.items():
        try:
            metric.check()
        except Unusable as error:
            faults.append(f"{name!r} {error}")
    if faults:
        raise ValueError("\n".join(faults))
    counts, shown, total = Counter(), {name: [] for name in metrics}, 0
    for prompt in prompts:
        total += 1
        for name, metric in metrics.items():
            if not metric.reads(prompt):
                counts[name] += 1
                if len(shown[name]) < SHOWN_PROMPTS:
                    shown[name].append(repr(prompt))
    faults = [
        f"the {name} reads only {metrics[name].reads_only or 'some prompts'}, not {', '.join(shown[name])}"
        f" ({count} of {total}); {'set it to none' if len(metrics) == 1 else f'remove {name}'} for your own prompts"
        for name, count in counts.items()
        if metrics[name].reads_all or count == total
    ]
    if faults:
        raise ValueError("\n".join(faults))


def details_of(prompt: str) -> Mapping[str, Any]:
    """What the file of a prompt says about it: {column: value}, such as its questions. Empty for a plain text."""
    return getattr(prompt, "details", {})


def check_image_size(metrics: Mapping[str, Metric], size: tuple[int, int]):
    """Check that every metric can read images of this (height, width).

    Raises:
        ValueError: with one line for each metric that cannot.
    """
    faults = [
        f"the {name} reads only images of {metric.image_size[0]} x {metric.image_size[1]} pixels, but the model makes"
        f" {size[0]} x {size[1]}: remove {name}, or remove model.height and model.width"
        for name, metric in metrics.items()
        if metric.image_size not in (None, tuple(size))
    ]
    if faults:
        raise ValueError("\n".join(faults))


def _single(value: float) -> float:
    return float(np.float32(value))


def measure(
    metrics: Mapping[str, Metric], images: np.ndarray | Sequence[np.ndarray], prompts: list[str]
) -> dict[str, list[float | None]]:
    """All columns of all metrics, for images (n, h, w, 3) uint8 and their prompts. None means no value.

    Values are rounded to fp32, as in the tables, so that a selection has the same ties before and after storage.

    Raises:
        ValueError: a metric returns wrong columns, a wrong number of values, or None in a column that is not nullable.
    """
    found: dict[str, list[float | None]] = {}
    for name, metric in metrics.items():
        given = metric.measure(np.stack(images), prompts) if prompts else {c.name: () for c in metric.columns}
        declared = [column.name for column in metric.columns]
        if set(given) != set(declared):
            raise ValueError(f"{name!r} returned the columns {sorted(given)}, but it declares {sorted(declared)}")
        for column in metric.columns:
            values = [None if value is None or value != value else _single(value) for value in given[column.name]]
            if len(values) != len(prompts):
                raise ValueError(f"{name!r} returned {len(values)} values of {column.name!r} for {len(prompts)} images")
            if None in values and not column.nullable:
                raise ValueError(
                    f"{name!r} returned None in the column {column.name!r}, which is not declared nullable"
                )
            found[column.name] = values
    return found
