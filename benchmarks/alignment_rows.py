"""The rows of the table of benchmarks/alignment.py."""

import numpy as np
import pandas as pd
from alignment_methods import Arm, training_cost

from mi_ray.alignment.metric import Column
from mi_ray.report.columns import PMI, scale
from mi_ray.report.guidance import SCALE
from mi_ray.report.statistics import cosine_diversity, diversity, kernel_distance, paired_difference, prompt_mean


def table_rows(
    frames: dict[Arm, pd.DataFrame],
    base: Arm,
    gammas: dict[Arm, float],
    column: Column,
    real: np.ndarray | None,
    named_encoder: bool,
) -> list[dict]:
    """One row for each method and guidance scale, over all its training seeds: means, paired differences to the base
    model, cost, quality and diversity. Means and differences of shares are in per cent.

    Args:
        frames: the images of each arm, one row per image.
        base: the arm that the others are compared with.
        gammas: effective guidance of the arms at the scale of the comparison.
        column: the headline.
        real: features of real images; None: the kernel distance is measured to the images of `base`.
        named_encoder: the features are those of `evaluation.encoder`, not of the model's autoencoder.
    """
    groups: dict[str, list[Arm]] = {}
    for arm in frames:  # the arms of a row differ in the training seed only
        groups.setdefault(f"{arm.name} at {arm.settings.guidance_scale:g}", []).append(arm)
    rows = []
    for name, arms in groups.items():
        row = _row(name, arms, frames, base, column)
        row["gamma"] = float(np.mean([gammas[arm] for arm in arms])) if arms[0] in gammas else None
        rows.append(row | _quality([frames[arm] for arm in arms], frames[base], real, named_encoder))
    return rows


def _row(name: str, arms: list[Arm], frames: dict[Arm, pd.DataFrame], base: Arm, column: Column) -> dict:
    images, reference, times = pd.concat([frames[arm] for arm in arms]), frames[base], scale(column)
    seeds = [arm.seed for arm in arms if arm.seed is not None]
    row = {"method": name, "settings": arms[0].variant, SCALE: arms[0].settings.guidance_scale}
    row |= {"training_seeds": len(seeds)}
    costs = [training_cost(arm.run_dir) for arm in arms if arm.run_dir]
    row |= {name: _mean([cost[name] for cost in costs]) for name in (costs[0] if costs else ())}
    row |= {"evaluations": images["evaluations"].mean(), "seconds": images["seconds"].mean()}
    row[column.name] = times * prompt_mean(images, column.name)["value"]
    groups = {"gain": images} | {f"gain_{k}": f for key in ("split", "category") for k, f in images.groupby(key)}
    for label, some in groups.items() if arms[0] != base else ():
        if found := paired_difference(some, reference, column.name):
            half = None if found["high"] is None else times * (found["high"] - found["low"]) / 2
            row |= {label: times * found["difference"], f"{label}_half": half}
    if len(seeds) > 1:  # the gain of each training
        each = [paired_difference(frames[arm], reference, column.name)["difference"] for arm in arms]
        row |= {"lowest_gain_of_a_seed": times * min(each), "highest_gain_of_a_seed": times * max(each)}
    row[PMI.name] = prompt_mean(images, PMI.name)["value"]
    return row


def _quality(frames: list[pd.DataFrame], reference: pd.DataFrame, real: np.ndarray | None, named_encoder: bool) -> dict:
    """Kernel distance to real images, or to those of the base model, and diversity in per cent of the base model's;
    means over the frames. As in the report."""
    own = np.stack(reference["features"])

    def spread(images: pd.DataFrame) -> float | None:
        features, ids = np.stack(images["features"]), images["prompt_id"].to_numpy()
        return cosine_diversity(features, ids) if named_encoder else diversity(features, ids, own)

    real = own if real is None else real
    distances = [kernel_distance(np.stack(f["features"]), real, standard=not named_encoder) for f in frames]
    spreads, whole = _mean([spread(images) for images in frames]), spread(reference)
    return {
        "kernel_distance": _mean(distances),
        "diversity": 100 * spreads / whole if whole and spreads else None,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
