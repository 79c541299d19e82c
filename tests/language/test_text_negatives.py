"""Negatives of general English: sentences with known opposites, and sentences without negatives."""

import pytest
import spacy

from mi_ray.language.lexicon import ATTRIBUTES, CONTRARIES, NUMBERS, RELATIONS
from mi_ray.language.text import chunks, negatives, plain_phrases, spacy_phrases


def by_kind(prompt: str) -> dict[str, list[str]]:
    found = {}
    for negative in negatives(prompt):
        found.setdefault(negative.kind, []).append(negative.prompt)
    return found


def test_two_objects_and_a_relation():
    found = by_kind("A red car parked left of an orange bicycle")
    assert found["attribute swap"] == ["An orange car parked left of a red bicycle"]
    assert found["relation flip"] == ["A red car parked right of an orange bicycle"]
    assert found["object swap"] == ["A red bicycle parked left of an orange car"]
    assert found["attribute replacement"][:2] == [
        *("An orange car parked left of an orange bicycle", "A red car parked left of a red bicycle"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "kind", "expected"),
    [
        ("two cats and three dogs", "count change", "two cats and four dogs"),
        ("4 apples on a plate", "count change", "5 apples on a plate"),
        ("a cat on top of a table", "object swap", "a table on top of a cat"),
        ("An OLD house", "attribute replacement", "A YOUNG house"),
        ("a closed door", "attribute replacement", "an open door"),
        ("a fluffy dog on the wooden couch", "attribute swap", "a wooden dog on the fluffy couch"),
        ("An astronaut riding a horse", "object swap", "A horse riding an astronaut"),
        ("one cat and two dogs on a bed", "object omission", "one cat on a bed"),
        ("one cat and two dogs on a bed", "object omission", "two dogs on a bed"),
    ],
)
def test_single_changes(prompt, kind, expected):
    assert expected in by_kind(prompt)[kind]


def test_negatives_with_the_same_meaning_are_left_out():
    prompt = "a red cube and a blue ball"
    assert "a blue ball and a red cube" not in {n.prompt for n in negatives(prompt)}
    swaps = by_kind(prompt)
    assert swaps["attribute swap"] == ["a blue cube and a red ball"]
    assert "object swap" not in swaps  # a red ball and a blue cube: the same as above
    assert not any("navy" in n.prompt or "cyan ball and" in n.prompt for n in negatives("a blue ball"))


@pytest.mark.parametrize(
    "prompt",
    ["a red, white and blue flag", "a black and white cat", "red apples and green apples", "a red car, a blue car"],
)
def test_swaps_of_equal_attributes_are_left_out(prompt):
    assert "attribute swap" not in by_kind(prompt)


@pytest.mark.parametrize("prompt", ["a man facing a woman", "a cat and a dog are here", "a bowl of soup and bread"])
def test_swaps_need_an_action_and_correct_english(prompt):
    assert not {"object swap", "object omission"} & by_kind(prompt).keys()


def test_negatives_report_their_change():
    for negative in negatives("two small brown dogs in front of an old house"):
        assert negative.original.split(" … ")[0].lower() in "two small brown dogs in front of an old house"
        assert negative.instead != negative.original


@pytest.mark.parametrize("prompt", ["", " ", "happiness", "🙂 ½ ²", "a", "one of the", "1984", "2 pm", "the orange"])
def test_prompts_without_a_known_word_have_no_negatives(prompt):
    assert negatives(prompt) == []


def test_long_prompt_is_parsed_quickly():
    prompt = ", ".join(["a red circle", "two <b>blue</b> 'squares'"] * 20)
    assert prompt not in {n.prompt for n in negatives(prompt)}


def test_lexicon_is_consistent():
    assert all(RELATIONS[opposite] for opposite in RELATIONS.values())
    assert all(phrase != opposite for phrase, opposite in RELATIONS.items())
    listed = {word for words in ATTRIBUTES.values() for word in words}
    assert set(CONTRARIES) | set(CONTRARIES.values()) <= listed
    assert not listed & set(NUMBERS)


def test_plain_phrases():
    prompt = "The fluffy cat, two old wooden chairs and a lamp standing by the window"
    assert [prompt[p.start : p.end] for p in plain_phrases(prompt)] == [
        *("fluffy cat", "old wooden chairs", "lamp", "window"),
    ]  # fmt: skip
    assert [prompt[p.head : p.end] for p in plain_phrases(prompt)] == ["cat", "chairs", "lamp", "window"]


def test_noun_chunks_of_a_parsed_document():
    """Annotated by hand like by a spaCy model, so that no model must be installed."""
    words = ["two", "red", "cars", "and", "the", "old", "stone", "wall"]
    document = spacy.tokens.Doc(
        spacy.blank("en").vocab,
        words=words,
        pos=["NUM", "ADJ", "NOUN", "CCONJ", "DET", "ADJ", "NOUN", "NOUN"],
        heads=[2, 2, 2, 2, 7, 7, 7, 2],
        deps=["nummod", "amod", "ROOT", "cc", "det", "amod", "compound", "conj"],
    )
    assert [document.text[p.start : p.end] for p in chunks(document)] == ["red cars", "old stone wall"]
    assert [document.text[p.head : p.end] for p in chunks(document)] == ["cars", "wall"]


def test_missing_spacy_model_is_named():
    with pytest.raises(ValueError, match="python -m spacy download en_core_web_none"):
        spacy_phrases("en_core_web_none")
