"""Base and tuned models by guidance scale: python benchmarks/guidance.py --run-dir DIR [--out F] [--figure F.png]

Classifier-free guidance and fine-tuning on selected images both strengthen the effect of the prompt, and their gains
overlap. A comparison of two models at one guidance scale is therefore not enough. This benchmark samples the same
held-out prompts and seeds with the base model and with every adapter of a finished run, at several guidance scales.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from gates import Benchmark, Findings, LocalPath, main
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt
from tqdm import tqdm

from mi_ray import storage
from mi_ray.alignment.metric import Column, Metric, load_metrics
from mi_ray.config import RunConfig
from mi_ray.config.paths import LocalOrUri
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import PipelineDenoiser, load_denoiser
from mi_ray.inputs.prompts import read_prompts
from mi_ray.report.columns import heading
from mi_ray.report.columns import scale as scale_of
from mi_ray.report.statistics import paired_difference, prompt_mean
from mi_ray.runs.layout import SUMMARY, final_adapter, read_run
from mi_ray.scoring.sampler import Sampler, derived_seed
from mi_ray.scoring.work import Work
from mi_ray.training.start import local_start

SMOKE_PROMPTS, SMOKE_IMAGES, SMOKE_SCALES = 6, 2, (2.0,)
PROMPTS_AT_A_TIME = 16


class GuidanceBenchmark(Benchmark):
    """At which guidance scales is the tuned model better than the base model and a model tuned on random images?"""

    run_dir: LocalOrUri = Field(
        description="folder of a finished run with a metric; the metric's first column is compared"
    )
    guidance_scales: tuple[float, ...] = Field((1.5, 2.0, 3.0, 4.0, 6.0), description="guidance scales, each above 1")
    prompts: PositiveInt = Field(360, description="number of held-out prompts from the run's evaluation file")
    images_per_prompt: PositiveInt = Field(
        4, description="number of seeds per prompt, the same for all models and scales"
    )
    batch_size: PositiveInt = Field(128, description="number of images in one denoiser batch")
    figure: LocalPath | None = Field(None, description="PNG file to write: the metric against guidance scale")

    def answer(self) -> Findings:
        config, adapters = finished_run(self.run_dir)
        count, each = (SMOKE_PROMPTS, SMOKE_IMAGES) if self.smoke else (self.prompts, self.images_per_prompt)
        table, _ = read_prompts(config.evaluation.file, field="run_dir", limit=count)
        metric = first_metric(config)
        column, rows = metric.columns[0], []
        for scale in SMOKE_SCALES if self.smoke else self.guidance_scales:
            of = partial(self._draw, config, metric, table, each, scale)
            drawn = {name: of(adapter) for name, adapter in adapters.items()}
            rows += [findings(drawn, name, scale, column) for name in drawn]
        if self.figure:
            draw(rows, self.figure, column)
        return Findings(rows, {})

    @torch.no_grad()
    def _draw(
        self, config: RunConfig, metric: Metric, table, each: int, scale: float, adapter: str | None
    ) -> pd.DataFrame:
        """Columns prompt_id, seed and the metric's first column, one row per image."""
        name = metric.columns[0].name
        model = config.model
        denoiser: PipelineDenoiser = load_denoiser(model.path, model.dtype, adapter=adapter, size=model.size)
        settings = config.evaluation.sampler.model_copy(update={"guidance_scale": scale})
        sampler, parts = Sampler(denoiser, settings, self.batch_size), []
        for start in tqdm(
            range(0, len(table), PROMPTS_AT_A_TIME), desc=f"{adapter or 'model'} at {scale}", leave=False
        ):
            some = table.slice(start, PROMPTS_AT_A_TIME)
            prompts, ids = some["prompt"].to_pylist(), some["prompt_id"].to_pylist()
            seeds = [[derived_seed(config.seed, "evaluation", i, k) for k in range(each)] for i in ids]
            latents = sampler(denoiser.encode_prompts(prompts), seeds, Work(), prompts=prompts).latents
            images = denoiser.decode(latents)
            values = metric.measure(images, [p for p in prompts for _ in range(each)])[name]
            columns = {"prompt_id": np.repeat(ids, each), "seed": [s for of in seeds for s in of], name: values}
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)


def finished_run(run_dir: str) -> tuple[RunConfig, dict[str, str | None]]:
    """The run's config, and the local folder of each adapter by model name. That of the base model is the adapter that
    the run started from; None: it started from the model as it is.

    Raises:
        ValueError: the folder holds no finished run.
    """
    try:
        config, _ = read_run(run_dir)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    folders = {arm: final_adapter(config, arm) for arm in ("tuned", *config.evaluation.controls)}
    if missing := [f for f in folders.values() if not storage.exists(storage.join(f, SUMMARY))]:
        raise ValueError("\n".join(f"--run-dir: {f} holds no finished adapter; finish the run first" for f in missing))
    return config, {"base": local_start(config)} | {name: storage.local_folder(f) for name, f in folders.items()}


def first_metric(config: RunConfig) -> Metric:
    """The first metric of the run, which is the headline of its report.

    Raises:
        ValueError: the run has no metric.
    """
    if not config.evaluation.alignment:
        raise ValueError("run_dir: the run has no metric; give a run whose evaluation.alignment names a metric")
    return next(iter(load_metrics(config.evaluation.alignment[:1]).values()))


def findings(drawn: dict[str, pd.DataFrame], name: str, scale: float, column: Column) -> dict:
    """The mean of a column for a model at a guidance scale, and paired differences to the others; shares in percent."""
    row = {"guidance_scale": scale, "model": name}
    row |= _ends(column.name, prompt_mean(drawn[name], column.name), "value", column)
    for other in drawn:
        if name == "tuned" and other != name:
            difference = paired_difference(drawn[name], drawn[other], column.name)
            row |= _ends(f"minus_{other}", difference, "difference", column)
    return row


def _ends(label: str, measured: dict, key: str, column: Column) -> dict[str, float | None]:
    """A value and the ends of its confidence interval, scaled for display."""
    ends = {f"{label}{end}": measured[k] for end, k in (("", key), ("_low", "low"), ("_high", "high"))}
    return {k: v if v is None else scale_of(column) * v for k, v in ends.items()}


def draw(rows: list[dict], path: Path, column: Column):
    """Plot the column against guidance scale, one line per model."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, of_model in pd.DataFrame(rows).groupby("model", sort=False):
        axes.plot(of_model["guidance_scale"], of_model[column.name], marker="o", label=name)
        if name != "base":
            continue
        low, high = (of_model[f"{column.name}_{end}"] for end in ("low", "high"))
        axes.fill_between(of_model["guidance_scale"], low, high, alpha=0.15)
    axes.set(xlabel="guidance scale", ylabel=heading(column))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(GuidanceBenchmark)
