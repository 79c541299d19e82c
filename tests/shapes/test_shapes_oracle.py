import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from mi_ray.shapes.grammar import CATEGORIES, draw_scene, parse, sample_spec
from mi_ray.shapes.oracle import read, score
from mi_ray.shapes.scenes import BACKGROUND, SHAPES, SceneObject, render

CIRCLE = SceneObject("red", "circle", "solid", 16, 32, 22)
SQUARE = SceneObject("blue", "square", "striped", 46, 30, 22)
STAR = SceneObject("yellow", "star", "dotted", 16, 52, 20)


def pairs(count: int, seed: int):
    rng = np.random.default_rng(seed)
    for i in range(count):
        spec = sample_spec(CATEGORIES[i % len(CATEGORIES)], rng)
        yield spec, draw_scene(spec, rng, unseen=True)


def share_exact(count: int, seed: int, spoil=lambda pixels: pixels) -> float:
    exact = []
    for spec, scene in pairs(count, seed):
        pixels = np.clip(spoil(render(scene).astype(np.float32)), 0, 255)
        exact.append(score(np.round(pixels).astype(np.uint8), spec).exact)
    return float(np.mean(exact))


def test_oracle_reads_drawn_scenes():
    assert share_exact(300, seed=0) >= 0.99


def test_detections_are_the_drawn_objects():
    right = []
    for _, scene in pairs(150, seed=1):
        found = read(render(scene))
        assert len(found) == len(scene)
        for obj in scene:
            nearest = min(found, key=lambda d: np.hypot(d.x - obj.x, d.y - obj.y))
            assert np.hypot(nearest.x - obj.x, nearest.y - obj.y) < 1.5
            right.append((nearest.color, nearest.shape, nearest.texture) == (obj.color, obj.shape, obj.texture))
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pixels: pixels + np.random.default_rng(0).normal(0, 12, pixels.shape),
        lambda pixels: ndimage.gaussian_filter(pixels, (0.8, 0.8, 0)),
        lambda pixels: 0.92 * pixels,
        lambda pixels: pixels + 10,
    ],
    ids=["noise", "blur", "darker", "brighter"],
)
def test_mild_noise_does_not_change_the_scores(spoil):
    assert share_exact(120, seed=2, spoil=spoil) >= 0.97


def test_correct_image_has_full_scores():
    image = render((CIRCLE, SQUARE))
    result = score(image, "a red solid circle left of a blue striped square")
    assert (result.exact, result.objects, result.attributes, result.count, result.relation) == (1, 1, 1, 1, 1)
    assert score(image, "a red circle and a blue square").relation is None


@pytest.mark.parametrize(
    ("prompt", "scene", "expected"),
    [
        (
            "a red circle and a blue square",
            (replace(CIRCLE, color="pink"), SQUARE),
            {"objects": 1 / 2, "attributes": 3 / 4},
        ),
        (
            "a red circle and a blue square",
            (replace(CIRCLE, color="blue"), replace(SQUARE, color="red")),
            {"objects": 0, "attributes": 1 / 2, "count": 1},
        ),
        ("a solid circle and a striped square", (CIRCLE, replace(SQUARE, texture="dotted")), {"objects": 1 / 2}),
        ("a circle and a square", (CIRCLE, replace(SQUARE, shape="heart")), {"objects": 1 / 2, "count": 1 / 2}),
        ("a circle and a square", (CIRCLE,), {"objects": 1 / 2, "attributes": 1 / 2, "count": 1 / 2}),
        ("a circle and a square", (CIRCLE, SQUARE, replace(STAR, y=54, size=17)), {"objects": 1, "count": 1}),
        ("a circle right of a square", (CIRCLE, SQUARE), {"objects": 1, "relation": 0}),
        ("a circle above a square", (CIRCLE, SQUARE), {"objects": 1, "relation": 0}),
        ("two circles", (CIRCLE,), {"objects": 1 / 2, "count": 0}),
        (
            "two circles",
            (CIRCLE, replace(CIRCLE, x=46), replace(CIRCLE, x=32, y=54, size=17)),
            {"objects": 1, "count": 0},
        ),
    ],
    ids=["color", "swapped", "texture", "shape", "missing", "extra", "opposite", "other_axis", "too_few", "too_many"],
)
def test_each_kind_of_error_is_found(prompt, scene, expected):
    result = score(render(scene), prompt)
    assert result.exact == 0
    for key, value in expected.items():
        assert getattr(result, key) == pytest.approx(value), key


@pytest.mark.parametrize("shape", SHAPES)
def test_open_attributes_match_anything_except_extra_objects(shape):
    rng = np.random.default_rng(4)
    spec = parse(f"a {shape}")
    for _ in range(20):
        assert score(render(draw_scene(spec, rng, unseen=True)), spec).exact == 1
    two = render(draw_scene(parse(f"two {shape}s"), rng))
    assert score(two, spec).exact == 0


def test_tie_is_broken_by_the_relation():
    image = render((replace(CIRCLE, x=12, size=17), replace(SQUARE, x=32, size=17), replace(CIRCLE, x=52, size=17)))
    for side in ("left", "right"):
        result = score(image, f"a circle {side} of a square")
        assert (result.exact, result.objects, result.relation) == (0, 1, 1)


def test_all_counted_objects_must_be_in_the_relation():
    scene = (replace(CIRCLE, x=12, y=14, size=18), replace(CIRCLE, x=12, y=50, size=18), replace(SQUARE, x=50))
    assert score(render(scene), "two circles left of one square").exact == 1
    between = (replace(CIRCLE, x=10, size=16), replace(SQUARE, x=32, size=16), replace(CIRCLE, x=54, size=16))
    assert score(render(between), "two circles left of one square").relation == 0


@pytest.mark.parametrize(
    "image",
    [
        np.full((64, 64, 3), BACKGROUND, np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
        np.random.default_rng(1).choice(np.array([[248], [60]], np.uint8), (64, 64)).repeat(3, -1),
    ],
    ids=["blank", "black", "noise", "dust"],
)
def test_empty_image_has_score_zero(image):
    began = time.perf_counter()
    result = score(image, "one red circle and three blue hearts")
    assert (result.exact, result.objects, result.attributes, result.count) == (0, 0, 0, 0)
    assert time.perf_counter() - began < 1


def test_many_objects_are_scored_quickly():
    dots = [SceneObject("green", "circle", "solid", 6 + 9 * (i % 7), 6 + 9 * (i // 7), 7) for i in range(28)]
    squares = [SceneObject("blue", "square", "solid", 10 + 18 * i, 54, 12) for i in range(3)]
    image = render((*dots, *squares))
    assert len(read(image)) == 31
    began = time.perf_counter()
    result = score(image, "three blue squares and one green circle")
    assert time.perf_counter() - began < 1
    assert (result.exact, result.objects) == (0, 1)


def test_prompt_outside_the_grammar_is_refused():
    with pytest.raises(ValueError, match="not a sentence"):
        score(render((CIRCLE,)), "a cat")
