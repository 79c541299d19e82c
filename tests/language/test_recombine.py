"""More prompts from a list: each type of slot, and properties of all results."""

import random
import re
from itertools import islice
from pathlib import Path

import pytest

from mi_ray.language.lexicon import NUMBERS
from mi_ray.language.nouns import is_plural, is_singular, plural, singular
from mi_ray.language.recombine import TextTemplates, recombined, same
from mi_ray.language.shapes import reads
from mi_ray.language.shapes_templates import GrammarTemplates
from mi_ray.language.sources import templates_by
from mi_ray.language.templates import Relation, Slot, template_of
from mi_ray.language.text import Phrase, with_right_articles
from mi_ray.shapes.grammar import CATEGORIES, is_held_out, is_unseen_combination, parse

COMPBENCH = Path(__file__).parents[3] / "shared" / "t2i_compbench"
NAMES = ("color_train", "spatial_train", "numeracy_val", "complex_val")


def made(prompts: list[str], count: int | None = None, seed: int = 0, weights=None, source: str = "text") -> list[str]:
    weights = weights or [1.0] * len(prompts)
    templates = templates_by(source, "train")(prompts, weights)
    return [prompt for _, prompt in islice(recombined(templates, weights, seed, prompts), count)]


def slots(prompt: str) -> list[Slot]:
    return [piece for piece in template_of(prompt) if isinstance(piece, Slot)]


# ---------------------------------------------------------------------------------------------- templates
def test_template_of_finds_every_slot():
    a, relation, b = (
        p for p in template_of("a small dark grey cat on top of two wooden tables") if not isinstance(p, str)
    )
    assert (a.opener, a.form.words, a.form.signature) == ("a", ("small", "dark grey", "cat"), ("size", "color"))
    assert relation == Relation("on top of")
    assert (b.count, b.form.words, b.form.signature) == (2, ("wooden", "table"), ("material",))


@pytest.mark.parametrize(
    ("prompt", "nouns"),
    [
        ("The brown dog lay next to the fire truck", ["dog", "truck"]),
        ("The fluffy clouds floated lazily in the sky", ["cloud", "sky"]),
        ("two cars stuck on the road", ["car", "road"]),
        ("a man rides a horse", ["man", "horse"]),
        ("three strawberries attracted four fish", ["strawberry", "fish"]),
        ("a pink rose and a red orange", ["rose", "orange"]),
        ("a black and white cat", []),  # colours of one phrase stay together
        ("The soft, fluffy snow blanketed the ground", ["ground"]),
        ("the year 1984", []),
        ("one of the cats", ["cat"]),
        ("", []),
    ],
)
def test_noun_phrase_ends_before_a_verb(prompt, nouns):
    assert [slot.form.noun for slot in slots(prompt)] == nouns


def test_contexts_of_noun_phrases():
    assert {s.context for s in slots("a photo of a red car, a cat and two dogs")[1:]} == {("", "")}
    assert [s.context for s in slots("a bathroom with a sink")] == [None, None]
    assert [s.context for s in slots("a man and his dog")] == [None, None]
    assert [s.context for s in slots("The coat draped over the chair.")] == [("", "draped over"), ("draped over", "")]


@pytest.mark.parametrize(
    ("one", "many"),
    [
        *(("mouse", "mice"), ("person", "people"), ("couch", "couches"), ("knife", "knives"), ("vase", "vases")),
        *(("strawberry", "strawberries"), ("key", "keys"), ("sheep", "sheep"), ("tomato", "tomatoes")),
        *(("bus", "buses"), ("fire truck", "fire trucks"), ("shoe", "shoes"), ("box", "boxes"), ("dish", "dishes")),
    ],
)
def test_plurals(one, many):
    assert plural(one) == many
    assert singular(many) == one
    assert is_plural(many)
    assert is_singular(one)


def test_words_without_a_singular():
    assert singular("scissors") is None
    assert plural("scissors") == "scissors"
    assert not is_singular("scissors")


