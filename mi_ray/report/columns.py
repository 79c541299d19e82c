"""The text of a metric's values: shares in per cent, other values in the unit that the column declares."""

from mi_ray.alignment.metric import Column

# The base model's PMI. The report shows it after the metrics; without a metric it is the headline.
PMI = Column("pmi", "log p(x|y) - log p(x) by the base model", "nats", model="the base model", nullable=True)
SPLITS = {"test": "in distribution", "ood": "out of distribution"}  # of the prompts of the embedded world
_LABELS = {"pmi": "PMI"}


def decimal(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A number with a typographic minus sign; a dash for None. `sign`: "+" also shows the sign of positive numbers."""
    return "–" if value is None else f"{value:{sign}.{digits}f}".replace("-", "−")


def is_share(column: Column) -> bool:
    return column.unit in ("share", "yes/no")


def label(column: Column) -> str:
    return _LABELS.get(column.name, column.name.replace("_", " "))


def group_name(grouping: str, name: str) -> str:
    """The text for a group of prompts: a category has its own name. `grouping`: by_split or by_category."""
    return SPLITS.get(name, name) if grouping == "by_split" else name


def heading(column: Column) -> str:
    """Label and unit: "exact, %" or "PMI, nats"."""
    unit = "%" if is_share(column) else column.unit
    return f"{label(column)}, {unit}" if unit else label(column)


def unit_of_change(column: Column) -> str:
    """The unit of a difference, after a space: points (of per cent) for shares."""
    unit = "points" if is_share(column) else column.unit
    return f" {unit}" if unit else ""


def scale(column: Column) -> int:
    return 100 if is_share(column) else 1


def _digits(column: Column) -> int:
    """Number of decimals that suits the range of the column."""
    if is_share(column) or (column.high or 0) >= 100:
        return 1
    return 3 if column.high is not None and column.high <= 1 else 2


def _shown(value: float, result: dict, column: Column, sign: str = "") -> str:
    digits, times = _digits(column), scale(column)
    text = decimal(times * value, digits, sign)
    if result["low"] is None:
        return text
    return f"{text} ± {times * (result['high'] - result['low']) / 2:.{digits}f}"


def value(result: dict | None, column: Column) -> str:
    """A mean with half the width of its interval, such as 48.2 ± 3.0; a dash for None."""
    return "–" if result is None else _shown(result["value"], result, column)


def change(result: dict | None, column: Column) -> str:
    """A difference with half the width of its interval, such as +4.9 ± 2.1; a dash for None."""
    return "–" if result is None else _shown(result["difference"], result, column, "+")


def direction(result: dict | None, column: Column) -> str:
    """Return better or worse if the interval of a difference does not include zero, otherwise unclear."""
    if result is None or result["low"] is None or result["low"] <= 0 <= result["high"]:
        return "unclear"
    return "better" if column.sign * result["low"] > 0 else "worse"


def mark(value: float | None, column: Column | None) -> dict | None:
    """The mark in the corner of an image: {kind: yes, no or number; text; title}. None if the value is missing."""
    if column is None or value is None:
        return None
    if column.unit == "yes/no":
        kind, text, title = ("yes", "✓", label(column)) if value == 1 else ("no", "✗", f"not {label(column)}")
    else:
        text = decimal(scale(column) * value, _digits(column))
        kind, title = "number", f"{heading(column)}: {text}"
    return {"kind": kind, "text": text, "title": title}


def size(result: dict, columns: list[Column]) -> dict | None:
    """The result of the first column that has one; it contains n_prompts and n_images."""
    return next((result[column.name] for column in columns if column.name in result), None)
