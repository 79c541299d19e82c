"""Hard negatives for prompts of the shapes grammar. They are exact: the grammar defines the meaning of a sentence."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations, product

from mi_ray.language.negatives import Negative, shuffled
from mi_ray.shapes.grammar import (
    FORMS,
    MAX_OBJECTS,
    NUMERALS,
    UNSEEN_FORMS,
    ObjectSpec,
    SceneSpec,
    noun_phrase,
    parse,
    sentence,
)
from mi_ray.shapes.scenes import COLORS, RELATIONS, SHAPES, TEXTURES

_VALUES = {"color": COLORS, "texture": TEXTURES, "shape": SHAPES}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_PLURAL = tuple(word for count, word in NUMERALS.items() if count > 1)
_RELATION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

_Change = tuple[str, str, str, str, SceneSpec]  # kind, attribute, original, instead, specification of the negative


def reads(prompt: str) -> bool:
    """Whether the prompt is a sentence of the grammar."""
    try:
        parse(prompt)
    except ValueError:
        return False
    return True


def negatives(prompt: str) -> list[Negative]:
    """Negatives of the prompt, in its own sentence form. Every image of the prompt contradicts every negative, and all
    negatives have different meanings.

    Raises:
        ValueError: the prompt is not a sentence of the grammar.
    """
    spec = parse(prompt)
    form = form_of(prompt, spec)
    made, meanings = [], {_meaning(spec)}
    for kind, attribute, original, instead, other in _changes(prompt, spec):
        if other.total > MAX_OBJECTS or _meaning(other) in meanings or can_both_hold(spec, other):
            continue
        meanings.add(_meaning(other))
        made.append(Negative(worded(other, _adapted(form, spec, other)), kind, attribute, original, instead))
    return made


# ---------------------------------------------------------------------------------------------- meaning
def can_both_hold(spec: SceneSpec, other: SceneSpec) -> bool:
    """Whether one image can exactly match both specifications: some pairing of their objects has no contradiction."""
    own, others = (_individuals(s) for s in (spec, other))
    return len(own) == len(others) and any(
        all(_compatible(own[i], others[j]) for i, j in enumerate(pairing)) and _relations_agree(spec, other, pairing)
        for pairing in permutations(range(len(others)))
    )


def _individuals(spec: SceneSpec) -> list[ObjectSpec]:
    return [replace(obj, count=1) for obj in spec.objects for _ in range(obj.count)]


def _compatible(a: ObjectSpec, b: ObjectSpec) -> bool:
    return all(None in (x, y) or x == y for x, y in ((getattr(a, key), getattr(b, key)) for key in _VALUES))


def _related(spec: SceneSpec) -> dict[tuple[int, int], str]:
    """The relation of each pair of objects, in both directions."""
    if not spec.relation:
        return {}
    first, second = (obj.count for obj in spec.objects[:2])
    pairs = product(range(first), range(first, first + second))
    return {k: v for i, j in pairs for k, v in (((i, j), spec.relation), ((j, i), _OPPOSITE[spec.relation]))}


def _relations_agree(spec: SceneSpec, other: SceneSpec, pairing: tuple[int, ...]) -> bool:
    elsewhere = _related(other)
    return all(
        elsewhere.get((pairing[i], pairing[j]), relation) == relation for (i, j), relation in _related(spec).items()
    )


def _meaning(spec: SceneSpec) -> tuple:
    """A key that is equal for specifications with the same meaning."""
    relation, related, rest = spec.relation, spec.objects[:2] if spec.relation else (), spec.objects
    if relation:
        rest = rest[2:]
        if relation in ("right", "below"):
            relation, related = _OPPOSITE[relation], related[::-1]
    kinds = Counter()
    for obj in rest:
        kinds[replace(obj, count=1)] += obj.count
    return relation, related, frozenset(kinds.items())


# ---------------------------------------------------------------------------------------------- changes
def _changes(prompt: str, spec: SceneSpec) -> Iterator[_Change]:
    """Every change of one thing, the most common model errors first."""
    yield from _swaps(spec)
    if spec.relation:  # an exchange of the two objects means the opposite relation, so it needs no negative of its own
        others = shuffled([r for r in RELATIONS if r not in (spec.relation, _OPPOSITE[spec.relation])], prompt)
        for relation in (_OPPOSITE[spec.relation], *others):
            original, instead = _RELATION_WORDS[spec.relation], _RELATION_WORDS[relation]
            yield "relation flip", "relation", original, instead, replace(spec, relation=relation)
    yield from _replacements(prompt, spec)
    yield from _count_swaps(spec)
    for i, obj in enumerate(spec.objects):
        for count in (obj.count + 1, obj.count - 1):
            if 1 <= count <= MAX_OBJECTS and (spec.numeric or count > 1):
                changed = replace(obj, count=count)
                original, instead = (noun_phrase(o, spec.numeric) for o in (obj, changed))
                yield "count change", "count", original, instead, _with(spec, {i: changed})
    if len(spec.objects) > 1:
        for i, obj in enumerate(spec.objects):
            rest = spec.objects[:i] + spec.objects[i + 1 :]
            left = replace(spec, objects=rest, relation=spec.relation if i > 1 else None)
            yield "object omission", "object", _phrase(obj), "", left


def _with(spec: SceneSpec, changed: dict[int, ObjectSpec]) -> SceneSpec:
    return replace(spec, objects=tuple(changed.get(i, obj) for i, obj in enumerate(spec.objects)))


def _phrase(obj: ObjectSpec) -> str:
    """The noun phrase without its article."""
    return noun_phrase(obj, False).partition(" ")[2]


def _swaps(spec: SceneSpec) -> Iterator[_Change]:
    for i, j in combinations(range(len(spec.objects)), 2):
        a, b = spec.objects[i], spec.objects[j]
        for key in _VALUES:
            first, second = getattr(a, key), getattr(b, key)
            if first and second and first != second:
                swapped = replace(a, **{key: second}), replace(b, **{key: first})
                original, instead = (f"{_phrase(x)} and {_phrase(y)}" for x, y in ((a, b), swapped))
                kind = "object swap" if key == "shape" else "attribute swap"
                yield kind, key, original, instead, _with(spec, dict(zip((i, j), swapped, strict=True)))


def _count_swaps(spec: SceneSpec) -> Iterator[_Change]:
    for i, j in combinations(range(len(spec.objects)), 2):
        a, b = spec.objects[i], spec.objects[j]
        if a.count != b.count:
            swapped = replace(a, count=b.count), replace(b, count=a.count)
            original, instead = (" and ".join(noun_phrase(o, spec.numeric) for o in pair) for pair in ((a, b), swapped))
            yield "count change", "count", original, instead, _with(spec, dict(zip((i, j), swapped, strict=True)))


def _replacements(prompt: str, spec: SceneSpec) -> Iterator[_Change]:
    """Replace every attribute once, then again, and so on: first by another object's value, then by any other value."""
    queues = []
    for i, obj in enumerate(spec.objects):
        for key, values in _VALUES.items():
            if not getattr(obj, key):
                continue
            leaked = [v for v in (getattr(o, key) for o in spec.objects) if v]
            values = shuffled([v for v in values if v != getattr(obj, key)], prompt, str(i), key)
            values.sort(key=lambda value, leaked=leaked: value not in leaked)
            queues.append([(i, key, value) for value in values])
    for place in range(max(map(len, queues), default=0)):
        for i, key, value in (queue[place] for queue in queues if place < len(queue)):
            obj = spec.objects[i]
            changed = replace(obj, **{key: value})
            yield "attribute replacement", key, _phrase(obj), _phrase(changed), _with(spec, {i: changed})


# ---------------------------------------------------------------------------------------------- wording
def _forms(structure: str) -> tuple[str, ...]:
    return FORMS[structure] + UNSEEN_FORMS.get(structure, ())


def form_of(prompt: str, spec: SceneSpec) -> str:
    """The sentence form of the prompt; the simplest form if the prompt mixes numerals and articles."""
    words = prompt.lower().replace(".", " ").split()
    return next((f for f in _forms(spec.structure) if sentence(spec, f).split() == words), _forms(spec.structure)[0])


def worded(spec: SceneSpec, form: str) -> str:
    """The sentence in this form, with the verb in agreement."""
    text = sentence(spec, form)
    return text if spec.objects[0].count == 1 else re.sub(rf"^there is (?={'|'.join(_PLURAL)})", "there are ", text)


def _adapted(form: str, spec: SceneSpec, other: SceneSpec) -> str:
    """The form if it fits the structure of `other`, otherwise the most similar form that does."""
    if spec.structure == other.structure:
        return form
    return next(f for f in FORMS[other.structure] if f.startswith("there is") == form.startswith("there is"))
