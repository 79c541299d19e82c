import numpy as np
import pytest

from mi_ray.shapes.grammar import (
    CATEGORIES,
    FORMS,
    HELD_OUT_SHARE,
    MAX_OBJECTS,
    UNSEEN_FORMS,
    ObjectSpec,
    SceneSpec,
    draw_scene,
    is_held_out,
    is_unseen_combination,
    parse,
    sample_prompts,
    sample_spec,
    sentence,
)
from mi_ray.shapes.model import draw_pair


def specs(category: str, count: int) -> list[SceneSpec]:
    rng = np.random.default_rng(7)
    return [sample_spec(category, rng) for _ in range(count)]


def is_seen_form(prompt: str) -> bool:
    spec = parse(prompt)
    return prompt in [sentence(spec, form) for form in FORMS[spec.structure]]


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_sentence_is_parsed_to_its_specification(category):
    for spec in specs(category, 200):
        for form in (*FORMS[spec.structure], *UNSEEN_FORMS.get(spec.structure, ())):
            assert parse(sentence(spec, form)) == spec


@pytest.mark.parametrize(
    ("prompt", "spec"),
    [
        ("a cross", SceneSpec((ObjectSpec("cross"),))),
        ("There is an orange dotted star.", SceneSpec((ObjectSpec("star", "orange", "dotted"),))),
        ("below a circle there is a heart", SceneSpec((ObjectSpec("heart"), ObjectSpec("circle")), "below")),
        ("there are two crosses", SceneSpec((ObjectSpec("cross", count=2),), numeric=True)),
        (
            "one red square and three stars",
            SceneSpec((ObjectSpec("square", "red"), ObjectSpec("star", count=3)), numeric=True),
        ),
    ],
)
def test_meaning_of_sentences(prompt, spec):
    assert parse(prompt) == spec


@pytest.mark.parametrize("prompt", ["", "a photo of a cat", "a red", "a circle and", "a circle near a square"])
def test_other_sentences_are_refused(prompt):
    with pytest.raises(ValueError, match="not a sentence of the shapes grammar"):
        parse(prompt)


def test_too_many_objects_are_refused():
    with pytest.raises(ValueError, match=f"at most {MAX_OBJECTS} objects"):
        parse("four circles and one square")


@pytest.mark.parametrize("category", CATEGORIES)
def test_splits_are_disjoint(category):
    train, test, ood = (sample_prompts(category, s, 30, np.random.default_rng(3)) for s in ("train", "test", "ood"))
    assert len({*train, *test, *ood}) == 90
    for prompt in train + test:
        assert is_seen_form(prompt)
        assert not any(is_unseen_combination(o) for o in parse(prompt).objects)
    assert not any(is_held_out(parse(prompt)) for prompt in train)
    assert all(is_held_out(parse(prompt)) for prompt in test)
    for prompt in ood:
        assert not is_seen_form(prompt) or any(is_unseen_combination(o) for o in parse(prompt).objects)


def test_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match="fewer than 100 prompts of category 'shape' in split 'test'"):
        sample_prompts("shape", "test", 100, np.random.default_rng(0))


def test_a_tenth_is_held_out_in_any_order_of_the_objects():
    distinct = {s for category in ("color", "numeracy", "complex") for s in specs(category, 1500)}
    held_out = np.mean([is_held_out(s) for s in distinct])
    assert held_out == pytest.approx(HELD_OUT_SHARE, abs=4 * np.sqrt(0.09 / len(distinct)))
    for spec in specs("color", 100):
        assert is_held_out(spec) == is_held_out(SceneSpec(spec.objects[::-1]))


def test_mirrored_relation_is_held_out_too():
    mirrored = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for category in ("spatial", "complex"):
        for spec in specs(category, 300):
            if spec.relation:
                first, second, *others = spec.objects
                turned = SceneSpec((second, first, *others), mirrored[spec.relation])
                assert is_held_out(spec) == is_held_out(turned)


def test_training_pairs_contain_nothing_held_out():
    rng = np.random.default_rng(0)
    for _ in range(300):
        caption, _ = draw_pair(rng)
        assert is_seen_form(caption)
        assert not is_held_out(parse(caption))


@pytest.mark.parametrize("shape", ["heart", "star", "cross"])
def test_open_attributes_avoid_unseen_combinations(shape):
    spec = SceneSpec((ObjectSpec(shape),))
    rng = np.random.default_rng(0)
    assert not any(is_unseen_combination(obj) for _ in range(200) for obj in draw_scene(spec, rng))
    assert any(is_unseen_combination(obj) for _ in range(200) for obj in draw_scene(spec, rng, unseen=True))
