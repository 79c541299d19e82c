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

from mi_ray.config import RunConfig
from mi_ray.report import figures
from mi_ray.report.pools import round_numbers
from mi_ray.report.summary import METRICS, PAIRS, summarise
from mi_ray.storage import join, list_tables, read_table, write_bytes, write_json

SIDE_BY_SIDE_PROMPTS, SIDE_BY_SIDE_SEEDS = 12, 4
PREVIEWS, STRIP = 12, 5  # prompts, and images in each strip of highest and lowest scores
MAX_SIDE = 256  # pixels; larger images are inlined as thumbnails
CRISP_SIDE = 128  # pixels; images up to this size are shown with their pixels
SHOWN_ERRORS = 50
SAMPLE_SEED = 0  # of the prompts shown side by side


# ------------------------------------------------------------------------------------------ numbers as text
def _half(result: dict) -> float | None:
    return None if result["low"] is None else (result["high"] - result["low"]) / 2


def decimal(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A number with a true minus sign; a dash for None. `sign`: "+" shows that of positive numbers too."""
    return "–" if value is None else f"{value:{sign}.{digits}f}".replace("-", "−")


def _with_half(text: str, half: float | None, digits: int) -> str:
    return text if half is None else f"{text} ± {half:.{digits}f}"


def percent(result: dict | None) -> str:
    """48.2 ± 3.0 (per cent) of a share with its interval."""
    if result is None:
        return "–"
    half = _half(result)
    return _with_half(decimal(100 * result["value"], 1), half and 100 * half, 1)


def nats(result: dict | None) -> str:
    return "–" if result is None else _with_half(decimal(result["value"]), _half(result), 2)


def points(result: dict | None) -> str:
    """+4.9 ± 2.1 (percentage points) of a difference of shares."""
    if result is None:
        return "–"
    half = _half(result)
    return _with_half(decimal(100 * result["difference"], 1, "+"), half and 100 * half, 1)


def nats_difference(result: dict | None) -> str:
    if result is None:
        return "–"
    return _with_half(decimal(result["difference"], sign="+"), _half(result), 2)


def direction(result: dict | None) -> str:
    """better or worse where the interval is clear of zero, else unclear."""
    if result is None or result["low"] is None or result["low"] <= 0 <= result["high"]:
        return "unclear"
    return "better" if result["low"] > 0 else "worse"


def plain(value: object) -> str:
    """A cell of a benchmark's table."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return decimal(value, 3) if isinstance(value, float) else str(value)


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


_VERDICTS = {
    "better": "The tuned model follows its prompts better: the 95 % interval is clear of zero.",
    "worse": "The tuned model follows its prompts worse: the 95 % interval is clear of zero.",
    "unclear": "This run shows no clear difference: the 95 % interval includes zero.",
}


def headline(report: dict) -> tuple[str, str]:
    """What came out, in one line, and what may be concluded from it."""
    alignment, comparison = report["alignment"], report["comparison"].get("tuned-base", {})
    for metric, unit, show, change in (("exact", " %", percent, points), ("pmi", "", nats, nats_difference)):
        difference = comparison.get(metric)
        if difference is None:
            continue
        before, after = (show(alignment[model][metric]).split(" ")[0] for model in ("base", "tuned"))
        unit_of_change = "points" if metric == "exact" else "nats"
        name = "exact" if metric == "exact" else "PMI"
        verdict = _VERDICTS[direction(difference)]
        if difference["low"] is None:
            verdict = "One prompt alone allows no conclusion."
        random = report["comparison"].get("tuned-random", {}).get(metric)
        if random:
            clear = {"better": "clear of zero", "worse": "clear of zero, the wrong way", "unclear": "not clear of zero"}
            verdict += f" Against fine-tuning on randomly chosen candidates: {change(random)} {unit_of_change}"
            verdict += f" ({clear[direction(random)]})."
        if report["quality"].get("tuned", {}).get("collapsed"):
            verdict += " But the tuned model's images have collapsed: see Image quality."
        return f"{name}: {before}{unit} → {after}{unit} ({change(difference)} {unit_of_change})", verdict
    if alignment:
        return f"Evaluated so far: {', '.join(alignment)}", "Base and tuned model cannot be compared yet."
    return "Not evaluated yet", "The evaluation has not run; below is what the run has so far."


def _grid(rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def alignment_table(report: dict) -> str:
    """The alignment of every model and the paired differences, as plain text for a terminal.

    Shares in per cent and differences in points, PMI in nats, each with the half-width of its 95 % interval.
    """
    alignment, comparison = report["alignment"], report["comparison"]
    if not alignment:
        return "no evaluation yet"
    models = list(alignment)
    pair = comparison.get("tuned-base", {})
    metrics = [metric for metric in METRICS if any(metric in alignment[model] for model in models)]
    rows = [["", *models, *(["tuned − base"] if pair else [])]]
    for metric in metrics:
        change = [points(pair.get(metric))] if pair else []
        rows.append([f"{metric} %", *(percent(alignment[model].get(metric)) for model in models), *change])
    pmi = [nats_difference(pair.get("pmi"))] if pair else []
    rows.append(["PMI, nats", *(nats(alignment[model].get("pmi")) for model in models), *pmi])
    for grouping in ("by_split", "by_category"):
        for name in alignment[models[0]][grouping]:
            cells = [percent(alignment[model][grouping].get(name, {}).get("exact")) for model in models]
            change = [points(pair[grouping].get(name, {}).get("exact"))] if pair else []
            if "exact" in metrics:
                rows.append([f"  exact %, {name}", *cells, *change])
    sizes = next(iter(alignment[models[0]][m] for m in ("exact", "pmi") if m in alignment[models[0]]), None)
    notes = []
    if sizes:
        size = f"{sizes['n_prompts']} prompts, {sizes['n_images']} images a model"
        notes.append(f"{size}; ± is a 95 % interval over prompts, differences are paired")
    for name, result in comparison.items():
        if "exact" in result and name != "tuned-base":
            notes.append(f"{name.replace('-', ' − ')}: {points(result['exact'])} points of exact, paired")
    return "\n".join([_grid(rows), "", *notes]).rstrip()


# ------------------------------------------------------------------------------------------ images
def _tile(row: dict) -> dict:
    """What the template shows of an image: source, whether to keep its pixels crisp, exact (or None)."""
    content = row["image"]["bytes"]
    with Image.open(io.BytesIO(content)) as image:
        crisp = max(image.size) <= CRISP_SIDE
        kind = "png"
        if max(image.size) > MAX_SIDE:
            thumbnail = image.convert("RGB")
            thumbnail.thumbnail((MAX_SIDE, MAX_SIDE))
            buffer = io.BytesIO()
            thumbnail.save(buffer, "JPEG", quality=88)
            content, kind = buffer.getvalue(), "jpeg"
    exact = None if row["exact"] is None else row["exact"] == 1
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"source": source, "crisp": crisp, "exact": exact}


def _parts(folder: str, columns: list[str], first: int | None = None):
    """The rows of a folder, or of its first few parts, so that never more than one part's images are in memory."""
    for name in list_tables(folder)[:first]:
        yield read_table(join(folder, name), columns).to_pylist()


def side_by_side(run_dir: str) -> list[dict]:
    """Images of base and tuned model on the same seeds, for prompts drawn at random with a fixed seed."""
    folders = {model: join(run_dir, "evaluation", model) for model in ("base", "tuned")}
    rows = {model: {} for model in folders}
    for model, folder in folders.items():
        for part in _parts(folder, ["prompt_id", "error"]):
            rows[model] |= {row["prompt_id"]: [] for row in part if row["error"] is None}
    both = sorted(rows["base"].keys() & rows["tuned"].keys())
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(both))
    chosen = {both[i] for i in order[:SIDE_BY_SIDE_PROMPTS]}
    columns = ["prompt_id", "prompt", "category", "split", "seed", "exact", "image", "error"]
    for model, folder in folders.items():
        for part in _parts(folder, columns):
            for row in part:
                if row["prompt_id"] in chosen and row["image"] and row["error"] is None:
                    rows[model][row["prompt_id"]].append(row)
    cards = []
    for prompt_id in sorted(chosen):
        base, tuned = ({row["seed"]: row for row in rows[model][prompt_id]} for model in folders)
        seeds = [seed for seed in base if seed in tuned][:SIDE_BY_SIDE_SEEDS]
        if seeds:
            first = base[seeds[0]]
            tiles = {name: [_tile(m[seed]) for seed in seeds] for name, m in (("base", base), ("tuned", tuned))}
            cards.append({key: first[key] for key in ("prompt", "category", "split")} | {"tiles": tiles})
    return sorted(cards, key=lambda card: (card["split"] or "", card["category"] or "", card["prompt"]))


