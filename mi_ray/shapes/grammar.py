"""Prompts of the embedded world: scene specifications, sentences for them, and a parser for these sentences.

The six categories follow T2I-CompBench (Huang et al., NeurIPS 2023): color, shape, texture, spatial, numeracy, complex.
Training never sees a tenth of the specifications (`is_held_out`), some attribute combinations (`UNSEEN_COLOR_SHAPE`,
`UNSEEN_TEXTURE_SHAPE`) and some sentence forms (`UNSEEN_FORMS`).
"""

import hashlib
import itertools
import re
from dataclasses import dataclass, replace

import numpy as np

from mi_ray.shapes.scenes import COLORS, RELATIONS, SHAPES, TEXTURES, SceneObject, place

CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy", "complex")
NUMERALS = {1: "one", 2: "two", 3: "three", 4: "four"}
MAX_OBJECTS = 4
HELD_OUT_SHARE = 0.1
MAX_FAILED_DRAWS = 10_000  # stop after this number of consecutive draws without a new prompt

UNSEEN_COLOR_SHAPE = frozenset(
    {("purple", "heart"), ("yellow", "star"), ("cyan", "cross"), ("red", "triangle"), ("green", "circle")}
)
UNSEEN_TEXTURE_SHAPE = frozenset({("striped", "star"), ("dotted", "cross")})

_PHRASE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_MIRRORED = {"right": "left", "below": "above"}
LONG_PHRASE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}

# Sentence forms by the structure of the specification. {a}, {b}, {c}: noun phrases; {r}, {long}: relation phrases.
FORMS = {
    "one": ("{a}", "there is {a}"),
    "two": ("{a} and {b}", "there is {a} and {b}", "{a} with {b}"),
    "three": ("{a}, {b} and {c}", "there is {a}, {b} and {c}"),
    "related": ("{a} {r} {b}", "{a} {long} {b}", "there is {a} {r} {b}"),
    "related_three": ("{a} {r} {b}, and {c}", "there is {a} {r} {b}, with {c}"),
}
UNSEEN_FORMS = {
    "two": ("there is {a} with {b}", "{a}, {b}", "with {b} there is {a}"),
    "three": ("{a} and {b} with {c}", "there is {a}, with {b} and {c}"),
    "related": ("{long} {b} there is {a}", "{long} {b} {a}"),
    "related_three": ("there is {c}, and {a} {r} {b}",),
}


@dataclass(frozen=True)
class ObjectSpec:
    """What a prompt says about one kind of object. None: it says nothing about this attribute."""

    shape: str
    color: str | None = None
    texture: str | None = None
    count: int = 1


@dataclass(frozen=True)
class SceneSpec:
    """What a prompt says: the kinds of objects, and the relation of the first kind to the second."""

    objects: tuple[ObjectSpec, ...]
    relation: str | None = None
    numeric: bool = False  # counts are written as numerals instead of articles

    @property
    def total(self) -> int:
        return sum(o.count for o in self.objects)

    @property
    def structure(self) -> str:
        if self.relation:
            return "related_three" if len(self.objects) == 3 else "related"
        return ("one", "two", "three")[len(self.objects) - 1]


# ---------------------------------------------------------------------------------------------- sentences
def noun_phrase(obj: ObjectSpec, numeric: bool) -> str:
    words = [w for w in (obj.color, obj.texture, obj.shape) if w]
    if obj.count > 1:
        words[-1] += "es" if obj.shape == "cross" else "s"
    if numeric or obj.count > 1:
        return " ".join([NUMERALS[obj.count], *words])
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def sentence(spec: SceneSpec, form: str) -> str:
    """The sentence for `spec` in one of `FORMS[spec.structure]` or `UNSEEN_FORMS[spec.structure]`."""
    phrases = [noun_phrase(o, spec.numeric) for o in spec.objects]
    fields = dict(zip("abc", phrases, strict=False))
    if spec.relation:
        fields |= {"r": _PHRASE[spec.relation], "long": LONG_PHRASE[spec.relation]}
    text = form.format(**fields)
    if spec.numeric and spec.objects[0].count > 1:
        text = text.replace("there is", "there are")
    return text


