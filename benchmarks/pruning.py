"""Gain and loss of pruning: python benchmarks/pruning.py [--out F.json] [--figure F.png] [--check] [--smoke]

For each solver, every candidate is sampled to the end once and scored at all cuts. Candidates are independent of each
other, so the survivors and the cost of every pruning schedule can be computed from this one pool.

The first row is the paper's setting: DDPM, 100 steps, no pruning, selection by the paper's score, which needs no extra
evaluations. Every row reports its loss of alignment relative to this row. The second row uses the same pool, but
selects by `select_by`.
"""

import math
from pathlib import Path

import numpy as np
import torch
from gates import Benchmark, Findings, Gate, LocalPath, main
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt
from torch import Tensor
from tqdm import tqdm

from mi_ray.alignment.metric import Column, Metric, load_metrics
from mi_ray.config import PruneConfig, SamplerConfig, ScoreConfig, ScoreName
from mi_ray.config.command_line import load_config
from mi_ray.config.paths import ModelPath
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.inputs.prompts import read_prompts
from mi_ray.report.columns import heading, is_share
from mi_ray.scoring.machine import keep_memory
from mi_ray.scoring.sampler import Pool, Sampler, derived_seed
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work

CONFIGS = Path(__file__).parent.parent / "jobs" / "configs"
PROMPTS = CONFIGS / "prompts" / "shapes-train.jsonl"
DEMO, _ = load_config(["--config", str(CONFIGS / "shapes-paper.yaml")])
PAPER, PAPER_SCORE = ("ddpm", 100), "mitune"  # MI-TUNE's released code
SETTINGS = (PAPER, ("ddim", 50), ("dpm++2m", 20), ("dpm++2m-sde", 20))
SMOKE_SETTINGS = (("ddpm", 10), ("dpm++2m", 5))
SCORES: tuple[ScoreName, ...] = ("mitune", "trajectory_banded", "pmi", "pmi_negatives")  # scores for the cuts
SCHEDULES = (  # (after, keep): shares of the steps and of the pool
    ((0.2,), (0.5,)),
    ((0.2,), (0.25,)),
    ((0.35,), (0.25,)),
    ((0.2, 0.5), (0.5, 0.125)),
    ((0.1, 0.2, 0.35), (0.5, 0.25, 0.125)),
)
AIM, WITHIN = 6.0, 0.01  # target reduction of evaluations, and allowed loss of top-1 alignment, against the paper


