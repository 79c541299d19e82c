"""Prompts that a model fails on, with weights: read from a file, or from the evaluation of a run."""

import math
from collections import defaultdict

import pyarrow as pa

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs import text
from mi_ray.inputs.prompts import LONGEST_LINE, read_prompts
from mi_ray.inputs.records import form_of, format_of, read_records
from mi_ray.storage.tables import metric_columns

Focus = dict[str, tuple[float, str | None]]  # prompt -> (weight above 0, category)


def read_focus(uri: str, metric: str | None, below: float) -> Focus:
    """The prompts that fail, with their weights.

    If the table has a column `weight`, a prompt's weight is the sum of it. Otherwise the metric is averaged by prompt,
    and a prompt with an average below `below` has the weight 1 - average. If the file has neither column (as .txt
    always), every prompt has the weight 1.

    Args:
        metric: name of a column; None: the first column of the first metric that a run's tables declare.

    Raises:
        ConfigError: the file cannot be read, or no prompt fails.
    """
    try:
        metric = metric or _declared(uri)
        rows = _rows(uri, metric)
        if rows is None:
            prompts, _ = read_prompts(uri, "focus", duplicates="drop", broken="skip")
            rows = [row | {"weight": 1.0} for row in prompts.select(["prompt", "category"]).to_pylist()]
        focus = _weighted(rows, metric, below)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError([f"focus: {uri!r} {error}"]) from error
    if not focus:
        reason = f"no prompt with a weight above 0 or an average of {metric} below {below:g}"
        raise ConfigError([f"focus: {uri!r} has {reason}; raise focus_below, or remove focus"])
    return focus


def _parts(uri: str) -> list[str]:
    return [uri] if uri.endswith(".parquet") else [storage.join(uri, name) for name in storage.list_tables(uri)]


def _declared(uri: str) -> str:
    """The first column of the first metric that a table or folder of tables declares; empty if there is none."""
    if uri.endswith(".txt") or format_of(uri):
        return ""
    metrics = (metric_columns(storage.ParquetRows(part).schema) for part in _parts(uri)[:1])
    return next((columns[0].name for declared in metrics for columns in declared.values()), "")


def _rows(uri: str, metric: str) -> list[dict] | None:
    """Rows with prompt, category, and weight or the metric; None if the file has neither of the two."""
    if uri.endswith(".txt") or (format_of(uri) and not storage.exists(uri)):  # `read_prompts` tells that it is missing
        return None
    if format_of(uri):
        found = (record.fields for record in read_records(uri, form_of(uri, LONGEST_LINE), LONGEST_LINE))
        rows = [row for row in found if row is not None and isinstance(row.get("prompt"), str)]
        return rows if any({"weight", metric} & row.keys() for row in rows) else None
    folder, parts = not uri.endswith(".parquet"), _parts(uri)
    if not parts:
        raise ValueError(
            "is not a folder of tables; give a .jsonl, .parquet or .txt file, or evaluation/<model> of a run"
        )
    schemas = [storage.ParquetRows(part).schema.names for part in parts]
    wanted = ("prompt", "category", "weight", metric)
    columns = [name for name in wanted if all(name in names for names in schemas)]
    if "prompt" in columns and {"weight", metric} & {*columns}:
        return [row for part in parts for row in storage.read_table(part, columns).to_pylist()]
    if folder:
        lacks = f"has no column {metric!r} among {', '.join(schemas[0])}" if metric else "declares no metric"
        raise ValueError(f"{lacks}; set --focus-metric to one of its columns")
    return None


def _number(value: object) -> object:
    """A number that a CSV file has as text."""
    try:
        return value if not isinstance(value, str) else float(value) if value.strip() else None
    except ValueError:
        return value


def _weighted(rows: list[dict], metric: str, below: float) -> Focus:
    name = "weight" if any("weight" in row for row in rows) else metric
    values, categories = defaultdict(list), {}
    for row in rows:
        value, prompt = _number(row.get(name)), text.clean(row.get("prompt") or "")
        if value is None or not prompt:
            continue
        most = math.inf if name == "weight" else 1
        if isinstance(value, str) or not (0 <= value <= most and value < math.inf):
            asked = "a number from 0" if name == "weight" else "a metric between 0 and 1"
            raise ValueError(
                f"has {name} {text.excerpt(repr(value))} for the prompt {text.excerpt(prompt)!r}; give {asked}"
            )
        values[prompt].append(float(value))
        categories.setdefault(prompt, row.get("category"))
    if name == "weight":
        weights = {prompt: sum(some) for prompt, some in values.items()}
    else:
        averages = {prompt: sum(some) / len(some) for prompt, some in values.items()}
        weights = {prompt: 1 - average for prompt, average in averages.items() if average < below}
    return {prompt: (weight, categories[prompt]) for prompt, weight in weights.items() if weight > 0}
