"""How a metric's numbers are shown: as per cent where they are shares, else in the unit that the column declares."""

from mi_ray.alignment.metric import Column

# The model's own number, which the report shows after the metrics' columns and, without a metric, as its headline.
PMI = Column("pmi", "log p(x|y) - log p(x) by the base model", "nats", model="the base model", nullable=True)
_LABELS = {"pmi": "PMI"}


def decimal(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A number with a true minus sign; a dash for None. `sign`: "+" shows that of positive numbers too."""
    return "–" if value is None else f"{value:{sign}.{digits}f}".replace("-", "−")


def is_share(column: Column) -> bool:
    return column.unit in ("share", "yes/no")


def label(column: Column) -> str:
    return _LABELS.get(column.name, column.name.replace("_", " "))


def heading(column: Column) -> str:
    """exact, %; PMI, nats."""
    unit = "%" if is_share(column) else column.unit
    return f"{label(column)}, {unit}" if unit else label(column)


def unit_of_change(column: Column) -> str:
    """What follows a difference, with a space before it: points of per cent, or the unit."""
    unit = "points" if is_share(column) else column.unit
    return f" {unit}" if unit else ""


def scale(column: Column) -> int:
    return 100 if is_share(column) else 1


def _digits(column: Column) -> int:
    """Decimals that tell values of the column's range apart."""
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
    """48.2 ± 3.0, a mean with half its interval; a dash for None."""
    return "–" if result is None else _shown(result["value"], result, column)


def change(result: dict | None, column: Column) -> str:
    """+4.9 ± 2.1, a difference with half its interval; a dash for None."""
    return "–" if result is None else _shown(result["difference"], result, column, "+")


def direction(result: dict | None, column: Column) -> str:
    """better or worse where the interval of a difference is clear of zero, else unclear."""
    if result is None or result["low"] is None or result["low"] <= 0 <= result["high"]:
        return "unclear"
    return "better" if column.sign * result["low"] > 0 else "worse"


def mark(value: float | None, column: Column | None) -> dict | None:
    """What the corner of an image shows: {kind: yes, no or number; text; title}; None where nothing is known."""
    if column is None or value is None:
        return None
    if column.unit == "yes/no":
        kind, text, title = ("yes", "✓", label(column)) if value == 1 else ("no", "✗", f"not {label(column)}")
    else:
        text = decimal(scale(column) * value, _digits(column))
        kind, title = "number", f"{heading(column)}: {text}"
    return {"kind": kind, "text": text, "title": title}


def size(result: dict, columns: list[Column]) -> dict | None:
    """A result that says n_prompts and n_images: the first column's that has one."""
    return next((result[column.name] for column in columns if column.name in result), None)
