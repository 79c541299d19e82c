"""What a metric is: the columns that it declares, and a scorer of images and their prompts. Imports no torch."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module

import numpy as np

# The metrics that are part of the package; any other is named package.module:Class.
METRICS = {"oracle": "mi_ray.alignment.oracle:Oracle"}
SHOWN_PROMPTS = 3  # in a message


@dataclass(frozen=True)
class Column:
    """One number that a metric gives to every image. All of it is stored in the Arrow metadata of the tables' field."""

    name: str  # of the tables' column: an identifier
    meaning: str
    unit: str = ""  # "share": in [0, 1], shown as per cent; "yes/no": 1 or 0, means are shown as the share of yes
    low: float | None = None  # ends of the range; None: open
    high: float | None = None
    higher_is_better: bool = True
    model: str | None = None  # that made the number, a folder or hub id; None: no model
    revision: str | None = None  # of that model
    nullable: bool = False  # whether some images have no value
    selects: bool = True  # whether selection by the metric looks at this column

    @property
    def sign(self) -> int:
        """What a value is multiplied with, so that higher is better."""
        return 1 if self.higher_is_better else -1

    def as_metadata(self) -> dict[str, str]:
        """Everything but the name as texts; the meaning is called `description`, as of every column."""
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


class Metric(ABC):
    """Measures images against their prompts. A subclass declares `columns` and writes `measure`.

    It is made without arguments, in the driver and once in every actor: what takes long or needs a GPU, such as a
    model's weights, it loads at the first call of `measure`.
    """

    columns: tuple[Column, ...]  # the first is the primary one: headline, AUC and calibration go by it
    reads_only: str = ""  # which prompts it can read, for the message that refuses others
    # Real images for the quality measures, where the metric's world has them: (prompt, seed) -> (h, w, 3) uint8.
    reference: Callable[[str, int], np.ndarray] | None = None

    def reads(self, prompt: str) -> bool:
        """Whether the metric can read a prompt; a run with one that it cannot read is refused before it starts."""
        return True

    @abstractmethod
    def measure(self, images: np.ndarray, prompts: list[str]) -> Mapping[str, Sequence[float | None]]:
        """Measure images (n, h, w, 3) uint8 against their n prompts: {column: n values}, None where there is none."""


def load_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics by the names that the configuration gives them.

    Raises:
        ValueError: with one line a fault: a name leads to no metric, or two metrics declare the same column.
    """
    metrics, faults, owners = {}, [], {}
    for name in names:
        try:
            metrics[name] = _load_metric(name)
        except ValueError as error:
            faults.append(str(error))
            continue
        faults += [
            f"{owners[column.name]!r} and {name!r} both declare the column {column.name!r}: take one of them out, or"
            " rename the column in yours"
            for column in metrics[name].columns
            if owners.setdefault(column.name, name) != name
        ]
    if faults:
        raise ValueError("\n".join(faults))
    return metrics


def _load_metric(name: str) -> Metric:
    module, _, attribute = METRICS.get(name, name).partition(":")
    if not module or not attribute:
        known = ", ".join(METRICS)
        raise ValueError(f"{name!r} is no metric: give one of {known}, or your own as package.module:Class")
    try:
        metric = getattr(import_module(module), attribute)()
    except Exception as error:  # anything that the user's module does
        raise ValueError(
            f"{name!r} cannot be loaded ({type(error).__name__}: {error}): it must be a class without arguments in a"
            " module that can be imported here and on every node: install it there, or set PYTHONPATH to its folder"
        ) from error
    columns = getattr(metric, "columns", ())
    sound = isinstance(metric, Metric) and columns and all(isinstance(column, Column) for column in columns)
    if not sound or not any(c.selects for c in columns) or not all(c.name.isidentifier() for c in columns):
        raise ValueError(
            f"{name!r} is no metric: derive its class from mi_ray.alignment.metric.Metric and declare `columns`, one"
            " Column at least that selects, with names that are identifiers"
        )
    return metric


def columns_of(metrics: Mapping[str, Metric]) -> dict[str, tuple[Column, ...]]:
    """What each metric declares, as the schemas take it."""
    return {name: tuple(metric.columns) for name, metric in metrics.items()}


def reference_of(metrics: Mapping[str, Metric]) -> Callable[[str, int], np.ndarray] | None:
    """What gives real images for the quality measures, of the first metric that can; None: there are none."""
    return next((metric.reference for metric in metrics.values() if metric.reference is not None), None)


def check_prompts(metrics: Mapping[str, Metric], prompts: Iterable[str]):
    """See that every metric can read every prompt.

    Raises:
        ValueError: with one line for each metric that cannot, and the first prompts that it cannot read.
    """
    counts, shown, total = Counter(), {name: [] for name in metrics}, 0
    for prompt in prompts:
        total += 1
        for name, metric in metrics.items():
            if not metric.reads(prompt):
                counts[name] += 1
                if len(shown[name]) < SHOWN_PROMPTS:
                    shown[name].append(repr(prompt))
    if counts:
        raise ValueError(
            "\n".join(
                f"the {name} reads only {metrics[name].reads_only or 'some prompts'}, not {', '.join(shown[name])}"
                f" ({count} of {total}); {'set it to none' if len(metrics) == 1 else f'take {name} out'} for your own"
                " prompts"
                for name, count in counts.items()
            )
        )


def _single(value: float) -> float:
    return float(np.float32(value))


def measure(
    metrics: Mapping[str, Metric], images: np.ndarray | Sequence[np.ndarray], prompts: list[str]
) -> dict[str, list[float | None]]:
    """All columns of all metrics, of images (n, h, w, 3) uint8 and their prompts; None where there is no value.

    Values are rounded to fp32, as the tables store them, so that a selection sees the same ties before and after.

    Raises:
        ValueError: a metric returns other columns, more or fewer values than it should, or none where it declares one.
    """
    found: dict[str, list[float | None]] = {}
    for name, metric in metrics.items():
        given = metric.measure(np.stack(images), prompts) if prompts else {c.name: () for c in metric.columns}
        declared = [column.name for column in metric.columns]
        if set(given) != set(declared):
            raise ValueError(f"{name!r} returned the columns {sorted(given)} and declares {sorted(declared)}")
        for column in metric.columns:
            values = [None if value is None or value != value else _single(value) for value in given[column.name]]
            if len(values) != len(prompts):
                raise ValueError(f"{name!r} returned {len(values)} values of {column.name!r} for {len(prompts)} images")
            if None in values and not column.nullable:
                raise ValueError(f"{name!r} returned no value of {column.name!r}, which it does not declare nullable")
            found[column.name] = values
    return found
