"""Templates of prompts of the shapes grammar: same structure and form, with other shapes, colours and counts."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from mi_ray.language.recombine import Weighted
from mi_ray.language.shapes import form_of, worded
from mi_ray.shapes.grammar import CATEGORIES, FORMS, MAX_OBJECTS, SceneSpec, parse, sample_prompts, split_of

_KEYS = ("shape", "color", "texture")


class ShapesTemplates:
    """Templates of a list of prompts of the grammar. Fillers come from the list, drawn by the weights of its prompts.

    Args:
        split: train, test or ood. All generated prompts belong to this split; the prompts of the list need not.
    """

    def __init__(self, prompts: Sequence[str], weights: Sequence[float], split: str):
        self.split = split
        self.specs = [parse(prompt) for prompt in prompts]
        self.forms = [form_of(prompt, spec) for prompt, spec in zip(prompts, self.specs, strict=True)]
        values, counts = defaultdict(Counter), defaultdict(Counter)
        for spec, weight in zip(self.specs, weights, strict=True):
            if not weight:
                continue
            for key in _KEYS:
                for obj in spec.objects:
                    values[key][getattr(obj, key)] += weight
            values["relation"][spec.relation] += weight
            if spec.numeric:
                counts[len(spec.objects)][tuple(obj.count for obj in spec.objects)] += weight
        self._values = {key: Weighted({v: w for v, w in some.items() if v}) for key, some in values.items()}
        self._counts = {length: Weighted(some) for length, some in counts.items()}

    def varies(self, index: int) -> bool:
        """Whether the list has another shape, colour, texture, relation or count for this template."""
        spec = self.specs[index]
        keys = [key for key in _KEYS if any(getattr(obj, key) for obj in spec.objects)]
        choices = [self._values[key] for key in keys]
        choices += [self._values["relation"]] if spec.relation else []
        choices += [self._counts[len(spec.objects)]] if spec.numeric else []
        return any(len(choice) > 1 for choice in choices)

    def draw(self, index: int, rng: random.Random) -> str | None:
        """Fill the template; None if there are too many objects, two equal objects, or the split is another one."""
        source, form = self.specs[index], self.forms[index]
        counts = self._counts[len(source.objects)].draw(rng) if source.numeric else [1] * len(source.objects)
        objects = tuple(
            replace(obj, count=count, **{key: self._values[key].draw(rng) for key in _KEYS if getattr(obj, key)})
            for obj, count in zip(source.objects, counts, strict=True)
        )
        relation = self._values["relation"].draw(rng) if source.relation else None
        spec = SceneSpec(objects, relation, source.numeric)
        if self.split != "ood" and form not in FORMS[spec.structure]:
            form = rng.choice(FORMS[spec.structure])
        fits = spec.total <= MAX_OBJECTS and _differ(source, spec) and split_of(spec, form) == self.split
        return worded(spec, form) if fits else None


class GrammarTemplates:
    """All sentences of the grammar in a split. The indices are those of `CATEGORIES`."""

    def __init__(self, split: str):
        self.split = split

    def varies(self, index: int) -> bool:
        return index < len(CATEGORIES)

    def draw(self, index: int, rng: random.Random) -> str:
        return sample_prompts(CATEGORIES[index], self.split, 1, np.random.default_rng(rng.getrandbits(64)))[0]


def _differ(source: SceneSpec, spec: SceneSpec) -> bool:
    """Whether objects that differ in an attribute in the source also differ in it here."""
    pairs = zip(combinations(source.objects, 2), combinations(spec.objects, 2), strict=True)
    return all(
        getattr(a, key) == getattr(b, key) or getattr(x, key) != getattr(y, key)
        for (a, b), (x, y) in pairs
        for key in _KEYS
    )
