"""What pruning saves and loses: python benchmarks/pruning.py [--out F.json] [--figure F.png] [--check] [--smoke]

Every candidate is sampled to the end once for each solver, and scored at all cuts on the way. Since a candidate depends
on nothing but itself, every schedule's survivors, and what it would have cost, follow from that one pool.
"""

from pathlib import Path

import numpy as np
import torch
from gates import Benchmark, Findings, Gate, main
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt
from torch import Tensor
from tqdm import tqdm

from mi_ray.alignment.oracle import measure
from mi_ray.config import PruneConfig, SamplerConfig, ScoreConfig, ScoreName, load_config
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.prompts import read_prompts
from mi_ray.stages.candidates import Pool, Sampler, Scorer, Work, derived_seed
from mi_ray.stages.memory import keep_memory

CONFIGS = Path(__file__).parent.parent / "jobs" / "configs"
PROMPTS = CONFIGS / "prompts" / "shapes-train.jsonl"
DEMO, _ = load_config(["--config", str(CONFIGS / "shapes.yaml")])
PROMPTS_AT_A_TIME = 8
PAPER = ("ddpm", 100)  # MI-TUNE's released code
SETTINGS = (PAPER, ("ddim", 50), ("dpm++2m", 20))
SMOKE_SETTINGS = (("ddpm", 10), ("dpm++2m", 5))
SCORES: tuple[ScoreName, ...] = ("mitune", "trajectory_banded", "pmi", "pmi_negatives")  # by which the cuts are made
SCHEDULES = (  # (after, keep): shares of the steps and of the pool
    ((0.2,), (0.5,)),
    ((0.2,), (0.25,)),
    ((0.35,), (0.25,)),
    ((0.2, 0.5), (0.5, 0.125)),
    ((0.1, 0.2, 0.35), (0.5, 0.25, 0.125)),
)
AIM, WITHIN = 6.0, 0.01  # times fewer evaluations than the paper's setting, at a top-1 alignment within this of it