def test_articles_by_sound():
    assert with_right_articles("a hour, an unicorn, a umbrella, an one-eyed cat, a onion, An house") == (
        "an hour, a unicorn, an umbrella, a one-eyed cat, an onion, A house"
    )


# ---------------------------------------------------------------------------------------------- recombination
@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["a red car and a blue dog", "a green apple"], {"a red apple", "a green car", "a blue dog"}),
        (["a red car", "an orange dog", "a green apple"], {"an orange car", "a red dog", "an orange apple"}),
        (["a cup near a cat", "a bird on the left of a dog"], {"near", "on the left of"}),
        (["two cats", "one mouse", "three geese"], {"one cat", "two mice", "one goose", "three cats"}),
        (["a wooden spoon", "a metal spoon and a red chair"], {"a metal spoon"}),
        (["a round table", "a square table and a round rug"], {"a square table", "a round rug"}),
        (["3 red balls", "4 blue cubes"], {"3 blue balls", "4 red balls", "3 red cubes"}),
        (["The soft coat draped over the chair", "The red scarf draped over the sofa"], {"coat", "scarf"}),
    ],
)
def test_each_type_is_recombined(prompts, expected):
    found = made(prompts)
    assert found
    said = " / ".join(found)
    assert {words for words in expected if words in said} == expected


def test_recombined_yields_all_combinations():
    assert sorted(made(["a red car and a blue dog"])) == ["a blue car and a red dog"]
    assert set(made(["a red car", "a blue dog"])) == {"a blue car", "a red dog"}
    assert set(made(["two cats", "one mouse"])) == {"one cat", "two mice"}


def test_attributes_are_used_only_with_suitable_nouns():
    spoons = ["a wooden spoon and a red cat", "a metal spoon", "a plastic spoon", "a fluffy pillow and a blue dog"]
    found = " / ".join(made([*spoons, "a wooden fork", "a metal fork", "a glass bowl"]))
    assert "plastic fork" in found  # because spoons and forks have two materials in common
    assert not re.search("(wooden|metal|plastic) (cat|dog|pillow|bowl)|(red|blue) (spoon|fork|pillow|bowl)", found)
    assert not re.search("(fluffy|glass) (spoon|fork)", found)
    assert made(["an old man", "a new car"]) == []


def test_verbs_agree_and_keep_their_phrases():
    found = made(["one dog is asleep on a bed", "two cats are asleep on a sofa", "three cats are asleep on a rug"])
    assert found
    assert all(p.startswith("one dog is") or re.match("(two|three) cats are", p) for p in found)


def test_capitals():
    assert made(["A RED CAR", "A BLUE DOG"]) == made(["a red car", "a blue dog"])
    assert {"An orange SUV", "A red iPhone"} <= set(made(["A red SUV", "An orange iPhone"]))


def test_sentence_form_is_kept():
    found = made(["The red mug was on top of the table.", "The blue lamp was next to the bed."])
    assert found
    assert all(re.fullmatch(r"The \w+ \w+ was (on top of|next to) the \w+\.", prompt) for prompt in found)


def test_fillers_and_templates_are_drawn_by_weight():
    prompts = ["a red car and a blue dog", "a green cat", "a pink cow and a gold pig"]
    templates = TextTemplates(prompts, [3, 0, 1])
    found = [prompt for _, prompt in islice(recombined(templates, [3, 0, 1], 0, prompts), 200)]
    assert not any(word in prompt for prompt in found for word in ("green", "cat"))
    rng = random.Random(0)
    drawn = [templates.draw(0, rng) for _ in range(400)]
    cars, cows = (sum(p is not None and f"{noun} and" in p for p in drawn) for noun in ("car", "cow"))
    assert cars > 2 * cows > 0


def test_prompts_that_cannot_be_parsed_have_no_template():
    assert made(["happiness", "vibes, 4k, trending"]) == []
    assert made(["a cat"]) == []
    assert made([]) == []


