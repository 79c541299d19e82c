"""The report's statistics: means and paired differences over prompts, AUC within prompts, image quality.

The unit is the prompt, because images of the same prompt are not independent. Values are first averaged over the images
of each prompt. Intervals are 95 % t-intervals over these means.
"""

import warnings

import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.spatial.distance import pdist
from torchmetrics.image.kid import KernelInceptionDistance

from mi_ray.alignment.metric import Column

CONFIDENCE = 0.95
MAX_DEVIATIONS = 3.0  # standardised features are clipped to this value
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 10, 1000  # torchmetrics averages over random subsets of this size

# A model counts as collapsed if one of these holds (see `is_collapsed`).
MIN_DIVERSITY_RATIO = 0.6
MAX_KERNEL_RATIO = 2.0
KERNEL_MARGIN = 0.1  # shifting every feature by a fifth of its standard deviation gives 3 * 0.2**2 = 0.12


class PromptAverage:
    """Mean over prompts of each prompt's mean. Rows are added in parts; all rows of a prompt are in the same part."""

    def __init__(self):
        self.prompts, self.images, self.mean, self.squares = 0, 0, 0.0, 0.0

    def add(self, rows: pd.DataFrame, column: str):
        """Add rows with the columns prompt_id and `column`. Rows without a value are left out."""
        measured = rows[rows[column].notna()]
        if measured.empty:
            return
        means = measured.groupby("prompt_id")[column].mean().to_numpy(float)
        # Chan, Golub and LeVeque (1983), eq. 2.1
        total, shift = self.prompts + len(means), means.mean() - self.mean
        self.squares += ((means - means.mean()) ** 2).sum() + shift**2 * self.prompts * len(means) / total
        self.mean += shift * len(means) / total
        self.prompts, self.images = total, self.images + len(measured)

    def result(self) -> dict | None:
        """{value, low, high, n_prompts, n_images}; low and high are the ends of the 95 % t-interval, None for a single
        prompt. None if there are no rows."""
        if not self.prompts:
            return None
        low = high = None
        if self.prompts > 1:
            error = np.sqrt(self.squares / (self.prompts - 1) / self.prompts)
            half = stats.t.ppf((1 + CONFIDENCE) / 2, self.prompts - 1) * error
            low, high = float(self.mean - half), float(self.mean + half)
        counts = {"n_prompts": self.prompts, "n_images": self.images}
        return {"value": float(self.mean), "low": low, "high": high, **counts}


def prompt_mean(rows: pd.DataFrame, column: str) -> dict | None:
    """The result of `PromptAverage` for these rows."""
    average = PromptAverage()
    average.add(rows, column)
    return average.result()


def paired_difference(rows: pd.DataFrame, baseline: pd.DataFrame, column: str) -> dict | None:
    """`rows` minus `baseline`, paired by prompt and seed: {difference, low, high, n_prompts, n_images}.

    Differences between images of the same prompt and seed are averaged over the prompt's seeds. The interval is that of
    a paired t-test over prompts. Images without a partner are left out.
    """
    keys = ["prompt_id", "seed"]
    pairs = rows[[*keys, column]].merge(baseline[[*keys, column]], on=keys, suffixes=("", "_baseline"))
    pairs["difference"] = pairs[column] - pairs[f"{column}_baseline"]
    result = prompt_mean(pairs, "difference")
    return result and {"difference": result.pop("value"), **result}


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative; ties count half (Mann-Whitney U / n1 n0).

    Args:
        scores: (n,).
        positive: (n,) bool.
    """
    n_positive = positive.sum()
    rank_sum = stats.rankdata(scores)[positive].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * (~positive).sum()))


def prompt_aucs(candidates: pd.DataFrame, column: str, truth: Column) -> pd.DataFrame:
    """How often a score orders two candidates of the same prompt and round like a metric.

    Only pairs with different values of the metric count; equal scores count half. For a metric that is 0 or 1, this is
    the area under the ROC curve.

    Args:
        candidates: the columns round, prompt_id, `column` (the score) and `truth.name` (the metric).

    Returns:
        Columns prompt_id and auc, one row per prompt and round with at least one such pair.
    """
    measured = candidates[candidates[column].notna() & candidates[truth.name].notna()]
    pools = measured.groupby(["round", "prompt_id"])
    pool, place = pools.ngroup().to_numpy(), pools.cumcount().to_numpy()
    shape = (pools.ngroups, place.max(initial=-1) + 1)
    scores, truths = np.full(shape, np.nan), np.full(shape, np.nan)
    scores[pool, place] = measured[column]
    truths[pool, place] = truth.sign * measured[truth.name]
    pairs, right = np.zeros(shape[0]), np.zeros(shape[0])
    for score, value in zip(scores.T[..., None], truths.T[..., None], strict=True):  # one candidate per pool
        better = truths > value  # False for NaN, the padding of smaller pools
        pairs += better.sum(1)
        right += (better * ((scores > score) + 0.5 * (scores == score))).sum(1)
    ids = pools["prompt_id"].first().to_numpy()
    return pd.DataFrame({"prompt_id": ids[pairs > 0], "auc": right[pairs > 0] / pairs[pairs > 0]})


def prompt_correlations(candidates: pd.DataFrame, column: str, truth: Column) -> pd.DataFrame:
    """Spearman's rank correlation of a score and a metric over the candidates of each prompt and round.

    It is positive if the score is higher for better candidates. A constant score has the correlation 0.

    Args:
        candidates: as `prompt_aucs`.

    Returns:
        Columns prompt_id and correlation, one row per prompt and round in which the metric differs.
    """
    measured = candidates[candidates[column].notna() & candidates[truth.name].notna()]
    keys = [measured["round"], measured["prompt_id"]]
    ranks = measured[[column, truth.name]].astype(float).groupby(keys).rank()
    ranks -= ranks.groupby(keys).transform("mean")
    x, y = ranks[column], truth.sign * ranks[truth.name]
    sums = pd.DataFrame({"xy": x * y, "xx": x * x, "yy": y * y}).groupby(keys).sum()
    sums = sums[sums["yy"] > 0]
    found = (sums["xy"] / np.sqrt(sums["xx"] * sums["yy"])).where(sums["xx"] > 0, 0.0)
    return pd.DataFrame({"prompt_id": found.index.get_level_values("prompt_id"), "correlation": found.to_numpy()})


def within_prompt_auc(aucs: PromptAverage) -> dict | None:
    """{value, low, high, n_prompts} of `prompt_aucs` or `prompt_correlations`, averaged over the rounds of a prompt
    first. None without rows."""
    result = aucs.result()
    return result and {key: result[key] for key in ("value", "low", "high", "n_prompts")}


def standardise(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Features (n, d) minus the mean of the reference (m, d), in units of its standard deviation, clipped to +-3.

    Without clipping, a feature that is almost constant in the reference (a border pixel) would dominate every distance.
    """
    deviation = reference.std(0)
    standard = (features - reference.mean(0)) / np.where(deviation > 0, deviation, 1)
    return standard.clip(-MAX_DEVIATIONS, MAX_DEVIATIONS)