class PruningBenchmark(Benchmark):
    """How many denoiser evaluations does pruning save, and what does it cost in the alignment of each prompt's best?"""

    model: str = Field("shapes", description="a shipped model or a diffusers folder, for prompts of the shapes grammar")
    prompts: PositiveInt = Field(60, description="taken from the demo's training prompts, the categories in turn")
    candidates: PositiveInt = Field(DEMO.generate.candidates_per_prompt, description="per prompt")
    guidance_scale: float = Field(DEMO.sampler.guidance_scale, gt=1, description="of all samplers")
    select_by: ScoreName = Field(DEMO.select.by, description="score of the survivors, by which the best is taken")
    cut_samples: PositiveInt = Field(1, description="noise draws a candidate at a cut, pointwise scores")
    score: ScoreConfig = Field(DEMO.score, description="settings of the scores, the demo's; its names are not read")
    batch_size: PositiveInt = Field(128, description="candidates in one denoiser batch")
    seed: int = Field(0, description="of the candidates and of the probes")
    figure: Path | None = Field(None, description="PNG to draw: alignment against evaluations")

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
        keep_memory()
        denoiser.specialise(channels_last=True, compiled=None, rows=())
        rows, reference = [], None
        for solver, steps in settings:
            recorded = self._record(denoiser, prompts, each, solver, steps)
            if reference is None:  # the first setting without pruning
                reference = recorded.best(np.ones(recorded.exact.shape, bool))
            rows += compared(recorded, solver, steps, each, reference)
        for row in rows:  # the paper's own score takes no evaluations
            row["times_fewer"] = 2 * settings[0][1] * each / row["evaluations"]
        if self.figure:
            draw(rows, rows[0], self.figure)
        good = [row["times_fewer"] for row in rows if row["points_lost"] <= 100 * WITHIN]
        return Findings(rows, {"times_fewer_within_a_point": Gate(max(good), minimum=AIM)})

    def _record(self, denoiser: Denoiser, prompts: list[str], each: int, solver: str, steps: int) -> "Recorded":
        """Sample everything to the end, scoring at all cuts that any schedule makes."""
        config = SamplerConfig(solver=solver, num_inference_steps=steps, guidance_scale=self.guidance_scale)
        sampler = Sampler(denoiser, config, self.batch_size)
        cut = {name: self._scorer(denoiser, prompts, name, self.cut_samples) for name in SCORES}
        final = self._scorer(denoiser, prompts, self.select_by, self.score.num_samples)
        chunks = []
        for start in tqdm(range(0, len(prompts), PROMPTS_AT_A_TIME), desc=f"{solver} {steps}"):
            chunk = prompts[start : start + PROMPTS_AT_A_TIME]
            embeddings = denoiser.encode_prompts(chunk)
            seeds = [[derived_seed(self.seed, prompt, c) for c in range(each)] for prompt in chunk]
            recorder = Recorder(cut, chunk, embeddings, cut_steps(steps, each))
            sampled = sampler(embeddings, seeds, Work(), recorder)
            owner, work = torch.arange(len(chunk)).repeat_interleave(each), Work()
            (scores,) = final(chunk, embeddings, owner, sampled, work).values()
            exact = measure(denoiser.decode(sampled.latents), [p for p in chunk for _ in range(each)])["exact"]
            chunks.append((recorder, scores, exact, work.score_evaluations / len(scores)))
        return Recorded(
            exact=np.concatenate([exact for _, _, exact, _ in chunks]).reshape(-1, each).astype(float),
            final=np.concatenate([scores for _, scores, _, _ in chunks]).reshape(-1, each),
            final_cost=np.average([cost for *_, cost in chunks], weights=[len(scores) for _, scores, *_ in chunks]),
            cuts={
                key: np.concatenate([recorder.scores[key] for recorder, *_ in chunks]).reshape(-1, each)
                for key in chunks[0][0].scores
            },
            cut_costs={
                name: np.average(
                    [recorder.costs[name] for recorder, *_ in chunks], weights=[len(scores) for _, scores, *_ in chunks]
                )
                for name in SCORES
            },  # a prompt has its own number of negatives
        )

    def _scorer(self, denoiser: Denoiser, prompts: list[str], name: ScoreName, samples: int) -> Scorer:
        config = self.score.model_copy(update={"names": (name,), "num_samples": samples})
        return Scorer(denoiser, config, self.batch_size, self.seed, prompts)


class Recorder:
    """Cuts that cut nothing: the scores that every candidate has at each of them, and what each score costs."""

    def __init__(self, scorers: dict[str, Scorer], prompts: list[str], embeddings: Tensor, after: tuple[int, ...]):
        self.after, self._scorers, self._prompts, self._embeddings = after, scorers, prompts, embeddings
        self.scores: dict[tuple[str, int], list[float]] = {}
        self.costs: dict[str, float] = {}  # evaluations a candidate

    def survivors(self, pool: Pool, rows: Tensor, steps: int) -> Tensor:
        sampled = pool.so_far(rows, steps)
        for name, scorer in self._scorers.items():
            work = Work()
            (self.scores[name, steps],) = scorer(self._prompts, self._embeddings, pool.owner, sampled, work).values()
            self.costs[name] = work.score_evaluations / len(rows)
        return rows


class Recorded:
    """One solver's pool of P prompts with C candidates each: exact, final and each of cuts are (P, C)."""

    def __init__(self, exact: np.ndarray, final: np.ndarray, final_cost: float, cuts: dict, cut_costs: dict):
        self.exact, self.final, self.final_cost = exact, final, final_cost
        self.cuts, self.cut_costs = cuts, cut_costs
        draws = np.random.default_rng(0)
        self.cuts |= {("random", steps): draws.random(exact.shape) for _, steps in list(cuts)}
        self.cut_costs |= {"random": 0.0}

    def survivors(self, name: str, counts: dict[int, int]) -> np.ndarray:
        """(P, C) bool: who is left after all cuts by that score."""
        left = np.ones(self.exact.shape, bool)
        for steps, count in counts.items():
            worth = np.where(left, self.cuts[name, steps], -np.inf)
            places = np.argsort(np.argsort(-worth, axis=1, kind="stable"), axis=1)
            left &= places < count
        return left

    def best(self, left: np.ndarray) -> np.ndarray:
        """(P,) whether the best of those left, by the final score, is exact."""
        chosen = np.where(left, self.final, -np.inf).argmax(1)
        return np.take_along_axis(self.exact, chosen[:, None], 1)[:, 0]