class PruningBenchmark(Benchmark):
    """How many denoiser evaluations does pruning save, and how much alignment does the best image of a prompt lose?"""

    model: ModelPath = Field(
        "shapes", description="the embedded model (shapes) or a diffusers folder, for prompts of the shapes grammar"
    )
    prompts: PositiveInt = Field(60, description="number of prompts, from the demo's training prompts")
    candidates: PositiveInt = Field(DEMO.generate.candidates_per_prompt, description="number of candidates per prompt")
    guidance_scale: float = Field(DEMO.sampler.guidance_scale, gt=1, description="guidance scale of all samplers")
    select_by: ScoreName = Field(DEMO.select.by, description="score that selects the best of the surviving candidates")
    alignment: str = Field(
        DEMO.evaluation.alignment[0], description="metric of image quality; its first column must be a share"
    )
    cut_samples: PositiveInt = Field(1, description="number of noise samples per candidate at a cut, pointwise scores")
    score: ScoreConfig = Field(DEMO.score, description="settings of the scores; the field names is ignored")
    batch_size: PositiveInt = Field(128, description="number of candidates in one denoiser batch")
    seed: int = Field(0, description="seed of the candidates and of the probes")
    figure: LocalPath | None = Field(None, description="PNG file to write: alignment against evaluations")

    def answer(self) -> Findings:
        if self.smoke:
            score = self.score.model_copy(update={"num_samples": 2, "max_negatives": 2})
            small = {"prompts": 4, "candidates": 8, "cut_samples": 1, "score": score, "smoke": False}
            return self.model_copy(update=small)._compare(SMOKE_SETTINGS)
        return self._compare(SETTINGS)

    def _compare(self, settings: tuple[tuple[str, int], ...]) -> Findings:
        count, each = self.prompts, self.candidates
        prompts = read_prompts(str(PROMPTS), field="prompts", limit=count)[0]["prompt"].to_pylist()
        try:
            denoiser = load_denoiser(self.model)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        metric = load_metrics([self.alignment])[self.alignment]
        if not is_share(metric.columns[0]):
            raise ValueError(f"alignment: the first column of {self.alignment!r} is not a share; give another metric")
        truth = metric.columns[0].name
        keep_memory()
        denoiser.specialise(channels_last=True, compiled=None, rows=())
        rows, paper, scored = [], None, None
        for solver, steps in settings:
            recorded = self._record(denoiser, metric, prompts, each, solver, steps)
            if paper is None:  # the first setting
                paper, scored = recorded.best(recorded.paper), recorded.best(recorded.final)
                rows.append(row_of(recorded, truth, solver, steps, PAPER_SCORE, "nothing", "", 2 * steps * each, paper))
            rows += compared(recorded, truth, solver, steps, each, self.select_by)
        results = []
        for row, best in rows:
            lost, of_scored = lost_of(paper, best), lost_of(scored, best)
            results.append(
                {
                    **row,
                    "points_lost": lost[0],
                    "half_interval": lost[1],
                    "points_lost_of_second": of_scored[0],
                    "its_half_interval": of_scored[1],
                    "times_fewer": rows[0][0]["evaluations"] / row["evaluations"],
                }
            )
        if self.figure:
            draw(results, self.figure, metric.columns[0])
        gates = {
            f"times_fewer_within_a_point{name}": Gate(
                max((r["times_fewer"] for r in results if r[column] <= 100 * WITHIN), default=math.nan), minimum=AIM
            )
            for name, column in (("", "points_lost"), ("_of_the_second", "points_lost_of_second"))
        }
        return Findings(results, gates)

    def _record(
        self, denoiser: Denoiser, metric: Metric, prompts: list[str], each: int, solver: str, steps: int
    ) -> "Recorded":
        """Sample all candidates to the end, and score them at all cuts of all schedules."""
        config = SamplerConfig(solver=solver, num_inference_steps=steps, guidance_scale=self.guidance_scale)
        sampler = Sampler(denoiser, config, self.batch_size)
        cut = {name: self._scorer(denoiser, prompts, name, self.cut_samples) for name in SCORES}
        final = self._scorer(denoiser, prompts, self.select_by, self.score.num_samples)
        paper = self._scorer(denoiser, prompts, PAPER_SCORE, 1)
        chunks = []
        at_a_time = max(1, self.batch_size // each)
        for start in tqdm(range(0, len(prompts), at_a_time), desc=f"{solver} {steps}"):
            chunk = prompts[start : start + at_a_time]
            conditioning = denoiser.encode_prompts(chunk)
            seeds = [[derived_seed(self.seed, prompt, c) for c in range(each)] for prompt in chunk]
            recorder = Recorder(cut, chunk, conditioning, cut_steps(steps, each))
            sampled = sampler(conditioning, seeds, Work(), recorder)
            owner, work = torch.arange(len(chunk)).repeat_interleave(each), Work()
            scores = final(chunk, conditioning, owner, sampled, work)[f"score_{self.select_by}"]
            free = paper(chunk, conditioning, owner, sampled, Work())[f"score_{PAPER_SCORE}"]
            truth, flat = metric.columns[0], [p for p in chunk for _ in range(each)]
            worth = truth.sign * np.array(metric.measure(denoiser.decode(sampled.latents), flat)[truth.name])
            cost = work.score_evaluations / len(scores)
            chunks.append({"worth": worth, "final": scores, "paper": free, "cost": cost, "recorder": recorder})

        def joined(parts: list) -> np.ndarray:
            return np.concatenate(parts).reshape(-1, each).astype(float)

        sizes = [len(chunk["worth"]) for chunk in chunks]  # costs differ: prompts have different numbers of negatives
        recorders = [chunk["recorder"] for chunk in chunks]
        return Recorded(
            **{name: joined([chunk[name] for chunk in chunks]) for name in ("worth", "final", "paper")},
            final_cost=np.average([chunk["cost"] for chunk in chunks], weights=sizes),
            cuts={key: joined([recorder.scores[key] for recorder in recorders]) for key in recorders[0].scores},
            cut_costs={
                name: np.average([recorder.costs[name] for recorder in recorders], weights=sizes) for name in SCORES
            },
        )

    def _scorer(self, denoiser: Denoiser, prompts: list[str], name: ScoreName, samples: int) -> Scorer:
        config = self.score.model_copy(update={"names": (name,), "num_samples": samples})
        return Scorer(denoiser, config, self.batch_size, self.seed, prompts)


class Recorder:
    """Records the scores of all candidates at each cut and the cost of each score. It prunes no candidate."""

    def __init__(
        self, scorers: dict[str, Scorer], prompts: list[str], conditioning: Conditioning, after: tuple[int, ...]
    ):
        self.after, self._scorers, self._prompts, self._conditioning = after, scorers, prompts, conditioning
        self.scores: dict[tuple[str, int], list[float]] = {}
        self.costs: dict[str, float] = {}  # evaluations per candidate

    def survivors(self, pool: Pool, rows: Tensor, steps: int) -> Tensor:
        sampled = pool.so_far(rows, steps)
        for name, scorer in self._scorers.items():
            work = Work()
            columns = scorer(self._prompts, self._conditioning, pool.owner, sampled, work)
            self.scores[name, steps] = columns[f"score_{scorer.config.names[0]}"]
            self.costs[name] = work.score_evaluations / len(rows)
        return rows


class Recorded:
    """The pool of one solver: P prompts with C candidates each.

    worth (the metric, higher is better), final, paper and each entry of cuts are (P, C).
    """

    def __init__(
        self, worth: np.ndarray, final: np.ndarray, paper: np.ndarray, final_cost: float, cuts: dict, cut_costs: dict
    ):
        self.worth, self.final, self.paper, self.final_cost = worth, final, paper, final_cost
        self.cuts, self.cut_costs = cuts, cut_costs
        draws = np.random.default_rng(0)
        self.cuts |= {("random", steps): draws.random(worth.shape) for _, steps in list(cuts)}
        self.cut_costs |= {"random": 0.0}

    def survivors(self, name: str, counts: dict[int, int]) -> np.ndarray:
        """(P, C) bool: the candidates that survive all cuts by this score."""
        left = np.ones(self.worth.shape, bool)
        for steps, count in counts.items():
            score = np.where(left, self.cuts[name, steps], -np.inf)
            places = np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1)
            left &= places < count
        return left

    def best(self, scores: np.ndarray) -> np.ndarray:
        """(P,) the worth of the candidate with the highest of these scores, (P, C)."""
        return np.take_along_axis(self.worth, scores.argmax(1)[:, None], 1)[:, 0]


