"""Rewards of candidates, from any scores or metrics, and their advantages within each prompt."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mi_ray.alignment.metric import Column, columns_of, load_metrics
from mi_ray.config import OnlineConfig, RunConfig
from mi_ray.config.section import ConfigError

RANDOM = "random"
MEASURED = 1e-4  # smallest standard deviation that counts, for rewards without a standard error


@dataclass(frozen=True)
class Reward:
    """A column of the table of candidates that is used as a reward, with its weight."""

    name: str  # a score, a column of a metric, or `random`
    weight: float

    def columns(self, present: Sequence[str]) -> tuple[str, str | None]:
        """The names of its column and of the column of its standard error, or None, among those present."""
        column = f"score_{self.name}" if f"score_{self.name}" in present else self.name
        error = f"{column}_se"
        return column, error if error in present else None


def rewards_of(
    config: OnlineConfig, by: str, metrics: Mapping[str, Sequence[Column]] = MappingProxyType({})
) -> tuple[Reward, ...]:
    """The rewards of `online.rewards`. If the list is empty, the reward is `by`, the score that selects.

    The name of a metric means its first column. If lower is better for a column, its weight is negated.

    Args:
        metrics: the columns that the metrics of generate.alignment declare.

    Raises:
        ConfigError: a weight is not a number.
    """
    declared = {column.name: column for columns in metrics.values() for column in columns}
    declared |= {metric: columns[0] for metric, columns in metrics.items()}
    found, faults = [], []
    for text in config.rewards or (by,):
        name, _, weight = (text, "", "1") if text in declared or ":" not in text else text.rpartition(":")
        try:
            column = declared.get(name)
            found.append(Reward(column.name, column.sign * float(weight)) if column else Reward(name, float(weight)))
        except ValueError:
            faults.append(f"online.rewards: {text!r} has a weight that is not a number; write name:number")
    if faults:
        raise ConfigError(faults)
    return tuple(found)


def reward_faults(config: RunConfig) -> list[str]:
    """One error message for each of the rewards of an online run that is no column of the candidates.

    Raises:
        ValueError: a name of generate.alignment is no metric.
    """
    if not config.online.updates:
        return []
    metrics = columns_of(load_metrics(config.generate.alignment))
    try:
        rewards = rewards_of(config.online, config.select.by, metrics)
    except ConfigError as error:
        return error.faults
    columns = {column.name for declared in metrics.values() for column in declared}
    known = (RANDOM, *config.score.names, *sorted(columns))
    return [
        f"online.rewards has {reward.name!r}, but no candidate has this value: take one of {', '.join(known)}, or add"
        " it to score.names or generate.alignment"
        for reward in rewards
        if reward.name not in known
    ]


def run_rewards(config: RunConfig) -> tuple[Reward, ...]:
    """The rewards of a run."""
    return rewards_of(config.online, config.select.by, columns_of(load_metrics(config.generate.alignment)))


def validation_rewards_of(config: RunConfig) -> tuple[Reward, ...]:
    """The rewards for held-out prompts: those of the run. If they are random, the score that selects."""
    if sound := tuple(reward for reward in run_rewards(config) if reward.name != RANDOM):
        return sound
    by = next(name for name in (config.select.by, *config.score.names) if name != RANDOM)
    unset = config.online.model_copy(update={"rewards": ()})
    return rewards_of(unset, by, columns_of(load_metrics(config.generate.alignment)))


def raw_rewards(rewards: tuple[Reward, ...], columns: Mapping[str, Sequence[float]]) -> np.ndarray:
    """The weighted sum of the reward columns of n candidates, (n,) fp64; NaN if a value is missing. The reward `random`
    has no column and is left out."""
    total = 0.0
    for reward in (reward for reward in rewards if reward.name != RANDOM):
        column, _ = reward.columns(list(columns))
        total = total + reward.weight * np.array(columns[column], np.float64)
    return total


def advantages(
    rewards: tuple[Reward, ...], columns: Mapping[str, Sequence[float]], seeds: Sequence[int], config: OnlineConfig
) -> np.ndarray:
    """Advantages of the candidates of one prompt, (n,) fp64 in [-1, 1]; NaN for candidates that are not trained on.

    Each reward column is centred and divided by its standard deviation plus `reward_floor`. The weighted sum of the
    columns is clipped at `reward_clip` and divided by it. A column whose standard deviation is not above its mean
    standard error carries no signal and counts as zero. A prompt without any column that carries signal is dropped. A
    candidate without a finite reward is dropped.

    Args:
        columns: of the candidates of one prompt; can include `error`.
        seeds: seeds of the candidates; the reward `random` depends only on them.
    """
    count = len(seeds)
    sound = np.array([error is None for error in columns.get("error", [None] * count)])
    total, said = np.zeros(count), False
    for reward in rewards:
        if reward.name == RANDOM:
            values, error = np.array([np.random.default_rng(seed).standard_normal() for seed in seeds]), MEASURED
        else:
            column, error_column = reward.columns(list(columns))
            values = np.array(columns[column], np.float64)
            errors = np.array(columns[error_column], np.float64) if error_column else np.full(count, MEASURED)
            error = np.nanmean(np.where(np.isfinite(errors), errors, np.nan)) if np.isfinite(errors).any() else np.inf
        sound &= np.isfinite(values)
        if sound.sum() < 2:
            break
        spread = values[sound].std(ddof=1)
        if spread <= error:
            continue
        said = True
        floor = config.reward_floor if error > MEASURED else 0.0  # only for scores: their spread includes their error
        total += reward.weight * (values - values[sound].mean()) / (spread + floor)
    if not said or sound.sum() < 2:
        return np.full(count, np.nan)
    total -= total[sound].mean()
    return np.where(sound, np.clip(total, -config.reward_clip, config.reward_clip) / config.reward_clip, np.nan)


def prompts_of(ids: Sequence[str]) -> list[tuple[int, int]]:
    """(start, stop) of the rows of each prompt; the rows of a prompt are consecutive."""
    starts = [i for i, prompt in enumerate(ids) if i == 0 or prompt != ids[i - 1]]
    return list(zip(starts, [*starts[1:], len(ids)], strict=True))


def candidate_advantages(
    rewards: tuple[Reward, ...], columns: dict[str, list], config: RunConfig
) -> list[float | None]:
    """The advantages of the candidates of several prompts, for the table; None: not trained on."""
    found: list[float | None] = []
    for start, stop in prompts_of(columns["prompt_id"]):
        of_prompt = {name: values[start:stop] for name, values in columns.items()}
        values = advantages(rewards, of_prompt, of_prompt["seed"], config.online)
        values = _extremes(values, config.online.trained_candidates)
        found += [float(value) if math.isfinite(value) else None for value in values]
    return found


def _extremes(values: np.ndarray, count: int | None) -> np.ndarray:
    """The advantages of a prompt's best and worst candidates, `count` in all; NaN for the others. None: all of them."""
    finite = np.flatnonzero(np.isfinite(values))
    if count is None or len(finite) <= count:
        return values
    order = finite[np.argsort(values[finite], kind="stable")]
    kept = np.r_[order[: count // 2], order[len(order) - (count - count // 2) :]]
    return np.where(np.isin(np.arange(len(values)), kept), values, np.nan)


def score_statistics(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """{score: (mean over candidates, mean over prompts of the standard deviation within a prompt)}, finite values."""
    by_score: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, value in row.items():
            if name.startswith("score_") and not name.endswith("_se") and value is not None and np.isfinite(value):
                by_score[name.removeprefix("score_")][row["prompt_id"]].append(value)
    return {
        score: (
            float(np.mean([value for values in of_prompts.values() for value in values])),
            float(np.mean([np.std(values) for values in of_prompts.values()])),
        )
        for score, of_prompts in by_score.items()
    }
