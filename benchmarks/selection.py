"""Quality and cost of the scores: python benchmarks/selection.py [--out F.json] [--figure F.png] [--smoke]

For one pool of the embedded model and every score: how well the score separates better from worse images of a prompt
according to a metric, how good its best-ranked image is, and how many denoiser evaluations it needs in addition to
those for generating a candidate.
"""

from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from gates import Benchmark, Findings, Gate, LocalPath, main
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt
from scipy.stats import bootstrap
from tqdm import tqdm

from mi_ray.alignment.metric import Column, Metric, load_metrics
from mi_ray.config import TRAJECTORY_SCORES, SamplerConfig, ScoreConfig, ScoreName
from mi_ray.config.command_line import load_config
from mi_ray.config.paths import ModelPath
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.prompts import read_prompts
from mi_ray.report.columns import label
from mi_ray.report.statistics import prompt_aucs
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
MAX_RELATIVE_COST = 1.5  # evaluations of a score, relative to those for generating the candidate


class SelectionBenchmark(Benchmark):
    """Which score finds the best images of a prompt, and what does it cost?"""

    model: ModelPath = Field(
        "shapes", description="the embedded model (shapes) or a diffusers folder, for prompts of the shapes grammar"
    )
    prompts: PositiveInt = Field(150, description="number of prompts, from the demo's training prompts")
    candidates: PositiveInt = Field(16, description="number of candidates per prompt")
    alignment: str = Field(DEMO.evaluation.alignment[0], description="metric that the scores are compared with")
    sampler: SamplerConfig = SamplerConfig(solver="dpm++2m", num_inference_steps=20, guidance_scale=1.5)
    scores: tuple[ScoreName, ...] = Field(
        get_args(ScoreName), description="scores to compare, each with its own settings"
    )
    batch_size: PositiveInt = Field(128, description="number of candidates in one denoiser batch")
    seed: int = Field(0, description="seed of the candidates and of the probes")
    figure: LocalPath | None = Field(None, description="PNG file to write: quality against cost")

    def answer(self) -> Findings:
        count, each = (12, 6) if self.smoke else (self.prompts, self.candidates)
        table, _ = read_prompts(str(PROMPTS), field="prompts")
        candidates, costs, sampling = self._pool(table.slice(0, count), table["prompt"].to_pylist(), each)
        truth = self._metric.columns[0]
        rows = [findings(candidates, f"score_{n}", n, costs[n], costs[n] / sampling, truth) for n in self.scores]
        best = candidates.assign(best=truth.sign * candidates[truth.name])
        rows += [findings(best, c, n, 0, 0.0, truth) for n, c in {self.alignment: "best", "random": "random"}.items()]
        if self.figure:
            draw(rows, self.figure, truth)
        return Findings(rows, gates(rows))

    @cached_property
    def _metric(self) -> Metric:
        return load_metrics([self.alignment])[self.alignment]

    @torch.inference_mode()
    def _pool(self, table, others: list[str], each: int) -> tuple[pd.DataFrame, dict[str, int], int]:
        """The candidates with their scores; denoiser evaluations per candidate for every score, and for sampling.

        Args:
            others: prompts among which the neighbours of a prompt are searched: the whole list.
        """
        denoiser = load_denoiser(self.model)
        keep_memory()
        denoiser.specialise(channels_last=True, compiled=None, rows=())
        sampler = Sampler(denoiser, self.sampler, self.batch_size)
        everything = table["prompt"].to_pylist()
        one = {name: ScoreConfig(names=(name,), **SETTINGS.get(name, {})) for name in self.scores}
        scorers = {name: Scorer(denoiser, one[name], self.batch_size, self.seed, others) for name in one}
        parts, spent, sampled = [], dict.fromkeys(one, 0), Work()
        for start in tqdm(range(0, len(everything), PROMPTS_AT_A_TIME), unit_scale=PROMPTS_AT_A_TIME, unit=" prompts"):
            prompts = everything[start : start + PROMPTS_AT_A_TIME]
            ids = table["prompt_id"].to_pylist()[start : start + PROMPTS_AT_A_TIME]
            conditioning = denoiser.encode_prompts(prompts)
            index = torch.arange(len(prompts)).repeat_interleave(each)
            seeds = [[derived_seed(self.seed, "round-0", i, c) for c in range(each)] for i in ids]
            trajectory = sampler(conditioning, seeds, sampled)
            flat = [p for p in prompts for _ in range(each)]
            columns = {
                "prompt_id": np.repeat(ids, each),
                "category": np.repeat(table["category"].to_pylist()[start : start + PROMPTS_AT_A_TIME], each),
                **self._metric.measure(denoiser.decode(trajectory.latents), flat),
                "random": [np.random.default_rng(seed).random() for of_prompt in seeds for seed in of_prompt],
            }
            for name, scorer in scorers.items():
                work = Work()
                columns |= scorer(prompts, conditioning, index, trajectory, work)
                spent[name] += work.score_evaluations
            parts.append(pd.DataFrame(columns))
        candidates = pd.concat(parts, ignore_index=True)
        costs = {name: round(total / len(candidates)) for name, total in spent.items()}
        return candidates, costs, round(sampled.denoiser_evaluations / len(candidates))


def findings(candidates: pd.DataFrame, column: str, name: str, cost: int, relative_cost: float, truth: Column) -> dict:
    """The row of a score: AUC within prompts and mean metric of the best-ranked images, with bootstrap intervals."""
    pools = candidates.groupby("prompt_id")
    areas = prompt_aucs(candidates.assign(round=0), column, truth)
    areas["category"] = pools["category"].first().loc[areas["prompt_id"]].to_numpy()
    first = candidates.loc[pools[column].idxmax(), truth.name].to_numpy()
    row = {"score": name, "evaluations": cost, "relative_cost": relative_cost}
    for key, values in (("auc", areas["auc"].to_numpy()), (f"top1_{truth.name}", first)):
        row |= {key: float(values.mean()) if len(values) else None}
        row |= dict(zip((f"{key}_low", f"{key}_high"), bootstrap_interval(values), strict=True))
    by_category = areas.groupby("category")["auc"].mean()
    row |= {f"auc_{category}": float(value) for category, value in by_category.items()}
    pooled = float(candidates[truth.name].mean())
    return row | {"prompts": len(pools), "mixed_prompts": len(areas), f"pool_{truth.name}": pooled}


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
    worst = max(row["relative_cost"] for row in rows)
    return found | {"largest_relative_cost": Gate(worst, maximum=MAX_RELATIVE_COST)}


def draw(rows: list[dict], path: Path, truth: Column):
    """Plot quality against cost: AUC and best-ranked images over denoiser evaluations per candidate."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = {"auc": "AUC within prompts", f"top1_{truth.name}": f"mean {label(truth)} of the best-ranked images"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for row in rows:
            if row[key] is None or row["score"] not in (*get_args(ScoreName), "random"):
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