def cut_steps(steps: int, each: int) -> tuple[int, ...]:
    """All steps at which any schedule has a cut, in ascending order."""
    return tuple(sorted({step for schedule in SCHEDULES for step in counts_of(schedule, steps, each)}))


def counts_of(schedule: tuple, steps: int, each: int) -> dict[int, int]:
    after, keep = schedule
    return PruneConfig(by="mitune", after=after, keep=keep).cuts(steps, each)


def compared(
    recorded: Recorded, truth: str, solver: str, steps: int, each: int, select_by: str
) -> list[tuple[dict, np.ndarray]]:
    """One row without pruning, then one per score and schedule; each with the worth of the best images, (P,)."""
    setting = recorded, truth, solver, steps, select_by
    evaluations = each * (2 * steps + recorded.final_cost)
    rows = [row_of(*setting, "nothing", "", evaluations, recorded.best(recorded.final))]
    for name in (*SCORES, "random"):
        for after, keep in SCHEDULES:
            counts = counts_of((after, keep), steps, each)
            left = recorded.survivors(name, counts)
            facing = [each, *counts.values()]
            sampling = 2 * PruneConfig(by="mitune", after=after, keep=keep).candidate_steps(steps, each)
            scoring = sum(facing[:-1]) * recorded.cut_costs[name] + facing[-1] * recorded.final_cost
            best = recorded.best(np.where(left, recorded.final, -np.inf))
            rows.append(row_of(*setting, name, f"{keep} after {after}", sampling + scoring, best))
    return rows


def row_of(
    recorded: Recorded,
    truth: str,
    solver: str,
    steps: int,
    select_by: str,
    prune_by: str,
    schedule: str,
    evaluations: float,
    best: np.ndarray,
) -> tuple[dict, np.ndarray]:
    """A row of the table. `evaluations` is the total per prompt; pool_<column> is equal for all rows of a pool."""
    row = {
        "solver": solver,
        "steps": steps,
        "select_by": select_by,
        "prune_by": prune_by,
        "schedule": schedule,
        "evaluations": evaluations,
        f"top1_{truth}": best.mean(),
        f"pool_{truth}": recorded.worth.mean(),
    }
    return row, best


def lost_of(reference: np.ndarray, best: np.ndarray) -> tuple[float, float]:
    """Mean loss of `best` against `reference`, (P,) each, in percentage points, and half the width of its paired 95 %
    interval over prompts."""
    difference = reference - best
    return 100 * difference.mean(), 196 * difference.std(ddof=1) / len(difference) ** 0.5


def draw(rows: list[dict], path: Path, column: Column):
    """Plot the alignment of the best images against evaluations: one panel per solver, one colour per score."""
    solvers = list(dict.fromkeys((row["solver"], row["steps"]) for row in rows))
    figure = Figure((4.2 * len(solvers), 3.8), layout="constrained")
    panels = figure.subplots(1, len(solvers), sharey=True, squeeze=False)[0]
    for axes, (solver, steps) in zip(panels, solvers, strict=True):
        of_solver = [row for row in rows[1:] if (row["solver"], row["steps"]) == (solver, steps)]
        for name in dict.fromkeys(row["prune_by"] for row in of_solver):
            of_score = sorted((r for r in of_solver if r["prune_by"] == name), key=lambda r: r["evaluations"])
            axes.plot(
                [row["evaluations"] for row in of_score],
                [100 * row[f"top1_{column.name}"] for row in of_score],
                "k*" if name == "nothing" else "o:",
                label="no pruning" if name == "nothing" else name,
            )
        axes.axhline(100 * rows[0][f"top1_{column.name}"], color="grey", linewidth=0.8, label="the paper's setting")
        axes.set(xscale="log", title=f"{solver}, {steps} steps", xlabel="denoiser evaluations per prompt")
    panels[0].set_ylabel(f"best of the pool: {heading(column)}")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(PruningBenchmark)
