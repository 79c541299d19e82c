"""The report's statistics: means and paired differences over prompts, AUC within prompts, image quality.

The prompt is the unit everywhere: images of one prompt resemble each other, so each prompt is first averaged over its
images, and the intervals are 95 % t-intervals over the prompts' means.
"""

import warnings

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.spatial.distance import pdist
from torchmetrics.image.kid import KernelInceptionDistance

CONFIDENCE = 0.95
MAX_DEVIATIONS = 3.0  # of a feature
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 10, 1000  # torchmetrics averages over random subsets of this size

# A model counts as collapsed if one of these holds (see `is_collapsed`).
MIN_DIVERSITY_RATIO = 0.6
MAX_KERNEL_RATIO = 2.0
KERNEL_MARGIN = 0.1  # shifting every feature by a fifth of its standard deviation gives 3 * 0.2**2 = 0.12


def t_interval(values: np.ndarray) -> tuple[float, float | None, float | None]:
    """Mean of `values` (shape (n,), n >= 1) and the ends of its 95 % t-interval; None of a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def prompt_mean(rows: pd.DataFrame, column: str) -> dict | None:
    """Mean over prompts of each prompt's mean: {value, low, high, n_prompts, n_images}; None if nothing is measured.

    Rows without a value are left out; `rows` has the columns prompt_id and `column`.
    """
    measured = rows[rows[column].notna()]
    if measured.empty:
        return None
    means = measured.groupby("prompt_id")[column].mean()
    value, low, high = t_interval(means.to_numpy(float))
    return {"value": value, "low": low, "high": high, "n_prompts": len(means), "n_images": len(measured)}


def paired_difference(rows: pd.DataFrame, baseline: pd.DataFrame, column: str) -> dict | None:
    """`rows` minus `baseline`, paired by prompt and seed: {difference, low, high, n_prompts, n_images}.

    Differences of images of the same prompt and seed are averaged over the prompt's seeds; the interval is that of a
    paired t-test over prompts. What only one of the two has measured is left out.
    """
    keys = ["prompt_id", "seed"]
    pairs = rows[[*keys, column]].merge(baseline[[*keys, column]], on=keys, suffixes=("", "_baseline"))
    pairs["difference"] = pairs[column] - pairs[f"{column}_baseline"]
    result = prompt_mean(pairs, "difference")
    return result and {"difference": result.pop("value"), **result}


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive outscores a negative, ties counting half (Mann-Whitney U / n1 n0); both shape (n,)."""
    n_positive = positive.sum()
    rank_sum = stats.rankdata(scores)[positive].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * (~positive).sum()))


def within_prompt_auc(candidates: pd.DataFrame, column: str) -> dict | None:
    """AUC of a score for exact == 1 among the candidates of one prompt, averaged over prompts with both kinds.

    `candidates` has the columns round, prompt_id, exact and `column`; a prompt's rounds are averaged first.
    Returns {value, low, high, n_prompts}, or None if no prompt has both kinds.
    """
    measured = candidates[candidates[column].notna() & candidates["exact"].notna()]
    pools = []
    for (_, prompt_id), pool in measured.groupby(["round", "prompt_id"]):
        exact = pool["exact"].to_numpy() == 1
        if exact.any() and not exact.all():
            pools.append({"prompt_id": prompt_id, "auc": auc(pool[column].to_numpy(), exact)})
    result = prompt_mean(pd.DataFrame(pools), "auc") if pools else None
    return result and {key: result[key] for key in ("value", "low", "high", "n_prompts")}


def standardise(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Features (n, d) in the reference's (m, d) standard deviations from its mean, cut at +-3.

    Without the cut, a feature that the reference hardly ever shows (a pixel of the border) decides every distance.
    """
    deviation = reference.std(0)
    standard = (features - reference.mean(0)) / np.where(deviation > 0, deviation, 1)
    return standard.clip(-MAX_DEVIATIONS, MAX_DEVIATIONS)


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> float | None:
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3: KID (Binkowski et al., ICLR 2018, section 4) on any features.

    Both (n, d), standardised by the reference; near 0, and possibly below it, for samples of one distribution.
    None for fewer than two images.
    """
    size = min(len(features), len(reference), KERNEL_SUBSET_SIZE)
    if size < 2:
        return None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all features are kept in memory
        torch.manual_seed(0)  # of the subsets
        distance = KernelInceptionDistance(torch.nn.Identity(), subsets=KERNEL_SUBSETS, subset_size=size)
        distance.update(torch.from_numpy(standardise(reference, reference)), real=True)
        distance.update(torch.from_numpy(standardise(features, reference)), real=False)
        return float(distance.compute()[0])


def diversity(features: np.ndarray, prompt_ids: np.ndarray, reference: np.ndarray) -> float | None:
    """Mean distance of two images of the same prompt, in the reference's standard deviations a feature.

    features (n, d), prompt_ids (n,), reference (m, d). Averaged over pairs, then over prompts with two images or more.
    """
    standard = standardise(features, reference) / np.sqrt(features.shape[1])
    groups = (standard[index] for index in pd.Series(prompt_ids).groupby(prompt_ids).indices.values())
    distances = [pdist(group).mean() for group in groups if len(group) > 1]
    return float(np.mean(distances)) if distances else None


def is_collapsed(quality: dict, base: dict) -> bool:
    """Whether a model ({kernel_distance, diversity}) fell behind the base model so far that its gains mean nothing.

    Its images of one prompt are less than 0.6 times as diverse as the base model's, or their kernel distance to the
    reference exceeds twice the base model's by more than 0.1.
    """
    lost_diversity = None not in (quality["diversity"], base["diversity"]) and (
        quality["diversity"] < MIN_DIVERSITY_RATIO * base["diversity"]
    )
    limit = MAX_KERNEL_RATIO * max(base["kernel_distance"] or 0, 0) + KERNEL_MARGIN
    return lost_diversity or (quality["kernel_distance"] or 0) > limit