def kernel_distance(features: np.ndarray, reference: np.ndarray, standard: bool = True) -> float | None:
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3: KID (Binkowski et al., ICLR 2018, section 4) on any features.

    Near 0, and possibly negative, for samples of the same distribution. None for fewer than two images.

    Args:
        features, reference: (n, d) and (m, d).
        standard: standardise both with the reference. False: as KID does with the features of its network.
    """
    size = min(len(features), len(reference), KERNEL_SUBSET_SIZE)
    if size < 2:
        return None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics warns that it keeps all features in memory
        torch.manual_seed(0)  # for the random subsets
        distance = KernelInceptionDistance(torch.nn.Identity(), subsets=KERNEL_SUBSETS, subset_size=size)
        for part, real in ((reference, True), (features, False)):
            distance.update(torch.from_numpy(standardise(part, reference) if standard else part), real=real)
        return float(distance.compute()[0])


def diversity(features: np.ndarray, prompt_ids: np.ndarray, reference: np.ndarray) -> float | None:
    """Mean distance between two images of the same prompt, per feature, in standard deviations of the reference.

    It is averaged over pairs, then over prompts with at least two images. None if there is no such prompt.

    Args:
        features: (n, d).
        prompt_ids: (n,).
        reference: (m, d).
    """
    return _mean_distance(standardise(features, reference) / np.sqrt(features.shape[1]), prompt_ids, "euclidean")


def cosine_diversity(features: np.ndarray, prompt_ids: np.ndarray) -> float | None:
    """Mean of 1 - cosine between two images of the same prompt, over pairs, then over prompts. None without pairs.

    Args:
        features: (n, d).
        prompt_ids: (n,).
    """
    return _mean_distance(features, prompt_ids, "cosine")


def _mean_distance(features: np.ndarray, prompt_ids: np.ndarray, metric: str) -> float | None:
    groups = (features[index] for index in pd.Series(prompt_ids).groupby(prompt_ids).indices.values())
    distances = [pdist(group, metric).mean() for group in groups if len(group) > 1]
    return float(np.mean(distances)) if distances else None


def is_collapsed(quality: dict, base: dict) -> bool:
    """Whether a model's images are so bad, compared with the base model, that its alignment values mean little.

    This holds if the diversity is less than 0.6 times that of the base model, or if the kernel distance is larger than
    twice that of the base model plus 0.1. The margin is for standardised features: with those of a named encoder only
    the diversity counts.

    Args:
        quality, base: kernel_distance, diversity and encoder of the model and of the base model.
    """
    lost_diversity = None not in (quality["diversity"], base["diversity"]) and (
        quality["diversity"] < MIN_DIVERSITY_RATIO * base["diversity"]
    )
    if quality.get("encoder"):
        return lost_diversity
    limit = MAX_KERNEL_RATIO * max(base["kernel_distance"] or 0, 0) + KERNEL_MARGIN
    return lost_diversity or (quality["kernel_distance"] or 0) > limit
