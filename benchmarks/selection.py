"""Which score selects best, and at what cost: python benchmarks/selection.py [--out F.json] [--figure F.png] [--smoke]

On one pool of the embedded model: every score, how well it tells the exact images of a prompt from the others, how
often its first choice is exact, and how many denoiser evaluations it costs beside those of generating the candidate.
"""

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

from mi_ray.alignment.oracle import measure
from mi_ray.config import POINTWISE_SCORES, SamplerConfig, ScoreConfig, ScoreName
from mi_ray.config.paths import ModelPath
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.prompts import read_prompts
from mi_ray.report.statistics import auc
from mi_ray.scoring.machine import keep_memory
from mi_ray.scoring.sampler import Sampler, derived_seed
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work

PROMPTS = Path(__file__).parent.parent / "jobs" / "configs" / "prompts" / "shapes-train.jsonl"
PROMPTS_AT_A_TIME = 8
# Each at settings that suit it, found on prompts that are not among those of this benchmark (301 to 360 of the file).
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
MAX_RELATIVE_COST = 1.5  # of a score's evaluations to those of generating the candidate


class SelectionBenchmark(Benchmark):
    """Which score finds the exact images of a prompt, and what does it cost?"""

    model: ModelPath = Field(
        "shapes", description="a shipped model or a diffusers folder, for prompts of the shapes grammar"
    )
    prompts: PositiveInt = Field(150, description="taken from the demo's training prompts, the categories in turn")
    candidates: PositiveInt = Field(16, description="per prompt")
    sampler: SamplerConfig = SamplerConfig(solver="dpm++2m", num_inference_steps=20, guidance_scale=1.5)
    scores: tuple[ScoreName, ...] = Field(get_args(ScoreName), description="to compare, each at its own settings")
    batch_size: PositiveInt = Field(128, description="candidates in one denoiser batch")
    seed: int = Field(0, description="of the candidates and of the probes")
    figure: LocalPath | None = Field(None, description="PNG to draw: quality against cost")

    def answer(self) -> Findings:
        count, each = (12, 6) if self.smoke else (self.prompts, self.candidates)
        table, _ = read_prompts(str(PROMPTS), field="prompts")
        candidates, costs, sampling = self._pool(table.slice(0, count), table["prompt"].to_pylist(), each)
        rows = [findings(candidates, f"score_{n}", n, costs[n], costs[n] / sampling) for n in self.scores]
        rows += [
            findings(candidates, column, n, 0, 0.0) for n, column in {"oracle": "exact", "random": "random"}.items()
        ]
        if self.figure:
            draw(rows, self.figure)
        return Findings(rows, gates(rows))

    @torch.inference_mode()
    def _pool(self, table, others: list[str], each: int) -> tuple[pd.DataFrame, dict[str, int], int]:
        """The candidates with their scores; denoiser evaluations a candidate of every score, and of sampling.

        others: prompts among which a prompt's neighbours are sought, the user's whole list.
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
                "exact": np.array(measure(denoiser.decode(trajectory.latents), flat)["exact"]),
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


def findings(candidates: pd.DataFrame, column: str, name: str, cost: int, relative_cost: float) -> dict:
    """A score's row: AUC within prompts, share of exact first choices, both with bootstrap intervals over prompts."""
    pools = [pool for _, pool in candidates.groupby("prompt_id")]
    mixed = [pool for pool in pools if 0 < pool["exact"].mean() < 1]
    areas = pd.DataFrame(
        [(pool["category"].iat[0], auc(pool[column].to_numpy(), pool["exact"].to_numpy() == 1)) for pool in mixed],
        columns=["category", "auc"],
    )
    first = np.array([pool["exact"].to_numpy()[pool[column].to_numpy().argmax()] for pool in pools])
    row = {"score": name, "evaluations": cost, "relative_cost": relative_cost}
    for label, values in (("auc", areas["auc"].to_numpy()), ("top1_exact", first)):
        row |= {label: float(values.mean()) if len(values) else None}
        row |= dict(zip((f"{label}_low", f"{label}_high"), bootstrap_interval(values), strict=True))
    by_category = areas.groupby("category")["auc"].mean()
    row |= {f"auc_{category}": float(value) for category, value in by_category.items()}
    return row | {"prompts": len(pools), "mixed_prompts": len(mixed), "pool_exact": float(candidates["exact"].mean())}


def bootstrap_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """95 % percentile interval of the mean over prompts; None of values that do not differ."""
    if len(values) < 2 or np.ptp(values) == 0:
        return None, None
    low, high = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(low), float(high)


def gates(rows: list[dict]) -> dict[str, Gate]:
    by_name = {row["score"]: row for row in rows}
    found = {f"auc_{n}": Gate(by_name[n]["auc"] or 0.0, minimum=aim) for n, aim in AIMS.items() if n in by_name}
    free = [r["auc"] or 0.0 for n, r in by_name.items() if n not in (*POINTWISE_SCORES, "oracle", "random")]
    if free:
        found["auc_best_on_trajectory"] = Gate(max(free), minimum=0.65)
    worst = max(row["relative_cost"] for row in rows)
    return found | {"largest_relative_cost": Gate(worst, maximum=MAX_RELATIVE_COST)}


def draw(rows: list[dict], path: Path):
    """Quality against cost: AUC and first choices over denoiser evaluations a candidate."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = {"auc": "AUC within prompts", "top1_exact": "first choices that are exact"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for row in rows:
            if row[key] is None or row["score"] == "oracle":
                continue
            low, high = row[f"{key}_low"], row[f"{key}_high"]
            error = None if low is None else [[row[key] - low], [high - row[key]]]
            axes.errorbar(row["evaluations"], row[key], yerr=error, fmt="o", capsize=3, label=row["score"])
        axes.set(xlabel="denoiser evaluations a candidate, beside generating it", ylabel=title)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(SelectionBenchmark)
