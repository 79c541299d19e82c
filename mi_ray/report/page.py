"""The report's page: one self-contained HTML file, and its table for the terminal."""

import base64
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from mi_ray.alignment.metric import Column
from mi_ray.config import RunConfig
from mi_ray.report import figures
from mi_ray.report.columns import (
    PMI,
    change,
    decimal,
    direction,
    group_name,
    heading,
    is_share,
    label,
    mark,
    size,
    unit_of_change,
    value,
)
from mi_ray.report.guidance import SCALE
from mi_ray.report.pools import declared_in, round_numbers
from mi_ray.report.summary import declared, pairs_of, summarise
from mi_ray.storage import join, list_tables, read_table, write_bytes, write_json

SIDE_BY_SIDE_PROMPTS, SIDE_BY_SIDE_SEEDS = 12, 4
PREVIEWS, STRIP = 12, 5  # prompts, and images in each strip of highest and lowest scores
MAX_SIDE = 256  # pixels; larger images are inlined as thumbnails
CRISP_SIDE = 128  # pixels; images up to this size are shown with their pixels
SHOWN_ERRORS = 50
SAMPLE_SEED = 0  # seed that draws the prompts shown side by side


# ------------------------------------------------------------------------------------------ numbers as text
def plain(cell: object) -> str:
    """The text of a cell in a benchmark's table."""
    if cell is None or isinstance(cell, bool):
        return {None: "–", True: "yes", False: "no"}[cell]
    return decimal(cell, 3) if isinstance(cell, float) else str(cell)


def number(amount: float | None) -> str:
    if amount is None:
        return "–"
    return f"{amount:,.0f}" if abs(amount) >= 100 else f"{amount:.3g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


_VERDICTS = {
    "better": "The tuned model is better by {}: the 95 % interval does not include zero.",
    "worse": "The tuned model is worse by {}: the 95 % interval does not include zero.",
    "unclear": "This run shows no clear difference: the 95 % interval includes zero.",
}


def _primary(report: dict) -> list[Column]:
    """The first column of each metric, in order."""
    return [columns[0] for columns in declared(report["metrics"]).values()]


def _shown_columns(report: dict) -> list[Column]:
    """All metric columns that at least one model has values for, then PMI."""
    columns = [column for of_metric in declared(report["metrics"]).values() for column in of_metric]
    return [c for c in (*columns, PMI) if any(c.name in result for result in report["alignment"].values())]


def compared_at(report: dict) -> str:
    """A sentence with the guidance scale at which models are compared. Empty if there is only one scale."""
    guidance = report.get("guidance")
    if not guidance:
        return ""
    why = "where the base model is best" if guidance["base_best"] else "the scale of evaluation.sampler"
    return f"Compared at guidance {guidance['headline']:g}, {why}."


def headline(report: dict) -> tuple[str, str]:
    """(result in one line, conclusion) of the first metric, or of PMI if there is no metric."""
    alignment, comparison = report["alignment"], report["comparison"].get("tuned-base", {})
    for column in (*_primary(report), PMI):
        difference = comparison.get(column.name)
        if difference is None:
            continue
        unit = " %" if is_share(column) else ""
        before, after = (value(alignment[model][column.name], column).split(" ")[0] for model in ("base", "tuned"))
        verdict = _VERDICTS[direction(difference, column)].format(label(column))
        if difference["low"] is None:
            verdict = "A single prompt allows no conclusion."
        random = report["comparison"].get("tuned-random", {}).get(column.name)
        if random:
            clear = {"better": "a clear gain", "worse": "a clear loss", "unclear": "no clear difference"}
            control = "with random rewards" if report.get("online") else "on randomly chosen candidates"
            verdict += f" Compared with fine-tuning {control}: {change(random, column)}"
            verdict += f"{unit_of_change(column)} ({clear[direction(random, column)]})."
        if report["quality"].get("tuned", {}).get("collapsed"):
            verdict += " But the tuned model's images have collapsed: see Image quality."
        changed = f"{change(difference, column)}{unit_of_change(column)}"
        return (
            f"{label(column)}: {before}{unit} → {after}{unit} ({changed})",
            f"{compared_at(report)} {verdict}".strip(),
        )
    if alignment:
        return f"Evaluated so far: {', '.join(alignment)}", "The base and the tuned model cannot be compared yet."
    return "Not evaluated yet", "The evaluation has not run. This page shows the results so far."


