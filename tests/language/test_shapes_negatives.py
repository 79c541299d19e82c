"""Negatives of the grammar, compared with its parser, renderer and oracle."""

import numpy as np
import pytest

from mi_ray.language.negatives import KINDS, Negative, chosen
from mi_ray.language.shapes import can_both_hold, negatives
from mi_ray.language.sources import negatives_by
from mi_ray.shapes.grammar import CATEGORIES, draw_scene, parse, sample_prompts
from mi_ray.shapes.oracle import score
from mi_ray.shapes.scenes import render


def drawn_prompts(each: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [p for split in ("train", "ood") for c in CATEGORIES for p in sample_prompts(c, split, each, rng)]


def image_of(prompt: str, seed: int = 0) -> np.ndarray:
    return render(draw_scene(parse(prompt), np.random.default_rng(seed), unseen=True))


@pytest.mark.parametrize("prompt", drawn_prompts(3))
def test_image_of_the_prompt_contradicts_every_negative(prompt):
    made = negatives(prompt)
    assert len({n.prompt for n in made} | {prompt}) == len(made) + 1
    image = image_of(prompt)
    assert score(image, prompt).exact == 1
    for negative in chosen(made, 16):
        assert score(image, negative.prompt).exact == 0, negative
        assert negative.kind in KINDS
        assert negative.original != negative.instead


@pytest.mark.parametrize("prompt", drawn_prompts(1))
def test_image_of_a_negative_contradicts_the_prompt(prompt):
    for seed, negative in enumerate(chosen(negatives(prompt), 6)):
        assert score(image_of(negative.prompt, seed), prompt).exact == 0, negative


def test_negatives_report_their_change():
    made = negatives("a red circle left of a blue square")
    assert Negative(
        *("a blue circle left of a red square", "attribute swap", "color"),
        *("red circle and blue square", "blue circle and red square"),
    ) in made  # fmt: skip
    assert Negative("a red circle right of a blue square", "relation flip", "relation", "left of", "right of") in made
    assert Negative(
        "a blue circle left of a blue square", "attribute replacement", "color", "red circle", "blue circle"
    ) in made  # fmt: skip
    assert Negative("a blue square", "object omission", "object", "red circle", "") in made
    assert {n.kind for n in made} == set(KINDS)


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("a red circle to the left of a blue square", "a blue circle to the left of a red square"),
        ("with a red circle there is a blue square", "with a blue circle there is a red square"),
        ("Two hearts.", "three hearts"),
        ("there is a heart", "there are two hearts"),
    ],
)
def test_negatives_are_worded_like_the_prompt(prompt, start):
    assert start in {n.prompt for n in negatives(prompt)}


def test_open_attributes_have_no_negatives():
    open_prompt, closed = parse("a striped circle and a circle"), parse("a solid circle and a circle")
    assert can_both_hold(open_prompt, closed)
    assert not can_both_hold(open_prompt, parse("a solid circle and a dotted circle"))
    assert can_both_hold(parse("a circle left of a star"), parse("a star right of a circle"))
    assert not can_both_hold(parse("a circle left of a star"), parse("a circle above a star"))
    assert not can_both_hold(parse("a circle"), parse("two circles"))


def test_counts_are_swapped_between_objects():
    by_count = [n for n in negatives("two orange crosses with one purple square") if n.attribute == "count"]
    assert by_count[0].prompt == "one orange cross with two purple squares"
    assert (by_count[0].original, by_count[0].instead) == (
        "two orange crosses and one purple square",
        "one orange cross and two purple squares",
    )


def test_chosen_takes_the_kinds_in_turn():
    made = negatives("a red circle left of a blue square")
    first = [n.kind for n in chosen(made, len(KINDS) + 2)]
    assert set(first) == set(KINDS)
    assert first.count("attribute replacement") == 3  # the most common errors of models
    assert chosen(made, 3) == chosen(made, 7)[:3]
    assert chosen(made, 1000) != []
    assert sorted(chosen(made, 1000), key=str) == sorted(made, key=str)


def test_negatives_by_source():
    assert negatives_by("shapes")("two hearts") == negatives_by("auto")("two hearts") == negatives("two hearts")
    assert negatives_by("auto")("a red car and a blue bicycle") == negatives_by("text")("a red car and a blue bicycle")
    with pytest.raises(ValueError, match="one of auto, shapes, text"):
        negatives_by("verbs")
    with pytest.raises(ValueError, match="not a sentence"):
        negatives_by("shapes")("a red car")