_NOUN = (
    rf"(?:an?|{'|'.join(NUMERALS.values())})(?: (?:{'|'.join(COLORS)}))?(?: (?:{'|'.join(TEXTURES)}))?"
    rf" (?:{'|'.join(SHAPES)})(?:e?s)?"
)


def _patterns() -> list[tuple[re.Pattern, str, str | None]]:
    """A regular expression for every sentence form, with its structure and relation."""
    patterns = []
    for forms in (FORMS, UNSEEN_FORMS):
        for structure, templates in forms.items():
            for template in templates:
                relations = RELATIONS if structure.startswith("related") else (None,)
                for relation in relations:
                    fields = {key: f"(?P<{key}>{_NOUN})" for key in "abc"}
                    if relation:
                        fields |= {"r": _PHRASE[relation], "long": LONG_PHRASE[relation]}
                    text = template.format(**fields).replace("there is", "there (?:is|are)")
                    patterns.append((re.compile(text), structure, relation))
    return patterns


_PATTERNS = _patterns()


def _read_noun(text: str) -> tuple[ObjectSpec, bool]:
    words = text.split()
    numbers = {word: number for number, word in NUMERALS.items()}
    shape = next(s for s in SHAPES if words[-1].startswith(s))
    color = next((w for w in words if w in COLORS), None)
    texture = next((w for w in words if w in TEXTURES), None)
    return ObjectSpec(shape, color, texture, numbers.get(words[0], 1)), words[0] in numbers


def parse(prompt: str) -> SceneSpec:
    """Parse a sentence of the grammar into its specification.

    Raises:
        ValueError: the prompt is not a sentence of the grammar, or has more than `MAX_OBJECTS` objects.
    """
    text = " ".join(prompt.lower().replace(".", " ").split())
    for pattern, _, relation in _PATTERNS:
        if match := pattern.fullmatch(text):
            groups = match.groupdict()
            nouns = [_read_noun(groups[key]) for key in "abc" if groups.get(key)]
            spec = SceneSpec(tuple(o for o, _ in nouns), relation, any(n for _, n in nouns))
            if spec.total > MAX_OBJECTS:
                raise ValueError(f"a scene holds at most {MAX_OBJECTS} objects: {prompt!r}; name fewer")
            return spec
    raise ValueError(f"not a sentence of the shapes grammar: {prompt!r}")


