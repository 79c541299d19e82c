"""Selection: keep the best candidates of each prompt, by a score, by a metric or at random."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mi_ray import storage
from mi_ray.alignment.metric import Column
from mi_ray.config import RunConfig, SelectConfig
from mi_ray.config.section import ConfigError
from mi_ray.storage import tables


def ranks(columns: dict[str, list], by: str, seed: int, declared: Sequence[Column] = ()) -> list[int]:
    """Rank the candidates of one prompt, 0 is the best. A hash breaks ties, never the order of generation.

    Candidates with an error rank last. So the order of the others is the same with and without them.

    Args:
        columns: of the candidates of one prompt: candidate_index, prompt_id, score_<name>, the columns of the metrics,
            pruned_after and prune_score for a pruned pool, and error if it is known.
        by: name of a score or a metric, or `random`. If it is a score, a pruned candidate ranks after all candidates
            that were pruned later or not at all. Candidates of the same cut are ranked by their score at that cut.
        declared: the columns of the metric, if `by` is a metric. The first column decides; the next column breaks ties,
            and so on. Each column is used in its declared direction. A missing value is the worst.
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
    failed = [error is not None for error in columns.get("error", [None] * count)]
    order = sorted(range(count), key=lambda i: (failed[i], tuple(-value for value in worth[i]), lots[i]))
    return np.argsort(order).tolist()


def keeps(columns: dict[str, list], rank: list[int], by: str, config: SelectConfig) -> np.ndarray:
    """Which candidates a selection keeps, (n,) bool: ranks below top_k without an error and with at least min_score.

    With min_score a prompt can keep fewer than top_k candidates, or none: a signed score tells not only which image is
    best, but also whether it is good enough for training. min_score applies only to selection by a score, not to the
    controls.
    """
    sound = [error is None for error in columns["error"]]
    kept = (np.array(rank) < config.top_k) & np.array(sound)
    if config.min_score is not None and f"score_{by}" in columns:
        kept &= np.array([_finite(score) >= config.min_score for score in columns[f"score_{by}"]])
    return kept


def _finite(value: float | None, sign: int = 1) -> float:
    """A value times its sign; minus infinity, the worst value, if it is missing or not finite."""
    return sign * value if value is not None and np.isfinite(value) else -np.inf


# The columns that decide the selection. Curves are never read, and latents only of the kept candidates.
_COLUMNS_READ = ["prompt_id", "candidate_index", "error", "pruned_after", "prune_score"]


def _kept_of_part(uri: str, config: RunConfig, by: str, declared: Sequence[Column]) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and prompt ids of the kept rows of a part, both (k,).

    All candidates of a prompt are in one part, in consecutive rows: a shard is written as a whole. A pruned candidate
    is never kept, also if a candidate that ranks before it has an error: generation did not store its latents.
    """
    columns = [*_COLUMNS_READ, *(c.name for c in declared), *(f"score_{name}" for name in config.score.names)]
    table = storage.read_table(uri, columns)
    rows = np.flatnonzero(pc.is_null(table["error"]).to_numpy())
    table = table.take(rows)
    ids = table["prompt_id"].to_numpy()
    ends = np.flatnonzero(np.r_[ids[1:] != ids[:-1], True]) + 1 if len(ids) else []  # none: all candidates failed
    kept = np.zeros(len(ids), bool)
    for start, stop in pairwise([0, *ends]):
        of_prompt = table.slice(start, stop - start).to_pydict()
        kept[start:stop] = keeps(of_prompt, ranks(of_prompt, by, config.seed, declared), by, config.select)
    kept &= pc.is_null(table["pruned_after"]).to_numpy()
    return rows[kept], ids[kept]


def _counts(selected: str) -> dict[str, int]:
    """Numbers of prompts and rows of a table of kept candidates. The rows of a prompt are consecutive."""
    table, prompts, last = storage.ParquetRows(selected), 0, None
    for batch in table.batches(["prompt_id"]):
        ids = np.array([last, *batch["prompt_id"].to_pylist()], object)
        prompts += int((ids[1:] != ids[:-1]).sum())
        last = ids[-1]
    return {"prompts": prompts, "kept": len(table)}


def select(config: RunConfig, candidates: str, destination: str, by: str) -> dict[str, int]:
    """Write the kept candidates of every prompt to the table `destination`.

    The parts are processed one by one. Memory holds the scores or the kept latents of one part.

    Args:
        candidates: folder of the tables of candidates.
        by: name of a score or a metric, or `random`.

    Returns:
        Counts: prompts, kept.

    Raises:
        ConfigError: no candidate is kept.
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
            # All rows of a prompt have the same weight. The mean weight over the table is 1.
            weights = np.ones(len(rows)) if each is None else each / counts[of]
            columns = [name for name in tables.SELECTED.names if name != "weight"]
            table = storage.read_table(part, columns).take(rows)
            table = table.append_column("weight", pa.array(weights.astype(np.float32)))
            writer.write_table(table.select(tables.SELECTED.names).cast(tables.SELECTED))
        if not total:
            raise ConfigError([_nothing_kept(parts, config, by)])
    return {"prompts": prompts, "kept": total}


def _nothing_kept(parts: list[str], config: RunConfig, by: str) -> str:
    """The error message of a selection that keeps nothing."""
    errors = Counter(error for part in parts for error in storage.read_table(part, ["error"])["error"].to_pylist())
    if None in errors:
        return f"select.min_score: no candidate has a score {by} of {config.select.min_score} or more; lower it"
    most, _ = errors.most_common(1)[0]
    return f"run_dir: every candidate has an error, most often {most!r}; remove its cause and use another --run-dir"


def _kept_per_prompt(parts: list[str], config: RunConfig, by: str, declared: Sequence[Column]) -> float:
    """Mean number of kept rows per prompt, over the prompts with at least one kept row."""
    prompts = total = 0
    for part in parts:
        rows, ids = _kept_of_part(part, config, by, declared)
        prompts, total = prompts + len(np.unique(ids)), total + len(rows)
    return total / max(1, prompts)
