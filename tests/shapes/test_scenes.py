from itertools import combinations

import numpy as np
import pytest

from mi_ray.shapes.grammar import CATEGORIES, draw_scene, sample_spec
from mi_ray.shapes.scenes import (
    BACKGROUND,
    COLORS,
    GAP,
    IMAGE_SIZE,
    INK,
    MARGIN,
    PALETTE,
    RELATIONS,
    SHAPES,
    TEXTURES,
    SceneObject,
    relation_holds,
    render,
)


def scenes(seed: int) -> list[tuple[SceneObject, ...]]:
    rng = np.random.default_rng(seed)
    return [draw_scene(sample_spec(category, rng), rng) for category in CATEGORIES for _ in range(20)]


def test_the_same_seed_draws_the_same_images():
    first, second = (np.stack([render(scene) for scene in scenes(5)]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (120, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert first.dtype == np.uint8
    assert not np.array_equal(first, np.stack([render(scene) for scene in scenes(6)]))


def test_objects_keep_their_distance():
    for scene in scenes(0):
        for obj in scene:
            assert min(obj.x, obj.y) - obj.size / 2 >= MARGIN
            assert max(obj.x, obj.y) + obj.size / 2 <= IMAGE_SIZE - MARGIN
        for a, b in combinations(scene, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2 + GAP


def test_first_two_objects_are_in_the_relation():
    rng = np.random.default_rng(1)
    for category in ("spatial", "complex"):
        for _ in range(50):
            spec = sample_spec(category, rng)
            if spec.relation:
                a, b, *_ = draw_scene(spec, rng)
                assert relation_holds(spec.relation, (a.x, a.y), (b.x, b.y))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("texture", TEXTURES)
def test_paint_and_ink_fill_the_silhouette_only(shape, texture):
    for color in COLORS:
        image = render((SceneObject(color, shape, texture, 32.0, 30.0, 30.0),)).reshape(-1, 3)
        inked = (image == INK).all(1).sum()
        assert (image == PALETTE[color]).all(1).sum() > 60
        assert (inked > 40) == (texture != "solid")
        assert (image == BACKGROUND).all(1).sum() >= IMAGE_SIZE**2 - 31**2


def test_relations_follow_the_dominant_axis():
    holding = {r: relation_holds(r, (10, 30), (40, 25)) for r in RELATIONS}
    assert holding == {"left": True, "right": False, "above": False, "below": False}
    holding = {r: relation_holds(r, (10, 60), (20, 25)) for r in RELATIONS}
    assert holding == {"left": False, "right": False, "above": False, "below": True}