def cut_steps(steps: int, each: int) -> tuple[int, ...]:
    """All steps at which some schedule cuts, in order."""
    return tuple(sorted({step for schedule in SCHEDULES for step in counts_of(schedule, steps, each)}))


def counts_of(schedule: tuple, steps: int, each: int) -> dict[int, int]:
    after, keep = schedule
    return PruneConfig(by="mitune", after=after, keep=keep).cuts(steps, each)


def compared(recorded: Recorded, solver: str, steps: int, each: int, reference: np.ndarray) -> list[dict]:
    """One row without pruning, then one for every score and schedule; evaluations are per prompt, of all kinds.

    `points_lost` are of the reference's best (P,), with the half of its 95 % interval over prompts (paired).
    """
    whole = recorded.best(np.ones(recorded.exact.shape, bool))
    setting = {"solver": solver, "steps": steps}
    rows = [
        {
            **setting,
            "prune_by": "nothing",
            "schedule": "",
            "evaluations": each * (2 * steps + recorded.final_cost),
            "top1_exact": whole.mean(),
            **lost(reference, whole),
            "pool_exact": recorded.exact.mean(),
        }
    ]
    for name in (*SCORES, "random"):
        for after, keep in SCHEDULES:
            counts = counts_of((after, keep), steps, each)
            best = recorded.best(recorded.survivors(name, counts))
            facing = [each, *counts.values()]
            sampling = 2 * PruneConfig(by="mitune", after=after, keep=keep).candidate_steps(steps, each)
            rows.append(
                {
                    **setting,
                    "prune_by": name,
                    "schedule": f"{keep} after {after}",
                    "evaluations": sampling
                    + sum(facing[:-1]) * recorded.cut_costs[name]
                    + facing[-1] * recorded.final_cost,
                    "top1_exact": best.mean(),
                    **lost(reference, best),
                }
            )
    return rows


def lost(reference: np.ndarray, best: np.ndarray) -> dict[str, float]:
    """Percentage points of prompts whose best is exact, that `reference` has more than `best`, (P,) each."""
    difference = reference - best
    return {
        "points_lost": 100 * difference.mean(),
        "half_interval": 196 * difference.std(ddof=1) / len(difference) ** 0.5,
    }


def draw(rows: list[dict], reference: dict, path: Path):
    """Alignment of the best against evaluations: a panel a solver, a colour a score."""
    solvers = list(dict.fromkeys((row["solver"], row["steps"]) for row in rows))
    figure = Figure((4.2 * len(solvers), 3.8), layout="constrained")
    panels = figure.subplots(1, len(solvers), sharey=True, squeeze=False)[0]
    for axes, (solver, steps) in zip(panels, solvers, strict=True):
        of_solver = [row for row in rows if (row["solver"], row["steps"]) == (solver, steps)]
        for name in dict.fromkeys(row["prune_by"] for row in of_solver):
            of_score = sorted((r for r in of_solver if r["prune_by"] == name), key=lambda r: r["evaluations"])
            axes.plot(
                [row["evaluations"] for row in of_score],
                [100 * row["top1_exact"] for row in of_score],
                "k*" if name == "nothing" else "o:",
                label="no pruning" if name == "nothing" else name,
            )
        axes.axhline(100 * reference["top1_exact"], color="grey", linewidth=0.8)
        axes.set(xscale="log", title=f"{solver}, {steps} steps", xlabel="denoiser evaluations a prompt")
    panels[0].set_ylabel("best of the pool exact, %")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(PruningBenchmark)
