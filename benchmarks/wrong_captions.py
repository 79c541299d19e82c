"""Detection of wrong captions: python benchmarks/wrong_captions.py [--own] [--out FILE.json] [--check] [--smoke]

Without --own, images are rendered. With --own, the model makes them (the Self-Bench protocol of Jeong et al. 2025,
arXiv 2505.17955): a diffusion model scores its own images better than images of another source.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gates import Benchmark, Findings, Gate, main, metric_details
from pydantic import Field, PositiveInt
from pydantic_settings import CliToggleFlag

from mi_ray.alignment.metric import Metric, check_prompts, load_metrics, measure
from mi_ray.config import SamplerConfig, ScoreConfig
from mi_ray.config.metrics import MetricName, MetricNames
from mi_ray.config.paths import LocalOrUri, ModelPath
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.diffusion.sampling import Trajectory
from mi_ray.inputs.pair_config import PairScoreConfig
from mi_ray.inputs.prompts import read_prompts
from mi_ray.inputs.shard_plan import with_details
from mi_ray.language.sources import negatives_by
from mi_ray.report.statistics import auc
from mi_ray.scoring.machine import keep_memory
from mi_ray.scoring.pair_scorer import PairScorer
from mi_ray.scoring.sampler import Sampler, derived_seed
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work
from mi_ray.shapes.grammar import CATEGORIES, FORMS, SceneSpec, draw_scene, is_unseen_combination, sample_spec, sentence
from mi_ray.shapes.model import corrupt
from mi_ray.shapes.oracle import score
from mi_ray.shapes.scenes import render

SMOKE_PAIRS = 24
RESAMPLES = 1000
AT_ONCE = 50  # pairs per group, which limits memory
MOST_TURNS = 20  # images per prompt, with --own


PROMPTS = Path(__file__).parent.parent / "jobs" / "configs" / "prompts" / "shapes-test.jsonl"
WORST = 0.01  # share of the pairs that a user looks at first


class WrongCaptionsBenchmark(Benchmark):
    """How well does each score, and each judge, separate captions with one error from correct captions?"""

    model: ModelPath = Field("shapes", description="the embedded model (shapes) or a diffusers folder")
    own: CliToggleFlag[bool] = Field(
        False, description="images that the model makes for prompts of `file`, instead of rendered images"
    )
    file: LocalOrUri = Field(str(PROMPTS), description="with own: prompt file")
    sampler: SamplerConfig = Field(
        SamplerConfig(solver="dpm++2m", num_inference_steps=20, guidance_scale=4), description="with own: the sampler"
    )
    alignment: MetricName | None = Field(
        "oracle",
        description="with own: only images are used for which the first column of this metric is 1; none: all images",
    )
    pairs: PositiveInt = Field(200, description="number of images with a caption; rendered: the categories in turn")
    wrong_share: float = Field(0.3, gt=0, lt=1, description="share of wrong captions among the pairs")
    prevalence: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="share of wrong captions for which precision and recall are given; the pairs are weighted",
    )
    score: PairScoreConfig = Field(PairScoreConfig(), description="settings of the scores, as in jobs/score.py")
    cheaper: tuple[PositiveInt, ...] = Field(
        (1, 3, 5),
        description="numbers of noise samples of further values of pmi and margin, which take less time",
    )
    judges: MetricNames = Field((), description="metrics as controls, by their first columns: a name or a list")
    seed: int = Field(30_000, description="seed of the pairs, different from the seeds of training")

    def answer(self) -> Findings:
        try:
            denoiser = load_denoiser(self.model)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        keep_memory()
        count = SMOKE_PAIRS if self.smoke else self.pairs
        judges, truth = load_metrics(self.judges), self._truth()
        pairs = self._own_pairs(denoiser, count, truth) if self.own else draw_pairs(count, self.wrong_share, self.seed)
        check_prompts(judges, [pair.caption for pair in pairs])
        scored, selectors = score_all(denoiser, self.score, pairs)
        for samples in self.cheaper:
            config = self.score.model_copy(update={"num_samples": samples, "shortlist": None})
            found = score_pairs(denoiser, config, pairs)[1]
            selectors |= {f"{name}, {samples} samples": found[name] for name in ("pmi", "margin")}
        selectors |= {name: judge_all(name, metric, pairs) for name, metric in judges.items()}
        rng = np.random.default_rng(0)
        wrong = np.array([pair.kind is not None for pair in pairs])
        kinds = sorted({pair.kind for pair in pairs if pair.kind})
        rows = []
        for name, selector in selectors.items():
            for kind in ("all", *kinds):
                of_kind = wrong if kind == "all" else np.array([pair.kind == kind for pair in pairs])
                row = {"score": name, "corruption": kind, "wrong": int(of_kind.sum()), "right": int((~wrong).sum())}
                value, low, high = with_interval(auc_of_right, selector.values, of_kind, ~wrong, rng)
                row |= {"auc": value, "low": low, "high": high}
                if kind == "all":
                    row |= self._at_prevalence(selector.values, wrong, rng)
                    row |= {"evaluations_per_pair": selector.evaluations, "seconds_per_pair": selector.seconds}
                rows.append(row)
        rows += [verdict_row(pairs, scored, kind) for kind in ("all", *kinds)]
        best = max(row["auc"] for row in rows if row.get("corruption") == "all" and row["score"] in ("pmi", "margin"))
        gates = {"auc_of_the_best_score": Gate(best, minimum=0.95)}
        return Findings(rows, gates, {"judges": metric_details(judges)})

    def _truth(self) -> dict[str, Metric]:
        """The metric that says which images follow their prompts; empty without one.

        Raises:
            ValueError: its first column is not a yes or no.
        """
        truth = load_metrics([self.alignment] if self.own and self.alignment else [])
        for metric in truth.values():
            if metric.columns[0].unit != "yes/no":
                raise ValueError(
                    f"alignment: {self.alignment!r} does not answer with yes or no whether an image follows its prompt;"
                    " give oracle, geneval-port or none"
                )
        return truth

    def _at_prevalence(self, values: np.ndarray, wrong: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
        """Area under precision-recall and precision among the worst, with bootstrap intervals."""

        def area(wrong: np.ndarray, right: np.ndarray) -> float:
            return precision_recall(wrong, right, self.prevalence)[0]

        def precision(wrong: np.ndarray, right: np.ndarray) -> float:
            return precision_recall(wrong, right, self.prevalence)[1]

        found = {}
        for name, measured in (("area_precision_recall", area), ("precision_worst", precision)):
            found[name], low, high = with_interval(measured, values, wrong, ~wrong, rng)
            found |= {f"{name}_low": low, f"{name}_high": high}
        return found

    def _own_pairs(self, denoiser: Denoiser, count: int, truth: dict[str, Metric]) -> "list[LabelledPair]":
        """Images of the model for the prompts of the file, one seed after another, until there are enough.

        Raises:
            ValueError: no prompt has a hard negative, or too few images follow their prompts.
        """
        prompts = with_details(read_prompts(self.file, field="file", duplicates="drop")[0])
        make = negatives_by(self.score.negatives)
        negatives = {prompt: found for prompt in prompts if (found := make(prompt))}
        if not negatives:
            raise ValueError("file: none of its prompts can be changed into a hard negative; give other prompts")
        check_prompts(truth, list(negatives))
        rng = np.random.default_rng(self.seed)
        wrongs, pairs = rng.permutation(count) < round(count * self.wrong_share), []
        sampler = Sampler(denoiser, self.sampler, AT_ONCE)
        changeable = list(negatives)
        order = [changeable[place] for place in rng.permutation(len(changeable))]
        for turn in range(MOST_TURNS):
            for start in range(0, len(order), AT_ONCE):
                chunk = order[start : start + AT_ONCE]
                images = generated(denoiser, sampler, chunk, self.seed + turn)
                for image, prompt, right in zip(images, chunk, follows(truth, images, chunk), strict=True):
                    if not right or len(pairs) == count:
                        continue
                    if wrongs[len(pairs)]:
                        other = negatives[prompt][rng.integers(len(negatives[prompt]))]
                        pairs.append(LabelledPair(image, other.prompt, other.attribute))
                    else:
                        pairs.append(LabelledPair(image, prompt, None))
                if len(pairs) == count:
                    return pairs
        raise ValueError(
            f"alignment: after {MOST_TURNS} images of each prompt, only {len(pairs)} of {count} follow their prompts;"
            " give fewer pairs or more prompts"
        )


def generated(denoiser: Denoiser, sampler: Sampler, prompts: list[str], seed: int) -> np.ndarray:
    """An image of the model for each of n prompts: (n, h, w, 3) uint8."""
    with torch.inference_mode():
        seeds = [[derived_seed(seed, prompt)] for prompt in prompts]
        return denoiser.decode(sampler(denoiser.encode_prompts(prompts), seeds, Work()).latents)


def follows(truth: dict[str, Metric], images: np.ndarray, prompts: list[str]) -> list[bool]:
    """Whether the first column of the metric is 1 for each image. Without a metric: always."""
    if not truth:
        return [True] * len(prompts)
    column = next(iter(truth.values())).columns[0]
    return [value == 1 for value in measure(truth, images, prompts)[column.name]]


@dataclass(frozen=True)
class LabelledPair:
    """An image, its caption, and the kind of error in the caption; None: the caption is correct."""

    image: np.ndarray
    caption: str
    kind: str | None


def corruption(spec: SceneSpec, described: SceneSpec) -> str:
    """The kind of difference between the shown scene `spec` and the caption `described`."""
    if len(spec.objects) != len(described.objects):
        return "object"
    if spec.relation != described.relation:
        return "relation"
    changed = [(a, b) for a, b in zip(spec.objects, described.objects, strict=True) if a != b]
    before, after = changed[0]
    names = [key for key in ("count", "shape", "color", "texture") if getattr(before, key) != getattr(after, key)]
    return f"{names[0]} swap" if len(changed) > 1 else names[0]


def draw_pairs(count: int, wrong_share: float, seed: int) -> list[LabelledPair]:
    """Rendered images of scenes as in training, without unseen combinations. The oracle confirms which captions are
    wrong."""
    rng = np.random.default_rng(seed)
    wrongs = rng.permutation(count) < round(count * wrong_share)
    pairs = []
    while len(pairs) < count:
        wrong = wrongs[len(pairs)]
        spec = sample_spec(CATEGORIES[len(pairs) % len(CATEGORIES)], rng)
        described = corrupt(spec, rng) if wrong else spec
        if any(is_unseen_combination(o) for s in (spec, described) for o in s.objects):
            continue
        image = render(draw_scene(spec, rng))
        if score(image, described).exact != float(not wrong):
            continue  # the wrong caption is true by chance: a random attribute matches it
        caption = sentence(described, str(rng.choice(FORMS[described.structure])))
        pairs.append(LabelledPair(image, caption, corruption(spec, described) if wrong else None))
    return pairs


@dataclass(frozen=True)
class Selector:
    """What a score says about n pairs, and what it costs per pair."""

    values: np.ndarray  # (n,), higher: the caption fits better; -inf: no value
    evaluations: int
    seconds: float


def score_pairs(
    denoiser: Denoiser, config: PairScoreConfig, pairs: list[LabelledPair]
) -> tuple[list[dict], dict[str, Selector]]:
    """The scored row of each pair, and PMI, log odds and margin in nats, which are computed together."""
    judge, work, scored, began = (
        PairScorer(denoiser, config, AT_ONCE, seed=0, words=False),
        Work(),
        [],
        time.perf_counter(),
    )
    for chunk in chunks(pairs):
        scored += judge(np.stack([pair.image for pair in chunk]), [pair.caption for pair in chunk], work)
    seconds, whole = (time.perf_counter() - began) / len(pairs), round(work.score_evaluations / len(pairs))
    costs = {"pmi": 2 * config.num_samples, "pmi_negatives": whole - config.num_samples, "margin": whole}
    values = {
        name: np.array([-np.inf if row[f"score_{name}"] is None else row[f"score_{name}"] for row in scored])
        for name in costs
    }
    return scored, {name: Selector(values[name], cost, seconds * cost / whole) for name, cost in costs.items()}


def score_all(
    denoiser: Denoiser, config: PairScoreConfig, pairs: list[LabelledPair]
) -> tuple[list[dict], dict[str, Selector]]:
    """As `score_pairs`, and pmi_contrastive against the captions of the other pairs."""
    scored, selectors = score_pairs(denoiser, config, pairs)
    against = ScoreConfig.model_validate(config.model_dump() | {"names": ["pmi_contrastive"]})
    contrast = Scorer(denoiser, against, AT_ONCE, seed=0, pool=[pair.caption for pair in pairs])
    contrastive, work, began = [], Work(), time.perf_counter()
    for chunk in chunks(pairs):
        images, captions = np.stack([pair.image for pair in chunk]), [pair.caption for pair in chunk]
        latents = denoiser.encode_images(images)
        nowhere = Trajectory(latents, torch.empty(0), *2 * [torch.empty(len(chunk), 0)])  # no sampling, no curves
        conditioning, index = denoiser.encode_prompts(captions), torch.arange(len(chunk))
        contrastive += contrast(captions, conditioning, index, nowhere, work)["score_pmi_contrastive"]
    seconds, evaluations = (time.perf_counter() - began) / len(pairs), round(work.score_evaluations / len(pairs))
    return scored, selectors | {"pmi_contrastive": Selector(np.array(contrastive), evaluations, seconds)}


def judge_all(name: str, metric: Metric, pairs: list[LabelledPair]) -> Selector:
    """The first column of a metric, higher is better. The time to load its model does not count."""
    column, values = metric.columns[0], []
    measure({name: metric}, pairs[0].image[None], [pairs[0].caption])
    began = time.perf_counter()
    for chunk in chunks(pairs):
        found = measure({name: metric}, np.stack([pair.image for pair in chunk]), [pair.caption for pair in chunk])
        values += [-np.inf if value is None else column.sign * value for value in found[column.name]]
    return Selector(np.array(values), 0, (time.perf_counter() - began) / len(pairs))


def chunks(pairs: list[LabelledPair]) -> list[list[LabelledPair]]:
    return [pairs[start : start + AT_ONCE] for start in range(0, len(pairs), AT_ONCE)]


def auc_of_right(wrong: np.ndarray, right: np.ndarray) -> float:
    """Probability that a correct pair (of the values `right`) scores higher than a wrong one."""
    return auc(np.concatenate([right, wrong]), np.arange(len(right) + len(wrong)) < len(right))


def precision_recall(
    wrong: np.ndarray, right: np.ndarray, prevalence: float, worst: float = WORST
) -> tuple[float, float]:
    """Area under precision-recall (average precision), and precision among the share `worst` with the lowest scores.

    Args:
        wrong, right: scores of wrong and of correct pairs. They are weighted so that the share `prevalence` is wrong.

    Pairs with equal scores are reported together; a share that ends among them contains all in proportion.
    """
    values = np.concatenate([wrong, right])
    weights = np.repeat([prevalence / len(wrong), (1 - prevalence) / len(right)], [len(wrong), len(right)])
    _, place = np.unique(values, return_inverse=True)
    reported = np.bincount(place, weights).cumsum()  # by threshold, the lowest score first
    found = np.bincount(place, weights * (np.arange(len(values)) < len(wrong))).cumsum()
    area = np.diff(found, prepend=0) @ (found / reported) / prevalence
    among_worst = np.interp(worst, np.append(0, reported), np.append(0, found)) / worst
    return float(area), float(among_worst)


def with_interval(
    measured: Callable[[np.ndarray, np.ndarray], float],
    values: np.ndarray,
    wrong: np.ndarray,
    right: np.ndarray,
    rng: np.random.Generator,
) -> tuple[float, float, float]:
    """A function of the scores of wrong and correct pairs, with a 95 % bootstrap interval over pairs."""
    good, bad = values[right], values[wrong]
    draws = [measured(rng.choice(bad, len(bad)), rng.choice(good, len(good))) for _ in range(RESAMPLES)]
    return measured(bad, good), *np.percentile(draws, [2.5, 97.5]).tolist()


def verdict_row(pairs: list[LabelledPair], scored: list[dict], kind: str) -> dict[str, str | int | float]:
    """How often a wrong caption is reported, how often with the right attribute, and how often a correct one is."""
    wrong = [(pair, row) for pair, row in zip(pairs, scored, strict=True) if pair.kind is not None]
    of_kind = [(pair, row) for pair, row in wrong if kind in ("all", pair.kind)]
    found = [row["contradicted_attribute"] for _, row in of_kind]
    named = [name is not None and pair.kind.startswith(name) for name, (pair, _) in zip(found, of_kind, strict=True)]
    row = {"score": "verdict", "corruption": kind, "wrong": len(of_kind)}
    row |= {"called_wrong": np.mean([name is not None for name in found]).item(), "named_right": np.mean(named).item()}
    if kind == "all":
        right = [
            row["contradicted_attribute"] is not None for p, row in zip(pairs, scored, strict=True) if p.kind is None
        ]
        row["right_called_wrong"] = np.mean(right).item()
    return row


if __name__ == "__main__":
    main(WrongCaptionsBenchmark)
