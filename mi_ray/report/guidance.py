"""The effect of guidance_scale on each model, if several scales were evaluated: curves, best scales, comparison.

Models are compared at the scale where the base model is best. At another scale, the base model could reach the same
gain with a better guidance_scale.
"""

import pandas as pd

from mi_ray.alignment.metric import Column
from mi_ray.config import RunConfig
from mi_ray.report.columns import PMI
from mi_ray.report.statistics import paired_difference, prompt_mean

SCALE = "guidance_scale"  # column of the evaluation's tables
NEAR = 0.15  # largest relative distance at which an evaluated scale is used in place of another scale
Frames = dict[str, pd.DataFrame]  # the evaluated images of each model


def at_scale(frame: pd.DataFrame, scale: float) -> pd.DataFrame:
    return frame[frame[SCALE] == scale]


def _scales(frame: pd.DataFrame) -> list[float]:
    return sorted(frame[SCALE].dropna().unique().tolist())


def headline_column(evaluation: Frames, metrics: dict[str, tuple[Column, ...]]) -> Column:
    """The first column of the first metric that has values. If there is none, PMI."""
    primary = [columns[0] for columns in metrics.values()]
    measured = (c for c in primary if any(c.name in f and f[c.name].notna().any() for f in evaluation.values()))
    return next(measured, PMI)


def best_scale(curve: list[dict], column: Column) -> float | None:
    """The scale with the best mean, the lowest one of equal scales. None if the curve is empty."""
    best = max(curve, key=lambda point: (column.sign * point["value"], -point[SCALE]), default=None)
    return best and best[SCALE]


def _curve(frame: pd.DataFrame, column: Column) -> list[dict]:
    """The mean of a column at each scale: a `statistics.prompt_mean` with the scale."""
    points = [(scale, prompt_mean(at_scale(frame, scale), column.name)) for scale in _scales(frame)]
    return [{SCALE: scale, **result} for scale, result in points if result]


def _difference_curve(frame: pd.DataFrame, base: pd.DataFrame, column: Column) -> list[dict]:
    """The difference of a model to the base model at each scale, paired by prompt and seed."""
    of_scale = [(s, paired_difference(at_scale(frame, s), at_scale(base, s), column.name)) for s in _scales(frame)]
    return [{SCALE: scale, **result} for scale, result in of_scale if result]


def guidance_section(
    evaluation: Frames, metrics: dict[str, tuple[Column, ...]], config: RunConfig, gammas: dict[str, float]
) -> dict:
    """The section `guidance` of report.json. Empty if all images have the same scale.

    Args:
        gammas: effective guidance of the models for which it is known (see `training.online`).

    Returns:
        column: the compared column. scales: all evaluated scales. best: the best scale of each model. headline: the
        scale of the other sections of the report: the best scale of the base model, or the scale of evaluation.sampler
        if the base model is not evaluated. base_best: whether it is the former. curves, differences: for each model
        and scale the mean, and the difference to the base model at the same scale. effective_guidance: `gammas`.
        rows: models at single scales, with denoiser evaluations for sampling an image (a guidance interval needs
        fewer), the mean, and the difference to the base model at the scale `headline`, paired by prompt and seed.
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
    """The rows of the table: each model at `headline` and at its best scale; the base model near gamma times
    `headline`; and, if it was trained with anchor_guidance, each model without guidance."""
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
        images, is_reference = at_scale(measured[model], scale), (model, scale) == ("base", headline)
        sampler = config.evaluation.sampler.model_copy(update={"guidance_scale": scale})
        compared = None if reference is None or is_reference else paired_difference(images, reference, column.name)
        rows.append(
            {
                "model": model,
                SCALE: scale,
                "notes": texts,
                "evaluations": round(
                    sampler.evaluations * sampler.best_of.candidate_steps(sampler.num_inference_steps)
                ),
                "result": prompt_mean(images, column.name),
                "difference": compared,
                "effective_guidance": gammas.get(model),
            }
        )
    return rows
