"""Detection of wrong captions: python benchmarks/wrong_captions.py [--out FILE.json] [--check] [--smoke]"""

from dataclasses import dataclass

import numpy as np
import torch
from gates import Benchmark, Findings, Gate, main
from pydantic import Field, PositiveInt

from mi_ray.config import ScoreConfig
from mi_ray.config.paths import ModelPath
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.diffusion.sampling import Trajectory
from mi_ray.inputs.pair_config import PairScoreConfig
from mi_ray.report.statistics import auc
from mi_ray.scoring.pair_scorer import PairScorer
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work
from mi_ray.shapes.grammar import CATEGORIES, FORMS, SceneSpec, draw_scene, is_unseen_combination, sample_spec, sentence
from mi_ray.shapes.model import corrupt
from mi_ray.shapes.oracle import score
from mi_ray.shapes.scenes import render

SMOKE_PAIRS = 24
RESAMPLES = 1000
AT_ONCE = 50  # pairs per group, which limits memory


class WrongCaptionsBenchmark(Benchmark):
    """How well does each score separate captions with one error from correct captions, on new rendered images?"""

    model: ModelPath = Field(
        "shapes", description="the embedded model (shapes) or a diffusers folder, for prompts of the shapes grammar"
    )
    pairs: PositiveInt = Field(
        200, description="number of rendered images with a caption, taking the categories in turn"
    )
    wrong_share: float = Field(0.3, gt=0, lt=1, description="share of wrong captions")
    score: PairScoreConfig = Field(PairScoreConfig(), description="settings of the scores, as in jobs/score.py")
    seed: int = Field(30_000, description="seed of the pairs, different from the seeds of training")

    def answer(self) -> Findings:
        try:
            denoiser = load_denoiser(self.model)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        pairs = draw_pairs(SMOKE_PAIRS if self.smoke else self.pairs, self.wrong_share, self.seed)
        scores, scored, costs = score_all(denoiser, self.score, pairs)
        rng = np.random.default_rng(0)
        wrong = np.array([pair.kind is not None for pair in pairs])
        kinds = sorted({pair.kind for pair in pairs if pair.kind})
        rows = []
        for name, values in scores.items():
            for kind in ("all", *kinds):
                of_kind = wrong if kind == "all" else np.array([pair.kind == kind for pair in pairs])
                row = {"score": name, "corruption": kind, "wrong": int(of_kind.sum()), "right": int((~wrong).sum())}
                value, low, high = auc_with_interval(values, of_kind, ~wrong, rng)
                rows.append(row | {"auc": value, "low": low, "high": high, "evaluations_per_pair": costs[name]})
        rows += [verdict_row(pairs, scored, kind) for kind in ("all", *kinds)]
        best = max(row["auc"] for row in rows if row.get("corruption") == "all" and "auc" in row)
        return Findings(rows, {"auc_of_the_best_score": Gate(best, minimum=0.95)})


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


def score_all(
    denoiser: Denoiser, config: PairScoreConfig, pairs: list[LabelledPair]
) -> tuple[dict[str, np.ndarray], list[dict], dict[str, int]]:
    """{score: (n,) nats, higher is better}, the scored row of each pair, and {score: evaluations per pair}."""
    judge = PairScorer(denoiser, config, AT_ONCE, seed=0, words=False)
    against = ScoreConfig.model_validate(config.model_dump() | {"names": ["pmi_contrastive"]})
    contrast = Scorer(denoiser, against, AT_ONCE, seed=0, pool=[pair.caption for pair in pairs])
    scored, contrastive, judged, contrasted = [], [], Work(), Work()
    for start in range(0, len(pairs), AT_ONCE):
        chunk = pairs[start : start + AT_ONCE]
        images, captions = np.stack([pair.image for pair in chunk]), [pair.caption for pair in chunk]
        scored += judge(images, captions, judged)
        latents = denoiser.encode_images(images)
        nowhere = Trajectory(latents, torch.empty(0), *2 * [torch.empty(len(chunk), 0)])  # no sampling, no curves
        conditioning, index = denoiser.encode_prompts(captions), torch.arange(len(chunk))
        contrastive += contrast(captions, conditioning, index, nowhere, contrasted)["score_pmi_contrastive"]
    whole = round(judged.score_evaluations / len(pairs))
    costs = {"pmi": 2 * config.num_samples, "pmi_negatives": whole - config.num_samples, "margin": whole}
    costs["pmi_contrastive"] = round(contrasted.score_evaluations / len(pairs))
    scores = {
        "pmi": np.array([row["score_pmi"] for row in scored]),
        "pmi_contrastive": np.array(contrastive),
        "pmi_negatives": np.array([row["score_pmi_negatives"] for row in scored]),
        "margin": np.array([row["score_margin"] for row in scored]),
    }
    return scores, scored, costs


def auc_with_interval(
    values: np.ndarray, wrong: np.ndarray, right: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Probability that a correct pair scores higher than a wrong one, with a 95 % bootstrap interval over pairs."""
    good, bad = values[right], values[wrong]

    def of(good: np.ndarray, bad: np.ndarray) -> float:
        return auc(np.concatenate([good, bad]), np.arange(len(good) + len(bad)) < len(good))

    draws = [of(rng.choice(good, len(good)), rng.choice(bad, len(bad))) for _ in range(RESAMPLES)]
    return of(good, bad), *np.percentile(draws, [2.5, 97.5]).tolist()


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