# ---------------------------------------------------------------------------------------------- sampling
def is_held_out(spec: SceneSpec) -> bool:
    """Whether `spec` is in the tenth that is never used for pre-training or fine-tuning. Independent of the wording."""
    kinds, relation = [repr(o) for o in spec.objects], spec.relation
    if relation in _MIRRORED:  # "a right of b" means "b left of a"
        kinds[:2], relation = kinds[1::-1], _MIRRORED[relation]
    key = "|".join([*(kinds if relation else sorted(kinds)), str(relation)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def is_unseen_combination(obj: ObjectSpec | SceneObject) -> bool:
    return (obj.color, obj.shape) in UNSEEN_COLOR_SHAPE or (obj.texture, obj.shape) in UNSEEN_TEXTURE_SHAPE


def split_of(spec: SceneSpec, form: str) -> str:
    """The split of a specification in a sentence form: train, test or ood."""
    if form in UNSEEN_FORMS.get(spec.structure, ()) or any(map(is_unseen_combination, spec.objects)):
        return "ood"
    return "test" if is_held_out(spec) else "train"


def sample_spec(category: str, rng: np.random.Generator) -> SceneSpec:
    """Draw a specification of a category. It can be held out or contain an unseen combination."""

    def some(values, probability=1.0):
        return str(rng.choice(values)) if rng.random() < probability else None

    def distinct(count, key, **probabilities):
        """`count` objects that differ in `key`."""
        objects, seen = [], set()
        while len(objects) < count:
            texture = some(TEXTURES, probabilities.get("texture", 0))
            obj = ObjectSpec(some(SHAPES), some(COLORS, probabilities.get("color", 0)), texture)
            if key(obj) not in seen:
                seen.add(key(obj))
                objects.append(obj)
        return tuple(objects)

    if category == "color":
        return SceneSpec(distinct(1 + (rng.random() < 0.8), lambda o: o.color, color=1))
    if category == "shape":
        return SceneSpec(distinct(int(rng.choice([1, 2, 3], p=[0.15, 0.6, 0.25])), lambda o: o.shape))
    if category == "texture":
        return SceneSpec(distinct(1 + (rng.random() < 0.8), lambda o: (o.texture, o.shape), texture=1))
    if category == "spatial":
        objects = distinct(2, lambda o: o.shape, color=float(rng.random() < 0.6))
        return SceneSpec(objects, some(RELATIONS))
    if category == "numeracy":
        counts = [(2,), (3,), (4,), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3)][rng.integers(8)]
        kinds = distinct(len(counts), lambda o: o.shape, color=float(rng.random() < 0.4))
        return SceneSpec(tuple(replace(k, count=c) for k, c in zip(kinds, counts, strict=True)), numeric=True)
    if category == "complex":
        kind = rng.integers(3)
        if kind == 0:  # two attributes each, related
            return SceneSpec(distinct(2, lambda o: o.shape, color=1, texture=1), some(RELATIONS))
        if kind == 1:  # three objects
            return SceneSpec(distinct(3, lambda o: o.shape, color=0.8, texture=0.25))
        return SceneSpec(distinct(3, lambda o: o.shape, color=1), some(RELATIONS))
    raise ValueError(f"unknown category {category!r}; use one of {', '.join(CATEGORIES)}")


def sample_prompts(category: str, split: str, count: int, rng: np.random.Generator) -> list[str]:
    """Draw `count` distinct prompts of a category and split.

    train: seen sentence forms and combinations, not held out. test: the same, but held out. ood: an unseen
    combination, an unseen sentence form, or both.

    Raises:
        ValueError: the grammar has fewer such prompts.
    """
    prompts: dict[str, None] = {}
    last_new = 0
    for draw in itertools.count():
        if len(prompts) == count:
            return list(prompts)
        if draw - last_new > MAX_FAILED_DRAWS:
            raise ValueError(
                f"the grammar has fewer than {count} prompts of category {category!r} in split {split!r}; ask for fewer"
            )
        spec = sample_spec(category, rng)
        unseen = any(is_unseen_combination(o) for o in spec.objects)
        if split == "ood":
            forms = UNSEEN_FORMS.get(spec.structure, ()) if rng.random() < 0.5 else ()
            if not (forms or unseen):
                continue
            forms = forms or FORMS[spec.structure]
        else:
            if unseen or is_held_out(spec) != (split == "test"):
                continue
            forms = FORMS[spec.structure]
        prompt = sentence(spec, str(rng.choice(forms)))
        last_new = last_new if prompt in prompts else draw
        prompts[prompt] = None


def draw_scene(spec: SceneSpec, rng: np.random.Generator, unseen: bool = False) -> tuple[SceneObject, ...]:
    """Draw a scene that matches `spec`. Attributes that it does not name are random (texture: mostly solid).

    If `unseen` is false, the random attributes never form an unseen combination.
    """
    kinds = []
    for obj in spec.objects:
        while True:
            color = obj.color or str(rng.choice(COLORS))
            texture = obj.texture or ("solid" if rng.random() < 0.8 else str(rng.choice(TEXTURES)))
            kind = ObjectSpec(obj.shape, color, texture)
            if unseen or is_unseen_combination(obj) or not is_unseen_combination(kind):
                break
        kinds += [kind] * obj.count
    boxes = place(len(kinds), spec.relation, rng)
    return tuple(SceneObject(k.color, k.shape, k.texture, *box) for k, box in zip(kinds, boxes, strict=True))