def shown_score(config: RunConfig) -> str:
    """The selecting score; under the controls `random` and `oracle` the first one computed."""
    return config.select.by if config.select.by in config.score.names else config.score.names[0]


def previews(run_dir: str, config: RunConfig) -> list[dict]:
    """The highest- and lowest-scored candidates of the previewed prompts, which are a run's first, of the last round
    that has them; of a pruned pool, those that were sampled to the end."""
    score = f"score_{shown_score(config)}"
    columns = ["prompt_id", "prompt", score, "exact", "kept", "image", "pruned_after", "error"]
    first = math.ceil(config.generate.preview_prompts / config.generate.prompts_per_shard)
    for number in reversed(round_numbers(run_dir)):
        cards = []
        for part in _parts(join(run_dir, f"round-{number}", "candidates"), columns, first):
            pools = {}
            for row in part:
                if row["error"] is None and row["pruned_after"] is None:
                    pools.setdefault(row["prompt_id"], []).append(row)
            cards += [_strips(pool, score) for pool in pools.values() if all(row["image"] for row in pool)]
            if len(cards) >= PREVIEWS:
                break
        if cards:
            return [card | {"round": number} for card in cards[:PREVIEWS]]
    return []


def _strips(pool: list[dict], score: str) -> dict:
    pool = sorted(
        (row for row in pool if row[score] is not None and np.isfinite(row[score])), key=lambda row: -row[score]
    )
    size = min(STRIP, len(pool) // 2)
    strips = {"highest": pool[:size], "lowest": pool[len(pool) - size :]}
    tiles = {
        name: [_tile(row) | {"score": row[score], "kept": bool(row["kept"])} for row in rows]
        for name, rows in strips.items()
    }
    return {"prompt": pool[0]["prompt"] if pool else "", "n_candidates": len(pool), "tiles": tiles}


# ------------------------------------------------------------------------------------------ the page
def _plots(report: dict) -> dict:
    """Data URIs of the figures that this run has the numbers for."""
    plots = {}
    comparison = report["comparison"].get("tuned-base", {})
    groups = {"all": comparison.get("exact")}
    for grouping in ("by_split", "by_category"):
        groups |= {name: result.get("exact") for name, result in comparison.get(grouping, {}).items()}
    groups = {name: result for name, result in groups.items() if result}
    if len(groups) > 1:
        plots["differences"] = figures.difference_plot(groups)
    if report["selection"]["auc"]:
        plots["auc"] = figures.auc_plot(report["selection"]["auc"])
    if report["selection"]["distributions"]:
        plots["scores"] = figures.score_plot(report["selection"]["distributions"])
    curves = {model: result for model, result in report["training"].items() if result["loss"]}
    if curves:
        plots["training"] = figures.training_plot(curves)
    return plots


def page_environment(*filters: Callable) -> Environment:
    """Of the templates beside this file: escaping, strict about missing values, with the filters by their names."""
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
    """The page of a report, from its numbers and the images in the run's folder."""
    run_dir = report["run"]["run_dir"]
    environment = page_environment(percent, nats, points, nats_difference, decimal, direction, number, duration, plain)
    title, verdict = headline(report)
    return environment.get_template("template.html.j2").render(
        report=report,
        config=config,
        config_yaml=yaml.safe_dump(report["run"]["config"], sort_keys=False, allow_unicode=True),
        title=title,
        verdict=verdict,
        metrics=[m for m in METRICS if any(m in result for result in report["alignment"].values())],
        pairs=[f"{model}-{baseline}" for model, baseline in PAIRS if f"{model}-{baseline}" in report["comparison"]],
        plots=_plots(report),
        side_by_side=side_by_side(run_dir),
        previews=previews(run_dir, config),
        shown_score=shown_score(config),
        shown_errors=SHOWN_ERRORS,
        strip=STRIP,
        seeds_shown=SIDE_BY_SIDE_SEEDS,
    )


def write_report(run_dir: str, config: RunConfig) -> str:
    """Write report/report.json and report/index.html of a run's folder; the URI of the page.

    What has not run yet is left out, so a report can be written after any stage.
    """
    report = summarise(run_dir, config)
    write_json(join(run_dir, "report", "report.json"), report)
    uri = join(run_dir, "report", "index.html")
    write_bytes(uri, render(report, config).encode())
    return uri