def _grid(rows: list[list[str]]) -> str:
    """Text with aligned columns: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def alignment_table(report: dict) -> str:
    """The alignment of every model and the paired differences, as plain text for a terminal.

    Shares are in per cent and their differences in points; other values are in their units. After ± is half the width
    of the 95 % interval.
    """
    alignment, comparison = report["alignment"], report["comparison"]
    if not alignment:
        return "no evaluation yet"
    models, columns = list(alignment), _shown_columns(report)
    pair, first = comparison.get("tuned-base", {}), columns[0] if columns else PMI

    def row(name: str, results: list[dict], difference: dict, column: Column) -> list[str]:
        cells = [value(result.get(column.name), column) for result in results]
        return [name, *cells, *([change(difference.get(column.name), column)] if pair else [])]

    rows = [["", *models, *(["tuned − base"] if pair else [])]]
    rows += [row(heading(column), list(alignment.values()), pair, column) for column in columns]
    for grouping in ("by_split", "by_category") if first != PMI else ():
        for name in alignment[models[0]][grouping]:
            results = [alignment[model][grouping].get(name, {}) for model in models]
            difference = pair[grouping].get(name, {}) if pair else {}
            rows.append(row(f"  {heading(first)}, {group_name(grouping, name)}", results, difference, first))
    notes = [compared_at(report)] if report.get("guidance") else []
    if sizes := size(alignment[models[0]], columns):
        counts = f"{sizes['n_prompts']} prompts, {sizes['n_images']} images per model"
        notes.append(f"{counts}; ± is a 95 % interval over prompts, differences are paired")
    for name, result in comparison.items():
        if first != PMI and first.name in result and name != "tuned-base":
            changed = f"{change(result[first.name], first)}{unit_of_change(first)} of {label(first)}"
            notes.append(f"{name.replace('-', ' − ')}: {changed}, paired")
    return "\n".join([_grid(rows), "", *notes]).rstrip()


# ------------------------------------------------------------------------------------------ images
def image_source(content: bytes) -> tuple[str, bool]:
    """Data URI of an encoded image, a large one as a thumbnail, and whether its pixels are shown crisp."""
    with Image.open(io.BytesIO(content)) as image:
        crisp = max(image.size) <= CRISP_SIDE
        kind = "png"
        if max(image.size) > MAX_SIDE:
            thumbnail = image.convert("RGB")
            thumbnail.thumbnail((MAX_SIDE, MAX_SIDE))
            buffer = io.BytesIO()
            thumbnail.save(buffer, "JPEG", quality=88)
            content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", crisp


def _tile(row: dict, column: Column | None = None) -> dict:
    """The data of an image for the template: source, whether its pixels are shown crisp, and the mark of a column."""
    source, crisp = image_source(row["image"]["bytes"])
    return {"source": source, "crisp": crisp, "mark": mark(column and row[column.name], column)}


def _marking(folder: str) -> Column | None:
    """The column whose value is the mark of a folder's images: the first column of the first metric."""
    return next((columns[0] for columns in declared_in(folder).values()), None)


def _parts(folder: str, columns: list[str], first: int | None = None):
    """The rows of each part of a folder, or of its `first` parts. Only the images of one part are in memory."""
    for name in list_tables(folder)[:first]:
        yield read_table(join(folder, name), columns).to_pylist()