def test_noun_phrases_of_another_parser():
    """Noun phrases like those of spaCy, also without an opener."""

    def find(prompt: str) -> list[Phrase]:
        return [Phrase(m.start(), m.end(), m.start(2)) for m in re.finditer(r"(\w+) (cats|dogs)", prompt)]

    prompts = ["black cats near white dogs", "brown dogs"]
    found = [p for _, p in recombined(TextTemplates(prompts, [1, 1], find), [1, 1], 0, prompts)]
    assert {"white cats", "brown cats near black dogs"} <= set(found)


def test_same_ignores_case_articles_and_order():
    assert same("A  red car and an apple.") == same("an apple and a red car")
    assert same("two dogs and one cat") == same("one cat and two dogs")
    assert same("a cat on a dog") != same("a dog on a cat")
    assert same("two dogs") != same("three dogs")


# ---------------------------------------------------------------------------------------------- the grammar's prompts
SHAPES = [
    "a red circle left of a blue square",
    "two striped stars and one cross",
    "there is a green heart",
    "a pink cube",
]


def test_prompts_of_the_grammar_stay_in_their_split():
    found = made(SHAPES, 60, source="auto")
    by_grammar = [prompt for prompt in found if reads(prompt)]
    assert len(by_grammar) > 20
    for spec in map(parse, by_grammar):
        assert not is_held_out(spec)
        assert not any(map(is_unseen_combination, spec.objects))


def test_templates_by_source():
    assert all(reads(prompt) for prompt in made(SHAPES, 60, source="shapes"))
    with pytest.raises(ValueError, match="is not a parser of prompts"):
        made(SHAPES, source="magic")


@pytest.mark.parametrize("split", ["train", "test", "ood"])
def test_the_grammar_alone(split):
    found = list(islice(recombined(GrammarTemplates(split), [1.0] * len(CATEGORIES), 0, []), 60))
    assert {CATEGORIES[i] for i, _ in found} == set(CATEGORIES)
    assert split == "ood" or all(is_held_out(parse(prompt)) == (split == "test") for _, prompt in found)


# ---------------------------------------------------------------------------------------------- properties
def benchmark_prompts() -> list[str]:
    if not COMPBENCH.is_dir():
        return []
    return [
        line.strip() for name in NAMES for line in (COMPBENCH / f"{name}.txt").read_text().splitlines() if line.strip()
    ]


OWN = [
    *("a red car and a blue dog", "a orange umbrella and a green apple", "two mice, three old boxes and one orange"),
    *("a cat on the left of an ox", "The big rug was under the tiny bed.", "a photo of one elephant and four knives"),
]


@pytest.mark.parametrize("prompts", [OWN, pytest.param(benchmark_prompts(), id="benchmark")])
def test_recombined_prompts(prompts):
    if not prompts:
        pytest.skip("T2I-CompBench's prompts are not beside the repository")
    found = made(prompts, 200)
    assert len(found) == 200
    assert found == made(prompts, 200)
    assert found[:50] == made(prompts, 50)  # fewer prompts are the first of more prompts
    assert found != made(prompts, 200, seed=1)
    assert len({same(prompt) for prompt in found}) == 200
    assert not {same(prompt) for prompt in found} & {same(prompt) for prompt in prompts}
    for prompt in found:
        assert with_right_articles(prompt) == prompt
        nouns = [slot.form.noun for slot in slots(prompt)]
        assert len(nouns) == len(set(nouns)) or any(p.count(nouns[0]) > 1 for p in prompts)
        for slot in slots(prompt):
            assert slot.count is None or slot.opener.lower() in NUMBERS
        for number, noun in re.findall(r"\b(one|two|three|four|five|six) (\w+)(?=,| and|$)", prompt):
            assert is_singular(noun) if number == "one" else is_plural(noun)


def test_most_benchmark_prompts_can_be_parsed():
    prompts = benchmark_prompts()
    if not prompts:
        pytest.skip("T2I-CompBench's prompts are not beside the repository")
    templates = TextTemplates(prompts, [1.0] * len(prompts))
    assert sum(map(templates.varies, range(len(prompts)))) > 0.95 * len(prompts)
