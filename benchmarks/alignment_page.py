"""The page of benchmarks/alignment.py: the table, the figures and images of the same prompts and seeds."""

import shlex
from pathlib import Path

import pandas as pd

from mi_ray.alignment.metric import Column
from mi_ray.report.columns import PMI, SPLITS, decimal, heading, scale, unit_of_change
from mi_ray.report.figures import difference_plot, guidance_plot
from mi_ray.report.guidance import SCALE
from mi_ray.report.page import image_source, page_environment
from mi_ray.report.statistics import prompt_mean

SHOWN_PROMPTS = 8
SPLIT_NAMES = {"train": "training prompts", **SPLITS}
# MI-TUNE (arXiv 2405.20759), table 1: SD-2.1-base on T2I-CompBench, BLIP-VQA in per cent. The mean over the categories
# of each method, and the categories of the base model and of MI-TUNE.
PAPER_COLUMN = "blip_vqa"
PAPER = {
    "base": 45.81,
    "attend-and-excite": 51.17,
    "structured": 44.72,
    "semantic": 46.21,
    "dpok": 47.98,
    "gors": 47.88,
    "hn-itm": 44.28,
    "mi-tune": 53.56,
}
PAPER_CATEGORIES = {
    "color": (49.65, 65.04),
    "shape": (42.71, 50.08),
    "texture": (49.99, 65.82),
    "spatial": (15.77, 18.51),
    "non_spatial": (66.23, 67.77),
    "complex": (50.53, 54.17),
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Alignment methods</title><style>
{% include "style.css.j2" %}
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 10px; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
main { max-width: 1560px; } main > p { max-width: 100ch; }
.wide { overflow-x: auto; margin-bottom: 40px; }
.images td { text-align: center; } .images img { image-rendering: auto; width: 96px; }
</style></head><body><main>
<h1>Alignment methods</h1>
<p>{{ prompts }} prompts × {{ each }} seeds, the same for all rows. ± is half of the 95 % interval over prompts; gains
are paired differences to the base model at guidance {{ "%g" | format(best) }}. Evaluations and seconds are per image,
without its measurements; on a CPU, CPU seconds. γ is the effective guidance relative to the guidance scale. A gain of
fewer than three trainings is no claim. A training pass counts as in the cost estimate of a run; minutes are wall time
of the training's stages.
{% if tried %}Settings were chosen on validation prompts, which are not in the table.{% endif %}</p>
{% for title, lines in tables %}<h2>{{ title }}</h2><div class="wide"><table>
<tr>{% for name in lines[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in lines[1:] %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endfor %}
<h2>Figures</h2>{% for figure in figures %}<p><img src="{{ figure }}" alt=""></p>{% endfor %}
<h2>Images of the first seed</h2><div class="wide"><table class="images">
<tr><th></th>{% for prompt in shown %}<th>{{ prompt | truncate(28) }}</th>{% endfor %}</tr>
{% for name, images in strips %}<tr><td>{{ name }}</td>{% for image in images %}<td><img src="{{ image }}" alt=""></td>
{% endfor %}</tr>{% endfor %}</table></div>
<p>Command: <code>{{ command }}</code></p>
</main></body></html>"""


def write_page(
    path: Path, rows: list[dict], frames: dict, base, column: Column, arguments: list[str], tried: list[dict]
):
    """Write the page.

    Args:
        rows: of the benchmark's table, means and differences of shares in per cent.
        frames: {arm: its images}; an arm has a name, settings and a training seed.
        base: the arm that the others are compared with.
        tried: the settings that were tried, with their means on the validation prompts.
    """
    images, best = frames[base], base.settings.guidance_scale
    chosen = images.drop_duplicates("prompt_id")
    chosen = chosen.iloc[:: max(1, len(chosen) // SHOWN_PROMPTS)].head(SHOWN_PROMPTS)
    strips, first = [], min((arm.seed for arm in frames if arm.seed is not None), default=None)
    for arm, frame in frames.items():
        if arm.settings.guidance_scale == best and arm.seed in (None, first):
            kept = chosen[["prompt_id", "seed"]].merge(frame, on=["prompt_id", "seed"], how="left")
            strips.append((arm.name, [image_source(image)[0] for image in kept["image"]]))
    page = page_environment().from_string(_PAGE)
    tables = [("Methods", main_table(rows, column)), ("By category", category_table(rows, column))]
    tables += [("Settings tried on the validation prompts", tried_table(tried, column))] if tried else []
    text = page.render(
        prompts=images["prompt_id"].nunique(),
        each=round(len(images) / images["prompt_id"].nunique()),
        best=best,
        tables=tables,
        tried=tried,
        figures=_figures(rows, frames, best, column),
        shown=chosen["prompt"].tolist(),
        strips=strips,
        command=shlex.join(["python", "benchmarks/alignment.py", *arguments[1:]]),
    )
    path.write_text(text, encoding="utf-8")


def main_table(rows: list[dict], column: Column) -> list[list[str]]:
    """The cells of the table, first the headings; with the paper's values if the metric is its metric."""
    splits = [key for key in _groups(rows) if key.removeprefix("gain_") in SPLIT_NAMES]
    published = column.name == PAPER_COLUMN
    names = [
        "",
        "settings",
        "trainings",
        "training evaluations",
        "minutes",
        "evaluations",
        "seconds",
        heading(column),
        f"gain,{unit_of_change(column)}",
    ]
    names += [f"gain, {_group_name(key)}" for key in splits]
    names += ["range over trainings"] if any("lowest_gain_of_a_seed" in row for row in rows) else []
    names += [heading(PMI), "kernel distance", "diversity, % of base", "γ"]
    lines = [names + (["paper, %"] if published else [])]
    for row in rows:
        name = row["method"].partition(" at ")[0]
        cells = [row["method"], row["settings"], str(row["training_seeds"] or "")]
        cells += [f"{row[key]:,.0f}" if key in row else "" for key in ("training_evaluations", "training_minutes")]
        cells += [f"{row['evaluations']:.0f}", f"{row['seconds']:.2f}"]
        cells += [decimal(row[column.name], 1), _change(row, "gain"), *(_change(row, key) for key in splits)]
        if "range over trainings" in names:
            ends = [row.get(f"{end}_gain_of_a_seed") for end in ("lowest", "highest")]
            cells.append("" if None in ends else " to ".join(decimal(end, 1, "+") for end in ends))
        cells += [decimal(row[PMI.name]), decimal(row["kernel_distance"], 3), decimal(row["diversity"], 1)]
        cells.append(decimal(row["gamma"]) if row["gamma"] is not None else "")
        if published:
            # Of several rows of the base model, the paper's value is that of the one that the others are compared with.
            cells.append(decimal(None if name == "base" and "gain" in row else PAPER.get(name)))
        lines.append(cells)
    return lines


def tried_table(tried: list[dict], column: Column) -> list[list[str]]:
    """The settings of each method, with the mean on the validation prompts and a mark at the chosen ones."""
    lines = [["", "guidance scale", "settings", heading(column), "chosen"]]
    for row in tried:
        settings = row["settings"] or "as published or configured"
        value, mark = decimal(row[column.name], 1), "✓" if row["chosen"] else ""
        lines.append([row["method"], f"{row[SCALE]:g}", settings, value, mark])
    return lines


def category_table(rows: list[dict], column: Column) -> list[list[str]]:
    """The gain of each row in each category and split; with the paper's if the metric is its metric."""
    groups = _groups(rows)
    lines = [["", *(f"{_group_name(key)},{unit_of_change(column)}" for key in groups)]]
    lines += [[row["method"], *(_change(row, key) for key in groups)] for row in rows if "gain" in row]
    if column.name == PAPER_COLUMN:
        found = [PAPER_CATEGORIES.get(_group_name(key)) for key in groups]
        gains = ["" if pair is None else decimal(pair[1] - pair[0], 1, "+") for pair in found]
        lines += [["mi-tune in the paper", *gains]] if any(gains) else []
    return lines


def _group_name(key: str) -> str:
    name = key.removeprefix("gain_")
    return SPLIT_NAMES.get(name, name)


def _groups(rows: list[dict]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("gain_") and not key.endswith("_half"))
    return list(keys)


def _change(row: dict, key: str) -> str:
    if row.get(key) is None:
        return ""
    half = row[f"{key}_half"]
    return decimal(row[key], 1, "+") + ("" if half is None else f" ± {half:.1f}")


def _figures(rows: list[dict], frames: dict, best: float, column: Column) -> list[str]:
    """Gains with their intervals, and the means against guidance scale."""
    times, figures = scale(column), []
    gains = {}
    for row in rows:
        if row.get("gain") is not None and row["gain_half"] is not None:
            ends = {end: (row["gain"] + sign * row["gain_half"]) / times for end, sign in (("low", -1), ("high", 1))}
            gains[row["method"]] = {"difference": row["gain"] / times, **ends}
    if gains:
        figures.append(difference_plot(gains, column, "method − base"))
    by_name: dict[str, dict[float, list[pd.DataFrame]]] = {}
    for arm, frame in frames.items():
        by_name.setdefault(arm.name, {}).setdefault(arm.settings.guidance_scale, []).append(frame)
    curves = {
        name: [{SCALE: w, **prompt_mean(pd.concat(of_scale[w]), column.name)} for w in sorted(of_scale)]
        for name, of_scale in by_name.items()
        if len(of_scale) > 1
    }
    if curves:
        figures.append(guidance_plot({"curves": curves, "headline": best}, column))
    return figures
