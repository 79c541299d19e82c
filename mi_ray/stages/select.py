"""Selection: the best candidates of each prompt by a score, or by a control (random, oracle)."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mi_ray import storage
from mi_ray.config import ConfigError, RunConfig, SelectConfig


def ranks(columns: dict[str, list], by: str, seed: int) -> list[int]:
    """Rank the candidates of one prompt, 0 the best; ties fall by a hash, never by the order of generation.

    Args:
        columns: of one prompt's candidates: candidate_index, prompt_id, score_<name>, exact, objects, attributes,
            and, of a pruned pool, pruned_after, prune_score.
        by: a score's name, `random` or `oracle` (exact first, then the shares of right objects and attributes). By a
            score, a pruned candidate comes after all that outlasted it, by its score at its cut.
    """
    count = len(columns["candidate_index"])
    lots = [
        hashlib.sha256(f"{seed}/{prompt}/{index}".encode()).digest()
        for prompt, index in zip(columns["prompt_id"], columns["candidate_index"], strict=True)
    ]
    if by == "random":
        worth = [()] * count
    elif by == "oracle":
        worth = list(zip(*(columns[name] for name in ("exact", "objects", "attributes", "relation")), strict=True))
        worth = [tuple(value or 0.0 for value in values) for values in worth]
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


def _finite(value: float | None) -> float:
    """A score, or the worst of all where there is none."""
    return value if value is not None and np.isfinite(value) else -np.inf


def _weights(prompt_ids: pa.ChunkedArray, balance: bool) -> np.ndarray:
    """What each kept candidate weighs in the loss, one on average: (n,) fp32."""
    if not balance:
        return np.ones(len(prompt_ids), np.float32)
    _, of, counts = np.unique(prompt_ids.to_numpy(), return_inverse=True, return_counts=True)
    weights = 1 / counts[of]
    return (weights / weights.mean()).astype(np.float32)


def select(config: RunConfig, candidates: str, destination: str, by: str) -> dict[str, int]:
    """Write what the selection `by` keeps of every prompt in the folder `candidates` to the table `destination`.

    Returns:
        Counts: prompts, kept.

    Raises:
        ConfigError: nothing is kept.
    """
    if storage.exists(destination):
        kept = storage.read_table(destination, ["prompt_id"])
        return {"prompts": len(pc.unique(kept["prompt_id"])), "kept": len(kept)}
    scores = [f"score_{name}" for name in config.score.names]
    measured = ["exact", "objects", "attributes", "relation"]
    wanted = ["prompt_id", "candidate_index", "error", "pruned_after", "prune_score", *measured, *scores]
    table = storage.read_tables(candidates, [*wanted, "prompt", "latents", "latents_shape"])
    table = table.filter(pc.is_null(table["error"]))
    rows = []
    for prompt_id in pc.unique(table["prompt_id"]).to_pylist():
        of_prompt = table.filter(pc.equal(table["prompt_id"], prompt_id))
        columns = of_prompt.select(wanted).to_pydict()
        rows.append(of_prompt.filter(pa.array(keeps(columns, ranks(columns, by, config.seed), by, config.select))))
    kept = pa.concat_tables(rows)
    if not len(kept):
        raise ConfigError([f"select.min_score: no candidate reaches {config.select.min_score} by {by}; lower it"])
    kept = kept.append_column("weight", pa.array(_weights(kept["prompt_id"], config.select.balance)))
    storage.write_table(destination, kept.select(storage.SELECTED.names).cast(storage.SELECTED))
    return {"prompts": len(pc.unique(kept["prompt_id"])), "kept": len(kept)}
