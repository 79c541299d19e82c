"""The questions of soft-tifa about prompts of the embedded world, answered by the objects that the oracle sees."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from mi_ray.alignment.soft_tifa import NUMBERS, shape_questions
from mi_ray.shapes.grammar import CATEGORIES, draw_scene, parse, sample_prompts
from mi_ray.shapes.oracle import Detection, read
from mi_ray.shapes.scenes import COLORS, SHAPES, SceneObject, relation_holds, render

RELATIONS = {"to the left of": "left", "to the right of": "right", "above": "above", "below": "below"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red striped triangle", [("Is there a red striped triangle?", "Yes")]),
        ("an orange star and a heart", [("Is there an orange star?", "Yes"), ("Is there a heart?", "Yes")]),
        (
            "there are three crosses and one blue heart",
            [("How many crosses are there?", "three"), ("How many blue hearts are there?", "one")],
        ),
        (
            "a star left of a red square",
            [
                ("Is there a star?", "Yes"),
                ("Is there a red square?", "Yes"),
                ("Is the star to the left of the red square?", "Yes"),
            ],
        ),
        (
            "two circles above one cross",
            [
                ("How many circles are there?", "two"),
                ("How many crosses are there?", "one"),
                ("Are the circles above the cross?", "Yes"),
            ],
        ),
        ("a cat", []),
    ],
)
def test_questions_about_shapes(prompt, expected):
    assert shape_questions(prompt) == expected


def answer(question: str, found: list[Detection]) -> str:
    """The right answer to a question about the objects of an image."""

    def those(phrase: str) -> list[Detection]:
        return [d for d in found if all(w in (d.color, d.texture) or w.startswith(d.shape) for w in phrase.split())]

    if match := re.fullmatch(r"How many (.+) are there\?", question):
        return ("zero", *NUMBERS)[len(those(match[1]))]
    if match := re.fullmatch(r"Is there an? (.+)\?", question):
        return "Yes" if those(match[1]) else "No"
    first, relation, second = re.fullmatch(
        rf"(?:Is|Are) the (.+) ({'|'.join(RELATIONS)}) the (.+)\?", question
    ).groups()
    pairs = [((a.x, a.y), (b.x, b.y)) for a, b in product(those(first), those(second))]
    return "Yes" if pairs and all(relation_holds(RELATIONS[relation], *pair) for pair in pairs) else "No"


def right(prompt: str, scene: list[SceneObject]) -> list[bool]:
    """Which questions about a prompt have the expected answer in the image of a scene."""
    found = read(render(tuple(scene)))
    return [answer(question, found) == expected for question, expected in shape_questions(prompt)]


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_true_scene_answers_all_questions_and_a_changed_one_does_not(category):
    for seed, prompt in enumerate(sample_prompts(category, "test", 4, np.random.default_rng(0))):
        spec = parse(prompt)
        scene = list(draw_scene(spec, np.random.default_rng(seed), unseen=True))
        assert all(right(prompt, scene)), prompt
        shapes, colors = {each.shape for each in scene}, {each.color for each in scene}
        changes = {"shape": next(shape for shape in SHAPES if shape not in shapes)}
        if spec.objects[0].color:
            changes["color"] = next(color for color in COLORS if color not in colors)
        for attribute, value in changes.items():
            wrong = right(prompt, [replace(scene[0], **{attribute: value}), *scene[1:]])
            others = slice(1, len(spec.objects))
            assert not wrong[0], (prompt, attribute)
            assert all(wrong[others]), (prompt, attribute)
        if spec.relation:
            first, second = scene[:2]
            mirrored = [replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y), *scene[2:]]
            assert not right(prompt, mirrored)[-1]
