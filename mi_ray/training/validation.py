"""The validations of an online run: the self-score of each version of the policy, and the version that is kept."""

import math

import numpy as np

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.inputs.online_plan import OnlinePlan
from mi_ray.runs import folder as run_folder
from mi_ray.scoring.rewards import Reward, prompts_of, raw_rewards, validation_rewards_of


def validation_rewards(plan: OnlinePlan, candidates: str, version: int, rewards: tuple[Reward, ...]) -> np.ndarray:
    """The mean reward of each held-out prompt for a version of the policy, in the order of the prompts; NaN: none."""
    found = []
    for index in plan.of_validation(version):
        rows = storage.read_table(storage.join(candidates, plan.name(index))).to_pydict()
        values = raw_rewards(rewards, rows)
        for start, stop in prompts_of(rows["prompt_id"]):
            mean = finite_mean(values[start:stop])
            found.append(mean if math.isfinite(mean) else math.nan)
    return np.array(found)


def best_version(config: RunConfig, plan: OnlinePlan, candidates: str, saved: list[int]) -> dict:
    """The self-scores of the validated versions, and the version that is kept.

    The kept version is the last one whose mean is not lower than the highest mean by more than the standard error of
    the difference. Versions without a finite reward do not count. Without others it is the last saved version.

    Args:
        saved: versions with an adapter in the run folder.

    Returns:
        version, and validation: {version: mean reward of the held-out prompts}.
    """
    rewards, scores = validation_rewards_of(config), {}
    for version in saved:
        parts = [plan.name(index) for index in plan.of_validation(version)]
        if parts and not run_folder.missing_parts(candidates, parts):
            scores[version] = validation_rewards(plan, candidates, version, rewards)
    means = {version: mean for version, values in scores.items() if math.isfinite(mean := finite_mean(values))}
    if not means:
        return {"version": max(saved), "validation": {}}
    highest, good = max(means, key=means.get), []
    for version in means:
        lost = scores[highest] - scores[version]
        lost = lost[np.isfinite(lost)]
        if len(lost) > 1 and lost.mean() <= lost.std(ddof=1) / math.sqrt(len(lost)):
            good.append(version)
    return {"version": max(good, default=highest), "validation": {str(v): mean for v, mean in means.items()}}


def finite_mean(values: np.ndarray) -> float:
    """The mean of the finite values; minus infinity if there is none."""
    return values[np.isfinite(values)].mean().item() if np.isfinite(values).any() else -math.inf
