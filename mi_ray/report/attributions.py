"""A picture of the PMI of an image and its prompt: a map over the image, and a bar for each word."""

import io
import warnings

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mi_ray.report.figures import BAD, GOOD
from mi_ray.report.fonts import families_for

_FULL_COLOR = 99.5  # percentile of the map's absolute values that gets the full colour
_DIM = 0.35  # contrast of the image below the overlay
_DIVERGING = LinearSegmentedColormap.from_list("information", [BAD, "#ffffff", GOOD])


def attribution_png(
    image: np.ndarray, density: np.ndarray, prompt: str, value: float, standard_error: float | None, words: list[dict]
) -> bytes:
    """The image, the map over the image, and a bar for each word, as PNG.

    Args:
        image: (h, w, 3) uint8.
        density: (h, w) PMI in nats per pixel. Positive values are green: there the prompt makes the image likelier.
            Negative values are red.
        value, standard_error: PMI of the pair, nats.
        words: for each word {word, value, standard_error} in nats.
    """
    with warnings.catch_warnings(), rc_context({"font.family": families_for(prompt)}):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # `families_for` tells the user
        return _drawn(image, density, prompt, value, standard_error, words)


def _drawn(
    image: np.ndarray, density: np.ndarray, prompt: str, value: float, standard_error: float | None, words: list[dict]
) -> bytes:
    figure = Figure((10.5, 3.8), dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    uncertain = "" if standard_error is None else f" ± {standard_error:.2f}"
    number = f"{value:.2f}".replace("-", "−")
    figure.suptitle(f"“{_shortened(prompt)}”   {number}{uncertain} nats", fontsize=11, parse_math=False)
    panels[0].imshow(image, interpolation="nearest")
    panels[0].set_title("image", loc="left", fontsize=9)
    _overlay(figure, panels[1], image, density)
    for axes in panels[:2]:
        axes.set_axis_off()
    _bars(panels[2], words)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= 90 else prompt[:87] + "..."


def _overlay(figure: Figure, axes: Axes, image: np.ndarray, density: np.ndarray):
    grey = image.mean(-1)
    axes.imshow(255 - _DIM * (255 - grey), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    limit = max(float(np.percentile(np.abs(density), _FULL_COLOR)), 1e-12)
    alpha = np.clip(np.abs(density) / limit, 0, 1) * 0.85
    shown = axes.imshow(density, cmap=_DIVERGING, vmin=-limit, vmax=limit, alpha=alpha, interpolation="nearest")
    bar = figure.colorbar(shown, ax=axes, shrink=0.75, ticks=[-limit, 0, limit], format=lambda x, _: f"{x:.1g}")
    bar.solids.set_alpha(1)
    bar.ax.tick_params(labelsize=7)
    axes.set_title("nats per pixel", loc="left", fontsize=9)


def _bars(axes: Axes, words: list[dict]):
    if not words:
        axes.set_axis_off()
        return
    values = [word["value"] for word in words]
    errors = [word["standard_error"] or 0 for word in words]
    colors = [GOOD if value > 0 else BAD for value in values]
    axes.barh(range(len(words)), values, xerr=errors, color=colors, alpha=0.75, height=0.6, ecolor="#555", capsize=2)
    axes.axvline(0, color="#333", lw=0.8)
    axes.set_yticks(range(len(words)), [word["word"] for word in words], fontsize=9, parse_math=False)
    axes.set_ylim(len(words) - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("nats lost without the word", loc="left", fontsize=9)
