"""What the guidance scale does to each model, where several were evaluated: the curve, the best scale, the headline's.

A tuned model is compared with the base model at the base's best scale: a gain at a scale that nobody would use for the
base may be had by turning the guidance up.
"""

import pandas as pd

from mi_ray.alignment.metric import Column
from mi_ray.config import RunConfig
from mi_ray.report.columns import PMI
from mi_ray.report.statistics import paired_difference, prompt_mean

SCALE = "guidance_scale"  # column of the evaluation's tables
NEAR = 0.15  # an evaluated scale stands for another one up to this relative distance
Frames = dict[str, pd.DataFrame]  # the evaluated images of each model


def at_scale(frame: pd.DataFrame, scale: float) -> pd.DataFrame:
    return frame[frame[SCALE] == scale]


def _scales(frame: pd.DataFrame) -> list[float]:
    return sorted(frame[SCALE].dropna().unique().tolist())


def headline_column(evaluation: Frames, metrics: dict[str, tuple[Column, ...]]) -> Column:
    """The first column of the first metric that has values, else the model's own PMI."""
    primary = [columns[0] for columns in metrics.values()]
    measured = (c for c in primary if any(c.name in f and f[c.name].notna().any() for f in evaluation.values()))
    return next(measured, PMI)


def best_scale(curve: list[dict], column: Column) -> float | None:
    """The scale with the best mean, the lowest of equal ones; None: nothing is measured."""
    best = max(curve, key=lambda point: (column.sign * point["value"], -point[SCALE]), default=None)
    return best and best[SCALE]


def _curve(frame: pd.DataFrame, column: Column) -> list[dict]:
    """The mean of a column at each scale: a `statistics.prompt_mean` with the scale."""
    points = [(scale, prompt_mean(at_scale(frame, scale), column.name)) for scale in _scales(frame)]
    return [{SCALE: scale, **result} for scale, result in points if result]


def _difference_curve(frame: pd.DataFrame, base: pd.DataFrame, column: Column) -> list[dict]:
    """A model less the base model at the same scale, paired by prompt and seed, at each scale."""
    of_scale = [(s, paired_difference(at_scale(frame, s), at_scale(base, s), column.name)) for s in _scales(frame)]
    return [{SCALE: scale, **result} for scale, result in of_scale if result]


def guidance_section(
    evaluation: Frames, metrics: dict[str, tuple[Column, ...]], config: RunConfig, gammas: dict[str, float]
) -> dict:
    """The section `guidance` of report.json; {} where the images have one scale alone.

    Args:
        gammas: effective guidance of the models of which it is known (see `training.online`).

    Returns:
        scales: all that were evaluated, and column: by which they are compared. headline: the scale of the report's
        other sections: the base model's best, or evaluation.sampler's as long as the base model is not evaluated
        (base_best tells). best: each model's best scale. curves and differences: by model, at each scale, the mean, and
        the difference to the base model. effective_guidance: `gammas`. rows: models at single scales, each with its
        evaluations of the denoiser an image (without what a guidance interval saves), its mean and the difference to
        the base model at the headline's scale, paired by prompt and seed.
    """
    scales = sorted({scale for frame in evaluation.values() for scale in _scales(frame)})
    if len(scales) < 2:
        return {}
    column = headline_column(evaluation, metrics)
    measured = {model: frame for model, frame in evaluation.items() if column.name in frame}
    curves = {model: _curve(frame, column) for model, frame in measured.items()}
    best = {model: best_scale(curve, column) for model, curve in curves.items() if curve}
    headline = best.get("base", config.evaluation.sampler.guidance_scale)
    base, others = measured.get("base"), [model for model in measured if model != "base"]
    compared = [] if base is None else others
    return {
        "column": column.name,
        "scales": scales,
        "headline": headline,
        "base_best": "base" in best,
        "best": best,
        "curves": curves,
        "differences": {model: _difference_curve(measured[model], base, column) for model in compared},
        "effective_guidance": gammas,
        "rows": _rows(measured, column, headline, best, gammas, config),
    }


def _rows(
    measured: Frames,
    column: Column,
    headline: float,
    best: dict[str, float],
    gammas: dict[str, float],
    config: RunConfig,
) -> list[dict]:
    """Each model where the base model is best and at its own best; the base model at gamma times that scale; and the
    guidance-free student."""
    notes: dict[tuple[str, float], list[str]] = {}

    def note(model: str, scale: float, text: str):
        if model in measured and scale in _scales(measured[model]):
            notes.setdefault((model, scale), []).append(text)

    note("base", headline, "its best")
    for model, gamma in gammas.items():
        wanted = gamma * headline
        near = min(_scales(measured["base"]) if "base" in measured else [headline], key=lambda s: abs(s - wanted))
        if near != headline and abs(near - wanted) <= NEAR * wanted:
            note("base", near, f"near γ·w = {wanted:.2f} of {model}")
    for model in measured:
        if model != "base":
            note(model, headline, "where base is best")
            note(model, best.get(model, headline), "its best")
            if config.finetune.anchor_guidance > 1:
                note(model, 1.0, "guidance-free student, one branch")
    reference, rows = at_scale(measured["base"], headline) if "base" in measured else None, []
    for (model, scale), texts in notes.items():
        images, itself = at_scale(measured[model], scale), (model, scale) == ("base", headline)
        compared = None if reference is None or itself else paired_difference(images, reference, column.name)
        rows.append(
            {
                "model": model,
                SCALE: scale,
                "notes": texts,
                "evaluations": config.evaluation.sampler.num_inference_steps * (1 if scale == 1 else 2),
                "result": prompt_mean(images, column.name),
                "difference": compared,
                "effective_guidance": gammas.get(model),
            }
        )
    return rows