def side_by_side(run_dir: str, scale: float | None = None) -> list[dict]:
    """Images of base and tuned model on the same seeds, for prompts drawn at random with a fixed seed.

    Args:
        scale: guidance_scale of the images; None: all images.
    """
    folders = {model: join(run_dir, "evaluation", model) for model in ("base", "tuned")}
    rows = {model: {} for model in folders}
    for model, folder in folders.items():
        for part in _parts(folder, ["prompt_id", "error"]):
            rows[model] |= {row["prompt_id"]: [] for row in part if row["error"] is None}
    both = sorted(rows["base"].keys() & rows["tuned"].keys())
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(both))
    chosen = {both[i] for i in order[:SIDE_BY_SIDE_PROMPTS]}
    marking = _marking(folders["base"])
    measured, only = [marking.name] if marking else [], [] if scale is None else [SCALE]
    columns = ["prompt_id", "prompt", "category", "split", "seed", *only, *measured, "image", "error"]
    for model, folder in folders.items():
        for part in _parts(folder, columns):
            for row in part:
                if only and (row[SCALE] is None or round(row[SCALE], 4) != scale):
                    continue
                if row["prompt_id"] in chosen and row["image"] and row["error"] is None:
                    rows[model][row["prompt_id"]].append(row)
    cards = []
    for prompt_id in sorted(chosen):
        base, tuned = ({row["seed"]: row for row in rows[model][prompt_id]} for model in folders)
        seeds = [seed for seed in base if seed in tuned][:SIDE_BY_SIDE_SEEDS]
        if seeds:
            first = base[seeds[0]]
            tiles = {
                name: [_tile(of_model[seed], marking) for seed in seeds]
                for name, of_model in (("base", base), ("tuned", tuned))
            }
            cards.append({key: first[key] for key in ("prompt", "category", "split")} | {"tiles": tiles})
    return sorted(cards, key=lambda card: (card["split"] or "", card["category"] or "", card["prompt"]))


def shown_score(config: RunConfig) -> str:
    """The score that selects. If the selection is random or by a metric, the first score."""
    return config.select.by if config.select.by in config.score.names else config.score.names[0]


def previews(run_dir: str, config: RunConfig) -> list[dict]:
    """The candidates with the highest and lowest scores, for the first prompts of the run, in the last round with
    images. Pruned candidates are left out."""
    score = f"score_{shown_score(config)}"
    first = math.ceil(config.generate.preview_prompts / config.generate.prompts_per_shard)
    for number in reversed(round_numbers(run_dir)):
        cards, folder = [], join(run_dir, f"round-{number}", "candidates")
        marking = _marking(folder)
        measured = [marking.name] if marking else []
        columns = ["prompt_id", "prompt", score, *measured, "kept", "image", "pruned_after", "error"]
        for part in _parts(folder, columns, first):
            pools = {}
            for row in part:
                if row["error"] is None and row["pruned_after"] is None:
                    pools.setdefault(row["prompt_id"], []).append(row)
            cards += [_strips(pool, score, marking) for pool in pools.values() if all(row["image"] for row in pool)]
            if len(cards) >= PREVIEWS:
                break
        if cards:
            return [card | {"round": number} for card in cards[:PREVIEWS]]
    return []


