"""Selection: the best candidates of each prompt by a score, by a metric or at random."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mi_ray import storage
from mi_ray.alignment.metric import Column
from mi_ray.config import RunConfig, SelectConfig
from mi_ray.config.section import ConfigError
from mi_ray.storage import tables


def ranks(columns: dict[str, list], by: str, seed: int, declared: Sequence[Column] = ()) -> list[int]:
    """Rank the candidates of one prompt, 0 the best; ties fall by a hash, never by the order of generation.

    Args:
        columns: of one prompt's candidates: candidate_index, prompt_id, score_<name>, the metrics' columns and, of a
            pruned pool, pruned_after, prune_score.
        by: a score's name, `random` or a metric's name. By a score, a pruned candidate comes after all that outlasted
            it, by its score at its cut.
        declared: where `by` is a metric, its columns: the first decides, the next where the first are equal, each in
            the direction that it declares; no value is the worst.
    """
    count = len(columns["candidate_index"])
    lots = [
        hashlib.sha256(f"{seed}/{prompt}/{index}".encode()).digest()
        for prompt, index in zip(columns["prompt_id"], columns["candidate_index"], strict=True)
    ]
    if by == "random":
        worth = [()] * count
    elif declared:
        deciding = [column for column in declared if column.selects]
        values = [[_finite(value, column.sign) for value in columns[column.name]] for column in deciding]
        worth = list(zip(*values, strict=True))
    else:
        nothing = [None] * count
        cuts = columns.get("pruned_after", nothing), columns.get("prune_score", nothing)
        worth = [
            (np.inf, _finite(score)) if after is None else (after, _finite(at_cut))
            for score, after, at_cut in zip(columns[f"score_{by}"], *cuts, strict=True)
        ]
    order = sorted(range(count), key=lambda i: (tuple(-value for value in worth[i]), lots[i]))
    return np.argsort(order).tolist()


def keeps(columns: dict[str, list], rank: list[int], by: str, config: SelectConfig) -> np.ndarray:
    """Which candidates a selection keeps, (n,) bool: the first top_k that are sound and, by a score, reach min_score.

    A score below min_score leaves a prompt with fewer, or none: a signed score says not only which image is the best
    but whether it is good enough to learn from. The controls know no such bound.
    """
    sound = [error is None for error in columns["error"]]
    kept = (np.array(rank) < config.top_k) & np.array(sound)
    if config.min_score is not None and f"score_{by}" in columns:
        kept &= np.array([_finite(score) >= config.min_score for score in columns[f"score_{by}"]])
    return kept


def _finite(value: float | None, sign: int = 1) -> float:
    """A value times its sign, or the worst of all where there is none."""
    return sign * value if value is not None and np.isfinite(value) else -np.inf


# What ranking and keeping look at; the curves are never read, latents and prompts of the kept rows alone.
_LOOKED_AT = ["prompt_id", "candidate_index", "error", "pruned_after", "prune_score"]


def _kept_of_part(uri: str, config: RunConfig, by: str, declared: Sequence[Column]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the kept rows of a part, and their prompts' ids, both (k,).

    A prompt's candidates all lie in one part, one after the other: a shard is written whole.
    """
    columns = [*_LOOKED_AT, *(c.name for c in declared), *(f"score_{name}" for name in config.score.names)]
    table = storage.read_table(uri, columns)
    rows = np.flatnonzero(pc.is_null(table["error"]).to_numpy())
    table = table.take(rows)
    ids = table["prompt_id"].to_numpy()
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]) if len(ids) else np.empty(0, int)
    kept = np.zeros(len(ids), bool)
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        of_prompt = table.slice(start, stop - start).to_pydict()
        kept[start:stop] = keeps(of_prompt, ranks(of_prompt, by, config.seed, declared), by, config.select)
    return rows[kept], ids[kept]


def _counts(selected: str) -> dict[str, int]:
    """Prompts, each one's rows one after the other, and rows of a table of what was kept."""
    table, prompts, last = storage.ParquetRows(selected), 0, None
    for batch in table.batches(["prompt_id"]):
        ids = np.array([last, *batch["prompt_id"].to_pylist()], object)
        prompts += int((ids[1:] != ids[:-1]).sum())
        last = ids[-1]
    return {"prompts": prompts, "kept": len(table)}


def select(config: RunConfig, candidates: str, destination: str, by: str) -> dict[str, int]:
    """Write what the selection `by` keeps of every prompt in the folder `candidates` to the table `destination`.

    Part by part: in memory are one part's scores or kept latents.

    Returns:
        Counts: prompts, kept.

    Raises:
        ConfigError: nothing is kept.
    """
    if storage.exists(destination):
        return _counts(destination)
    parts = [storage.join(candidates, name) for name in storage.list_tables(candidates)]
    metrics = tables.metric_columns(storage.ParquetRows(parts[0]).schema) if parts else {}
    declared = metrics.get(by, ())
    each = _kept_per_prompt(parts, config, by, declared) if config.select.balance else None
    prompts = total = 0
    with storage.table_writer(destination, tables.SELECTED) as writer:
        for part in parts:
            rows, ids = _kept_of_part(part, config, by, declared)
            if not len(rows):
                continue
            _, of, counts = np.unique(ids, return_inverse=True, return_counts=True)
            prompts, total = prompts + len(counts), total + len(rows)
            # A prompt's rows share the same weight; one on average over the table.
            weights = np.ones(len(rows)) if each is None else each / counts[of]
            columns = [name for name in tables.SELECTED.names if name != "weight"]
            table = storage.read_table(part, columns).take(rows)
            table = table.append_column("weight", pa.array(weights.astype(np.float32)))
            writer.write_table(table.select(tables.SELECTED.names).cast(tables.SELECTED))
        if not total:
            raise ConfigError([f"select.min_score: no candidate reaches {config.select.min_score} by {by}; lower it"])
    return {"prompts": prompts, "kept": total}


def _kept_per_prompt(parts: list[str], config: RunConfig, by: str, declared: Sequence[Column]) -> float:
    """Rows kept of a prompt, on average over those of which any is."""
    prompts = total = 0
    for part in parts:
        rows, ids = _kept_of_part(part, config, by, declared)
        prompts, total = prompts + len(np.unique(ids)), total + len(rows)
    return total / max(1, prompts)
