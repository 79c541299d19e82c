"""Quality and cost of selectors: benchmarks/selection.py [--judges NAMES] [--out F.json] [--figure F.png] [--smoke]

For one pool of the embedded model and every selector: how well it separates better from worse images of a prompt
according to a metric, how good its best-ranked images are, how many denoiser evaluations it needs in addition to those
for generating a candidate, and how many seconds. Selectors are the scores, SOLACE's self-reward and any metrics.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from gates import Benchmark, Findings, Gate, LocalPath, main, metric_details
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt
from scipy.stats import bootstrap
from torch import Tensor
from tqdm import tqdm

from mi_ray.alignment.metric import Column, Metric, check_prompts, load_metrics, measure
from mi_ray.config import FLOW_SCORES, TRAJECTORY_SCORES, SamplerConfig, ScoreConfig, ScoreName
from mi_ray.config.command_line import load_config
from mi_ray.config.metrics import MetricName, MetricNames
from mi_ray.config.paths import LocalOrUri, ModelPath
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.diffusion.sampling import Trajectory
from mi_ray.information.self_reward import SAMPLES, self_reward, self_reward_levels
from mi_ray.inputs.prompts import read_prompts
from mi_ray.inputs.shard_plan import with_details
from mi_ray.report.columns import label
from mi_ray.report.statistics import prompt_aucs, prompt_correlations
from mi_ray.scoring.machine import keep_memory
from mi_ray.scoring.sampler import Sampler, derived_seed
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work

CONFIGS = Path(__file__).parent.parent / "jobs" / "configs"
PROMPTS = CONFIGS / "prompts" / "shapes-train.jsonl"
DEMO, _ = load_config(["--config", str(CONFIGS / "shapes.yaml")])
PROMPTS_AT_A_TIME = 8
# Settings of each score, tuned on prompts that this benchmark does not use (301 to 360 of the file).
SETTINGS = {
    "trajectory_banded": {"log_snr_min": -5.0, "log_snr_max": -2.5},
    "pmi": {"num_samples": 24, "log_snr_min": -5.4, "log_snr_max": 0.2},
    "pmi_orthogonal": {"num_samples": 24, "log_snr_min": -5.4, "log_snr_max": 0.2},
    "pmi_contrastive": {
        "num_samples": 10,
        "log_snr_min": -5.4,
        "log_snr_max": -0.8,
        "neighbours": 8,
        "shortlist": 3,
        "shortlist_samples": 2,
    },
    "pmi_negatives": {"num_samples": 8, "log_snr_min": -5.4, "log_snr_max": -1.7, "max_negatives": 10, "shortlist": 3},
}
AIMS = {"pmi_negatives": 0.90, "pmi_contrastive": 0.85, "pmi": 0.80}
MAX_RELATIVE_COST = 1.5  # evaluations of a score with an aim, relative to those for generating the candidate
SOLACE = "solace"


class SelectionBenchmark(Benchmark):
    """Which selector finds the best images of a prompt, and what does it cost?"""

    model: ModelPath = Field(
        "shapes", description="the embedded model (shapes) or a diffusers folder, for prompts of the shapes grammar"
    )
    prompts: PositiveInt = Field(150, description="number of prompts, from the demo's training prompts")
    candidates: PositiveInt = Field(16, description="number of candidates per prompt")
    alignment: MetricName = Field(
        DEMO.evaluation.alignment[0], description="metric that the selectors are compared with, by its first column"
    )
    judges: MetricNames = Field((), description="metrics that select too, by their first columns: a name or a list")
    solace: bool = Field(True, description="the self-reward of SOLACE selects too")
    top_k: PositiveInt = Field(4, description="number of best-ranked images whose mean is reported")
    file: LocalOrUri = Field(str(PROMPTS), description="prompt file; its first prompts are used")
    sampler: SamplerConfig = SamplerConfig(solver="dpm++2m", num_inference_steps=20, guidance_scale=1.5)
    scores: tuple[ScoreName, ...] = Field(
        tuple(name for name in get_args(ScoreName) if name not in FLOW_SCORES),
        description="scores to compare, each with its own settings; by default those of a diffusion model",
    )
    batch_size: PositiveInt = Field(128, description="number of candidates in one denoiser batch")
    seed: int = Field(0, description="seed of the candidates and of the probes")
    figure: LocalPath | None = Field(None, description="PNG file to write: quality against cost")

    def answer(self) -> Findings:
        count, each = (12, 6) if self.smoke else (self.prompts, self.candidates)
        table, _ = read_prompts(self.file, field="file", duplicates="drop")
        check_prompts(self._metrics, with_details(table.slice(0, count)))
        candidates, costs = self._pool(table.slice(0, count), table["prompt"].to_pylist(), each)
        truth, sampling = self._first(self.alignment), costs.pop("sampling")
        rows = [
            findings(candidates, name, name, cost, cost.evaluations / sampling.evaluations, truth, self.top_k)
            for name, cost in costs.items()
        ]
        best = candidates.assign(best=truth.sign * candidates[truth.name])
        for name, column in {self.alignment: "best", "random": "random"}.items():
            rows.append(findings(best, column, name, Cost(), 0.0, truth, self.top_k))
        if self.figure:
            draw(rows, self.figure, truth)
        return Findings(rows, gates(rows), {"metrics": metric_details(self._metrics)})

    @cached_property
    def _metrics(self) -> dict[str, Metric]:
        return load_metrics([self.alignment, *(name for name in self.judges if name != self.alignment)])

    def _first(self, name: str) -> Column:
        return self._metrics[name].columns[0]

    @torch.inference_mode()
    def _pool(self, table: pa.Table, others: list[str], each: int) -> tuple[pd.DataFrame, dict[str, "Cost"]]:
        """The candidates with the truth and a column of each selector; the cost of each selector and of `sampling`.

        Args:
            others: prompts among which the neighbours of a prompt are searched: the whole list.
        """
        denoiser = load_denoiser(self.model)
        keep_memory()
        denoiser.specialise(channels_last=True, compiled=None, rows=())
        sampler = Sampler(denoiser, self.sampler, self.batch_size)
        everything, truth = with_details(table), self._first(self.alignment)
        one = {name: ScoreConfig(names=(name,), **SETTINGS.get(name, {})) for name in self.scores}
        scorers = {name: Scorer(denoiser, one[name], self.batch_size, self.seed, others) for name in one}
        parts, costs = [], defaultdict(Cost)
        for start in tqdm(range(0, len(everything), PROMPTS_AT_A_TIME), unit_scale=PROMPTS_AT_A_TIME, unit=" prompts"):
            prompts = everything[start : start + PROMPTS_AT_A_TIME]
            ids = table["prompt_id"].to_pylist()[start : start + PROMPTS_AT_A_TIME]
            conditioning = denoiser.encode_prompts(prompts)
            index = torch.arange(len(prompts)).repeat_interleave(each)
            seeds = [[derived_seed(self.seed, "round-0", i, c) for c in range(each)] for i in ids]
            sampled, began = Work(), time.perf_counter()
            trajectory = sampler(conditioning, seeds, sampled)
            images = denoiser.decode(trajectory.latents)
            costs["sampling"].add(sampled.denoiser_evaluations, began, len(index))
            flat = [p for p in prompts for _ in range(each)]
            columns = {
                "prompt_id": np.repeat(ids, each),
                "category": np.repeat(table["category"].to_pylist()[start : start + PROMPTS_AT_A_TIME], each),
                **measure({self.alignment: self._metrics[self.alignment]}, images, flat),
                "random": [np.random.default_rng(seed).random() for of_prompt in seeds for seed in of_prompt],
            }
            for name, scorer in scorers.items():
                work, began = Work(), time.perf_counter()
                columns[name] = scorer(prompts, conditioning, index, trajectory, work)[f"score_{name}"]
                costs[name].add(work.score_evaluations, began, len(index))
            if self.solace:
                began = time.perf_counter()
                columns[SOLACE], evaluations = self._solace(denoiser, conditioning, index, trajectory, ids)
                costs[SOLACE].add(evaluations, began, len(index))
            if start == 0:  # the time to load the judges does not count
                measure({name: self._metrics[name] for name in self.judges}, images[:1], flat[:1])
            for name in self.judges:
                began, judge = time.perf_counter(), self._first(name)
                found = measure({name: self._metrics[name]}, images, flat)[judge.name]
                columns[name] = [None if value is None else judge.sign * value for value in found]
                costs[name].add(0, began, len(index))
            parts.append(pd.DataFrame(columns))
        candidates = pd.concat(parts, ignore_index=True)
        numbers = [truth.name, *(name for name in costs if name != "sampling")]
        return candidates.assign(**{name: candidates[name].astype(float) for name in numbers}), dict(costs)

    def _solace(
        self, denoiser: Denoiser, conditioning: Conditioning, index: Tensor, trajectory: Trajectory, ids: list[str]
    ) -> tuple[list[float], int]:
        """The self-reward of every candidate, and the number of its denoiser evaluations."""
        levels, seeds = self_reward_levels(trajectory.timesteps), [derived_seed(self.seed, SOLACE, i) for i in ids]
        place = denoiser.predict_epsilon, denoiser.schedule, trajectory.latents, index, conditioning
        found = self_reward(*place, levels, seeds, 2 * self.batch_size)
        return found.tolist(), len(index) * len(levels) * SAMPLES


@dataclass
class Cost:
    """What a selector costs, per candidate."""

    total: int = 0
    spent: float = 0.0
    candidates: int = 0

    def add(self, evaluations: int, began: float, candidates: int):
        self.total, self.candidates = self.total + evaluations, self.candidates + candidates
        self.spent += time.perf_counter() - began

    @property
    def evaluations(self) -> int:
        return round(self.total / max(self.candidates, 1))

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.spent / max(self.candidates, 1)


def findings(
    candidates: pd.DataFrame, column: str, name: str, cost: Cost, relative_cost: float, truth: Column, top_k: int
) -> dict:
    """The row of a selector, means over prompts with bootstrap intervals.

    AUC and rank correlation within prompts, the mean metric of the best-ranked image and of the `top_k` best-ranked
    ones. Candidates without a value of the selector or of the metric are left out.
    """
    measured = candidates[candidates[column].notna() & candidates[truth.name].notna()].assign(round=0)
    pools = measured.groupby("prompt_id")
    areas = prompt_aucs(measured, column, truth)
    areas["category"] = pools["category"].first().loc[areas["prompt_id"]].to_numpy()
    ordered = measured.sort_values(column, ascending=False, kind="stable").groupby("prompt_id")[truth.name]
    values = {
        "auc": areas["auc"].to_numpy(),
        "correlation": prompt_correlations(measured, column, truth)["correlation"].to_numpy(),
        f"top1_{truth.name}": ordered.head(1).to_numpy(),
        f"top{top_k}_{truth.name}": ordered.apply(lambda best: best.head(top_k).mean()).to_numpy(),
    }
    row = {"score": name, "evaluations": cost.evaluations, "relative_cost": relative_cost}
    row["milliseconds"] = cost.milliseconds
    for key, of_prompts in values.items():
        row |= {key: float(of_prompts.mean()) if len(of_prompts) else None}
        row |= dict(zip((f"{key}_low", f"{key}_high"), bootstrap_interval(of_prompts), strict=True))
    by_category = areas.groupby("category")["auc"].mean()
    row |= {f"auc_{category}": float(value) for category, value in by_category.items()}
    pooled = float(candidates[truth.name].mean())
    counts = {"candidates": len(measured), "prompts": len(pools), "mixed_prompts": len(areas)}
    return row | counts | {f"pool_{truth.name}": pooled}


def bootstrap_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """95 % percentile interval of the mean over prompts; None if all values are equal."""
    if len(values) < 2 or np.ptp(values) == 0:
        return None, None
    low, high = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(low), float(high)


def gates(rows: list[dict]) -> dict[str, Gate]:
    by_name = {row["score"]: row for row in rows}
    found = {f"auc_{n}": Gate(by_name[n]["auc"] or 0.0, minimum=aim) for n, aim in AIMS.items() if n in by_name}
    free = [r["auc"] or 0.0 for n, r in by_name.items() if n in TRAJECTORY_SCORES]
    if free:
        found["auc_best_on_trajectory"] = Gate(max(free), minimum=0.65)
    worst = max((row["relative_cost"] for n, row in by_name.items() if n in AIMS), default=0.0)
    return found | {"largest_relative_cost": Gate(worst, maximum=MAX_RELATIVE_COST)}


def draw(rows: list[dict], path: Path, truth: Column):
    """Plot quality against cost: AUC and best-ranked images over denoiser evaluations per candidate."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = {"auc": "AUC within prompts", f"top1_{truth.name}": f"mean {label(truth)} of the best-ranked images"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for row in rows:
            if row[key] is None:
                continue
            low, high = row[f"{key}_low"], row[f"{key}_high"]
            error = None if low is None else [[row[key] - low], [high - row[key]]]
            axes.errorbar(row["evaluations"], row[key], yerr=error, fmt="o", capsize=3, label=row["score"])
        axes.set(xlabel="denoiser evaluations per candidate, without generation", ylabel=title)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(SelectionBenchmark)
