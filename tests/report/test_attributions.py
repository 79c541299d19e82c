"""The picture of a single pair: the user's text stays as it is, and what cannot be drawn is said."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from mi_ray.report import fonts
from mi_ray.report.attributions import attribution_png
from mi_ray.report.fonts import families_for

IMAGE, DENSITY = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8))


@pytest.fixture
def titles(monkeypatch):
    found = []
    whole = Figure.suptitle

    def suptitle(self, text, **options):
        found.append(text)
        return whole(self, text, **options)

    monkeypatch.setattr(Figure, "suptitle", suptitle)
    return found


def test_a_hyphen_of_the_prompt_stays_one(titles):
    attribution_png(IMAGE, DENSITY, "a t-shirt $x$", -1.5, 0.25, [])
    assert titles == ["“a t-shirt $x$”   −1.50 ± 0.25 nats"]


def test_characters_without_a_font_are_said_once(capsys, monkeypatch):
    manager = fonts.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if font.name.startswith("DejaVu")])
    prompt, words = "a circle 红\U0001f9ff", [{"word": "红", "value": 1.0, "standard_error": None}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribution_png(IMAGE, DENSITY, prompt, 1.0, None, words)
    told = capsys.readouterr().err
    assert told.count("no installed font has them; install one") == 1
    assert "红" in told
    families_for("a red circle, naïve — Ωμέγα\u200d\ufe0f")
    assert capsys.readouterr().err == ""


def test_an_installed_font_with_the_characters_is_taken(monkeypatch):
    has = {"DejaVu": set("ab"), "Other": set("红"), "Last": set("红色")}
    of = [fonts.font_manager.FontEntry(fname=f"/{name}.ttf", name=name) for name in ("Other", "Last Resort High")]
    monkeypatch.setattr(fonts.font_manager.fontManager, "ttflist", of)
    monkeypatch.setattr(fonts.font_manager, "findfont", lambda name: "/DejaVu.ttf")
    monkeypatch.setattr(fonts, "_characters", lambda path: has[path[1:].partition(".")[0].partition(" ")[0]])
    assert families_for("ab红") == ["DejaVu Sans", "Other"]
