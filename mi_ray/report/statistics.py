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

from mi_ray.alignment.metric import Column

CONFIDENCE = 0.95
MAX_DEVIATIONS = 3.0  # of a feature
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 10, 1000  # torchmetrics averages over random subsets of this size

# A model counts as collapsed if one of these holds (see `is_collapsed`).
MIN_DIVERSITY_RATIO = 0.6
MAX_KERNEL_RATIO = 2.0
KERNEL_MARGIN = 0.1  # shifting every feature by a fifth of its standard deviation gives 3 * 0.2**2 = 0.12


class PromptAverage:
    """Mean over prompts of each prompt's mean, of rows that come bit by bit, a prompt's all at once."""

    def __init__(self):
        self.prompts, self.images, self.mean, self.squares = 0, 0, 0.0, 0.0

    def add(self, rows: pd.DataFrame, column: str):
        """Rows with the columns prompt_id and `column`; those without a value are left out."""
        measured = rows[rows[column].notna()]
        if measured.empty:
            return
        means = measured.groupby("prompt_id")[column].mean().to_numpy(float)
        # Chan, Golub and LeVeque (1983), eq. 2.1
        together, apart = self.prompts + len(means), means.mean() - self.mean
        self.squares += ((means - means.mean()) ** 2).sum() + apart**2 * self.prompts * len(means) / together
        self.mean += apart * len(means) / together
        self.prompts, self.images = together, self.images + len(measured)

    def result(self) -> dict | None:
        """{value, low, high, n_prompts, n_images} with the ends of the 95 % t-interval, None of a single prompt; None
        if nothing is measured."""
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
    """The `PromptAverage` of rows that are all there."""
    average = PromptAverage()
    average.add(rows, column)
    return average.result()


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


def prompt_aucs(candidates: pd.DataFrame, column: str, truth: Column) -> pd.DataFrame:
    """How often a score orders two candidates of one prompt and round as a metric does: columns prompt_id, auc.

    Over the pairs whose values of the metric differ; equal scores count half. Where the metric is 0 or 1, this is the
    area under the ROC curve. `candidates` has the columns round, prompt_id, `column` and the metric's. Pools without
    such a pair have no row.
    """
    measured = candidates[candidates[column].notna() & candidates[truth.name].notna()]
    pools = measured.groupby(["round", "prompt_id"])
    pool, place = pools.ngroup().to_numpy(), pools.cumcount().to_numpy()
    shape = (pools.ngroups, place.max(initial=-1) + 1)
    scores, truths = np.full(shape, np.nan), np.full(shape, np.nan)
    scores[pool, place] = measured[column]
    truths[pool, place] = truth.sign * measured[truth.name]
    pairs, right = np.zeros(shape[0]), np.zeros(shape[0])
    for score, value in zip(scores.T[..., None], truths.T[..., None], strict=True):  # each against all of its pool
        better = truths > value  # NaN, where a pool has fewer candidates, is above nothing
        pairs += better.sum(1)
        right += (better * ((scores > score) + 0.5 * (scores == score))).sum(1)
    ids = pools["prompt_id"].first().to_numpy()
    return pd.DataFrame({"prompt_id": ids[pairs > 0], "auc": right[pairs > 0] / pairs[pairs > 0]})


def within_prompt_auc(aucs: PromptAverage) -> dict | None:
    """{value, low, high, n_prompts} of `prompt_aucs`, a prompt's rounds averaged first; None if no prompt has any."""
    result = aucs.result()
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
