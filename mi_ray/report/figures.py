"""The report's figures, as SVG data URIs that follow the reader's light or dark colour scheme."""

import base64
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mi_ray.alignment.metric import Column
from mi_ray.report.columns import direction, heading, label, scale, unit_of_change

INK = "#010203"  # placeholder for the page's text colour; replaced when the figure is written
COLORS = {"base": "#8b929e", "tuned": "#3f74d8", "random": "#c98a1b"}
OTHER_COLORS = ("#3f9b6b", "#8a5fc0", "#b8567f", "#3a9aa8")  # of other models, in turn
GOOD, BAD = "#2f9e6e", "#d0605e"

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same run gives the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
}
_SCHEME = "svg{color:#33383f}@media(prefers-color-scheme:dark){svg{color:#c9ced6}}"


@contextmanager
def styled_figure(width: float, height: float) -> Iterator[Figure]:
    """Context with a figure of this size in inches, in the report's style."""
    with mpl.rc_context(_STYLE):
        yield Figure((width, height), layout="constrained")


def data_uri(figure: Figure) -> str:
    """The figure as an SVG data URI. Everything in the colour `INK` gets the colour of the page's text."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue().replace(INK, "currentColor").replace("*{", f"{_SCHEME}*{{", 1)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]+", r"\1 system-ui, sans-serif", text)
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def _errorbar(axes: Axes, result: dict, key: str, y: float, scale: float, color: str):
    """A point with its interval, if it has one."""
    value = result[key] * scale
    if result["low"] is not None:
        axes.plot([result["low"] * scale, result["high"] * scale], [y, y], color=color, lw=1.6, solid_capstyle="round")
    axes.plot(value, y, "o", color=color, ms=5)


def _colors(models: Iterable[str]) -> dict[str, str]:
    """A colour for each model."""
    return COLORS | dict(zip((m for m in models if m not in COLORS), cycle(OTHER_COLORS), strict=False))


def _curve(axes: Axes, points: list[dict], x: str, times: float, color: str, name: str | None):
    """A line through the values of points. If all points have a 95 % interval, it is drawn as a band."""
    places = [point[x] for point in points]
    axes.plot(places, [times * point["value"] for point in points], "o-", color=color, lw=1.4, ms=3, label=name)
    if points and all(point.get("low") is not None for point in points):
        ends = ([times * point[end] for point in points] for end in ("low", "high"))
        axes.fill_between(places, *ends, color=color, alpha=0.15, lw=0)


def guidance_plot(guidance: dict, column: Column) -> str:
    """Mean of a column against guidance_scale, one line per model. A dashed line marks the scale of the headline."""
    with styled_figure(6.4, 3.2) as figure:
        axes, colors = figure.subplots(), _colors(guidance["curves"])
        axes.axvline(guidance["headline"], color=INK, lw=0.8, alpha=0.5, ls=(0, (3, 3)))
        for model, points in guidance["curves"].items():
            _curve(axes, points, "guidance_scale", scale(column), colors[model], model)
        axes.set_xlabel("guidance scale (dashed: scale of the comparison)")
        axes.set_title(heading(column), loc="left")
        axes.legend(loc="best")
        return data_uri(figure)


GUARDS = {  # values of an update: title, and whether it is divided by the value of the first update
    "reward": ("reward of the candidates", False),
    "latent_std": ("std of latents / first update", True),
    "diversity": ("diversity / first update", True),
    "distance_to_base": ("squared distance to base", False),
    "effective_guidance": ("effective guidance γ", False),
}


@dataclass(frozen=True)
class Panel:
    title: str
    x: str  # name of the x axis: update or version (of the policy)
    curves: dict[str, list[dict]]  # points of each arm, with x, value and optionally low and high
    times: float = 1  # factor of the values


def online_panels(online: dict[str, dict], columns: list[Column]) -> list[Panel]:
    """Panels of reward and guards by update, and of self-score and columns by validated version. None is empty.

    Args:
        columns: columns of metrics, and of scores (score_<name>).
    """
    panels = [
        Panel(title, "update", {arm: _of_updates(found["updates"], key, first) for arm, found in online.items()})
        for key, (title, first) in GUARDS.items()
    ]
    validated = [Panel("self-score (held out)", "version", {arm: found["self_score"] for arm, found in online.items()})]
    for column in columns:
        curves = {
            arm: [
                {"version": one["version"], **one["columns"][column.name]}
                for one in found["validations"]
                if column.name in one["columns"]
            ]
            for arm, found in online.items()
        }
        title = f"{heading(column).removeprefix('score ')} (held out)"
        validated.append(Panel(title, "version", curves, scale(column)))
    return [panel for panel in (panels[0], *validated, *panels[1:]) if any(panel.curves.values())]


def online_plot(panels: list[Panel], kept: dict[str, int | None]) -> str:
    """The panels with one line per arm. A dotted line marks the version that an arm keeps."""
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    with styled_figure(11, 0.3 + 1.9 * down) as figure:
        places, colors = figure.subplots(down, across, squeeze=False).ravel(), _colors(kept)
        for axes, panel in zip(places, panels, strict=False):
            for arm, points in panel.curves.items():
                _curve(axes, points, panel.x, panel.times, colors[arm], arm)
                if panel.x == "version" and points and kept[arm] is not None:
                    axes.axvline(kept[arm], color=colors[arm], lw=0.8, ls=(0, (2, 3)))
            axes.set_title(panel.title, loc="left")
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        for axes in places[max(0, len(panels) - across) : len(panels)]:
            axes.set_xlabel("update")
        if len(kept) > 1:
            places[0].legend(loc="best")
        return data_uri(figure)


def _of_updates(updates: list[dict], key: str, relative: bool) -> list[dict]:
    """The points of a curve. With `relative`, they are divided by the first value."""
    points = [{"update": line["update"], "value": line[key]} for line in updates if line.get(key) is not None]
    first = points[0]["value"] if relative and points else 1
    return [point | {"value": point["value"] / first} for point in points] if first else []


def difference_plot(groups: dict[str, dict], column: Column, difference: str = "tuned − base") -> str:
    """Paired differences of a column with their intervals, one line per group. A clear difference is coloured."""
    colors = {"better": GOOD, "worse": BAD, "unclear": COLORS["base"]}
    with styled_figure(5.4, 0.6 + 0.3 * len(groups)) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=INK, lw=0.8, alpha=0.5)
        for y, result in enumerate(groups.values()):
            _errorbar(axes, result, "difference", y, scale(column), colors[direction(result, column)])
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{difference},{unit_of_change(column)} of {label(column)}")
        return data_uri(figure)


def auc_plot(aucs: dict[str, dict[str, dict]]) -> str:
    """AUC within prompts of each score with its interval, one panel per metric. 0.5 is chance."""
    with styled_figure(5.4, sum(0.6 + 0.32 * len(of_metric) for of_metric in aucs.values())) as figure:
        panels = figure.subplots(len(aucs), squeeze=False, height_ratios=[len(scores) for scores in aucs.values()])
        lowest = min(result["value"] - 0.05 for of_metric in aucs.values() for result in of_metric.values())
        for axes, (metric, of_metric) in zip(panels[:, 0], aucs.items(), strict=True):
            axes.axvline(0.5, color=INK, lw=0.8, alpha=0.5, ls=(0, (3, 3)))
            for y, result in enumerate(of_metric.values()):
                axes.barh(y, result["value"] - 0.5, left=0.5, height=0.55, color=COLORS["tuned"], alpha=0.35)
                _errorbar(axes, result, "value", y, 1, COLORS["tuned"])
            axes.set_yticks(range(len(of_metric)), list(of_metric))
            axes.set_ylim(len(of_metric) - 0.5, -0.5)
            axes.set_xlim(min(0.3, lowest), 1)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_xlabel(f"AUC within prompts by {metric} (0.5: chance)")
        return data_uri(figure)


def score_plot(distributions: dict[str, dict]) -> str:
    """Distribution of each score minus its prompt's mean, for good and other candidates if a metric measured them."""
    columns = min(3, len(distributions))
    rows = -(-len(distributions) // columns)
    with styled_figure(11, 2.3 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, distribution) in zip(panels, distributions.items(), strict=False):
            edges = distribution["edges"]
            groups = [group for group in distribution if group != "edges"]  # good candidates first, or all
            for group, color in zip(groups, (GOOD, BAD) if len(groups) > 1 else (COLORS["tuned"],), strict=True):
                if any(distribution[group]):
                    histogram = {"x": edges[:-1], "bins": edges, "weights": distribution[group], "density": True}
                    axes.hist(**histogram, histtype="stepfilled", color=color, alpha=0.28)
                    axes.hist(**histogram, histtype="step", color=color, lw=1.2, label=group)
            axes.set_title(name, loc="left")
            axes.set_xlabel("nats above the prompt's mean")
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        for axes in panels[len(distributions) :]:
            axes.set_visible(False)
        if "all" not in next(iter(distributions.values())):
            panels[0].legend(loc="upper right")
        return data_uri(figure)


def training_plot(training: dict[str, dict]) -> str:
    """Loss and gradient norm by optimiser step, raw and smoothed, one colour per model."""
    with styled_figure(11, 2.8) as figure:
        panels = figure.subplots(1, 2)
        colors = _colors(training)
        for model, result in training.items():
            color = colors[model]
            for axes, key in zip(panels, ("loss", "grad_norm"), strict=True):
                values = pd.Series(result[key], dtype=float)
                window = max(1, len(values) // 20)
                steps = np.arange(1, len(values) + 1)
                axes.plot(steps, values, color=color, lw=0.7, alpha=0.35)
                smooth = values.rolling(window, min_periods=1, center=True).mean()
                axes.plot(steps, smooth, color=color, lw=1.6, label=model)
                for start in result["round_starts"][1:]:
                    axes.axvline(start + 0.5, color=color, lw=0.8, ls=(0, (2, 3)))
        panels[0].set_title("loss", loc="left")
        panels[1].set_title("gradient norm (before clipping)", loc="left")
        for axes in panels:
            axes.set_xlabel("optimiser step")
        panels[0].legend(loc="upper right")
        return data_uri(figure)