def _strips(pool: list[dict], score: str, marking: Column | None = None) -> dict:
    pool = sorted(
        (row for row in pool if row[score] is not None and np.isfinite(row[score])), key=lambda row: -row[score]
    )
    size = min(STRIP, len(pool) // 2)
    strips = {"highest": pool[:size], "lowest": pool[len(pool) - size :]}
    tiles = {
        name: [_tile(row, marking) | {"score": row[score], "kept": bool(row["kept"])} for row in rows]
        for name, rows in strips.items()
    }
    return {"prompt": pool[0]["prompt"] if pool else "", "n_candidates": len(pool), "tiles": tiles}


# ------------------------------------------------------------------------------------------ the page
def plots(report: dict) -> dict:
    """Data URIs of the figures for which this run has values."""
    drawn = {}
    comparison = report["comparison"].get("tuned-base", {})
    for column in _primary(report)[:1]:
        groups = {"all": comparison.get(column.name)}
        for grouping in ("by_split", "by_category"):
            compared = comparison.get(grouping, {}).items()
            groups |= {group_name(grouping, name): result.get(column.name) for name, result in compared}
        groups = {name: result for name, result in groups.items() if result}
        if len(groups) > 1:
            drawn["differences"] = figures.difference_plot(groups, column)
    if report["selection"]["auc"]:
        labels = {column.name: label(column) for column in _primary(report)}
        drawn["auc"] = figures.auc_plot({labels[name]: aucs for name, aucs in report["selection"]["auc"].items()})
    if report["selection"]["distributions"]:
        drawn["scores"] = figures.score_plot(report["selection"]["distributions"])
    if report["guidance"]:
        drawn["guidance"] = figures.guidance_plot(report["guidance"], _named(report, report["guidance"]["column"]))
    if panels := figures.online_panels(report["online"], _validated(report)):
        drawn["online"] = figures.online_plot(panels, {arm: found["kept"] for arm, found in report["online"].items()})
    curves = {model: result for model, result in report["training"].items() if result["loss"]}
    if curves:
        drawn["training"] = figures.training_plot(curves)
    return drawn


def _named(report: dict, name: str) -> Column:
    """The metric column with this name, or PMI."""
    columns = [column for of_metric in declared(report["metrics"]).values() for column in of_metric]
    return next((column for column in columns if column.name == name), PMI)


def _validated(report: dict) -> list[Column]:
    """The columns of an online run's validations: scores, then the columns of metrics."""
    validations = [validation["columns"] for arm in report["online"].values() for validation in arm["validations"]]
    names = dict.fromkeys(name for columns in validations for name in columns)
    scores = [Column(name, "a score", "nats") for name in names if name.startswith("score_")]
    return scores + [_named(report, name) for name in names if not name.startswith("score_")]


def _broken_down(report: dict, columns: list[Column]) -> list[tuple[Column, list[str]]]:
    """(column, models) of the table by category: all models for the first column, only base and tuned for others."""
    models = list(report["alignment"])
    two = [model for model in models if model in ("base", "tuned")]
    return [(column, two if number or column == PMI else models) for number, column in enumerate(columns)]


def page_environment(*filters: Callable) -> Environment:
    """The environment of the templates in this folder. It escapes text and raises an error for missing values.

    Args:
        filters: functions that templates can use, by their names.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def render(report: dict, config: RunConfig) -> str:
    """The HTML page of a report, from the content of report.json and the images in the run folder."""
    run_dir = report["run"]["run_dir"]
    environment = page_environment(value, change, heading, label, size, decimal, direction, number, duration, plain)
    title, verdict = headline(report)
    primary, pairs = _primary(report), [f"{model}-{baseline}" for model, baseline in pairs_of(config)]
    shown = _shown_columns(report)
    return environment.get_template("template.html.j2").render(
        report=report,
        config=config,
        config_yaml=yaml.safe_dump(report["run"]["config"], sort_keys=False, allow_unicode=True),
        title=title,
        verdict=verdict,
        columns=shown,
        broken_down=_broken_down(report, [column for column in (*primary, PMI) if column in shown]),
        marking=next((column for column in primary if column in shown), None),
        measured=[column for column in primary if column.name in report["selection"]["auc"]],
        pooled=[column for column in primary if f"kept_{column.name}" in report["selection"]],
        pairs=[pair for pair in pairs if pair in report["comparison"]],
        plots=plots(report),
        guided=_named(report, report["guidance"]["column"]) if report["guidance"] else None,
        compared_at=compared_at(report),
        side_by_side=side_by_side(run_dir, report["guidance"].get("headline")),
        previews=previews(run_dir, config),
        shown_score=shown_score(config),
        shown_errors=SHOWN_ERRORS,
        strip=STRIP,
        seeds_shown=SIDE_BY_SIDE_SEEDS,
        group_name=group_name,
    )


def write_report(run_dir: str, config: RunConfig) -> str:
    """Write report/report.json and report/index.html in a run folder. Returns the URI of the page.

    A report can be written after any stage: it leaves out the stages that have not run.
    """
    report = summarise(run_dir, config)
    write_json(join(run_dir, "report", "report.json"), report)
    uri = join(run_dir, "report", "index.html")
    write_bytes(uri, render(report, config).encode())
    return uri
