"""Accuracy of the judges of the embedded world: benchmarks/judges.py [--judges NAMES] [--out FILE.json] [--smoke]"""

import time

import numpy as np
from gates import Benchmark, Findings, Gate, main, metric_details
from pydantic import Field, PositiveInt
from selection import DEMO
from wrong_captions import AT_ONCE, generated

from mi_ray.alignment.metric import Metric, load_metrics, measure
from mi_ray.config import SamplerConfig
from mi_ray.config.metrics import MetricName, MetricNames
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.report.statistics import auc
from mi_ray.scoring.machine import keep_memory
from mi_ray.scoring.sampler import Sampler
from mi_ray.shapes.grammar import CATEGORIES, draw_scene, parse, sample_prompts
from mi_ray.shapes.judges import is_exact
from mi_ray.shapes.model import corrupt
from mi_ray.shapes.scenes import render


class JudgesBenchmark(Benchmark):
    """How often do the small judges prefer the right image, and how well do they agree with the truth on images of the
    embedded model?"""

    judges: MetricNames = Field(("blip-vqa@shapes", "clip-score@shapes"), description="metrics: a name or a list")
    alignment: MetricName = Field(DEMO.evaluation.alignment[0], description="the truth, by its first column: 1 or 0")
    prompts: PositiveInt = Field(40, description="number of held-out prompts per category")
    sampler: SamplerConfig = SamplerConfig(solver="dpm++2m", num_inference_steps=20, guidance_scale=1.5)
    seed: int = Field(40_000, description="seed of the prompts and of the images, different from those of training")

    def answer(self) -> Findings:
        count = 4 if self.smoke else self.prompts
        judges, truth = load_metrics(self.judges), load_metrics([self.alignment])
        rng = np.random.default_rng(self.seed)
        prompts = {category: sample_prompts(category, "test", count, rng) for category in CATEGORIES}
        texts = [prompt for of_category in prompts.values() for prompt in of_category]
        categories = np.repeat(CATEGORIES, count)
        right, wrong = zip(*(two_images(prompt, rng) for prompt in texts), strict=True)
        denoiser = load_denoiser("shapes")
        keep_memory()
        sampler = Sampler(denoiser, self.sampler, AT_ONCE)
        groups = range(0, len(texts), AT_ONCE)
        drawn = np.concatenate([generated(denoiser, sampler, texts[i : i + AT_ONCE], self.seed) for i in groups])
        is_right = first_column(truth, drawn, texts) == 1
        rows = []
        for name, metric in judges.items():
            judge, began = {name: metric}, time.perf_counter()
            values = [first_column(judge, np.stack(images), texts) for images in (right, wrong, drawn)]
            milliseconds = 1e3 * (time.perf_counter() - began) / (3 * len(texts))
            for category in ("all", *CATEGORIES):
                here = (categories == category) | (category == "all")
                better, worse, own = (of_images[here] for of_images in values)
                row = {"judge": name, "category": category, "prompts": int(here.sum())}
                row["prefers_right"] = float(((better > worse) + 0.5 * (better == worse)).mean())
                row["images_right"] = float(is_right[here].mean())
                mixed = 0 < is_right[here].sum() < here.sum()
                row["auc_of_model_images"] = auc(own, is_right[here]) if mixed else None
                rows.append(row | ({"milliseconds": milliseconds} if category == "all" else {}))
        lowest = min(row["prefers_right"] for row in rows if row["category"] == "all")
        gates = {"prefers_right_lowest": Gate(lowest, minimum=0.8)}
        return Findings(rows, gates, {"judges": metric_details(judges)})


def two_images(prompt: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image for which the prompt is exact, and one of a scene that differs from the prompt in one thing."""
    spec = parse(prompt)
    while True:
        other = draw_scene(corrupt(spec, rng), rng, unseen=True)
        if not is_exact(other, spec):
            return render(draw_scene(spec, rng, unseen=True)), render(other)


def first_column(metric: dict[str, Metric], images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The first column of a metric, (n,), higher is better."""
    column = next(iter(metric.values())).columns[0]
    parts = [
        measure(metric, images[i : i + AT_ONCE], prompts[i : i + AT_ONCE])[column.name]
        for i in range(0, len(prompts), AT_ONCE)
    ]
    return column.sign * np.array([value for part in parts for value in part], float)


if __name__ == "__main__":
    main(JudgesBenchmark)
