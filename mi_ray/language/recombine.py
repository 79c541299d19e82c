"""New prompts from a list of prompts: the template of one prompt, filled with phrases, attributes, counts and relations
of all prompts.

A filler has the same grammar as the phrase that it replaces, and was seen in the same context (`templates`). A colour
can go to every noun that has a colour somewhere in the list. Any other attribute can go to a noun that has it in the
list, or that shares two other attributes of the same kind with a noun that has it. Example: "a plastic fork", if the
list has plastic spoons, and both spoons and forks are wooden and metal.
"""

import random
import re
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, combinations, islice
from typing import Generic, Protocol, TypeVar

from mi_ray.language.lexicon import NUMBERS
from mi_ray.language.nouns import is_singular, plural
from mi_ray.language.templates import Form, Relation, Slot, Template, template_of
from mi_ray.language.text import FindPhrases, plain_phrases, synonymous, with_right_articles

MAX_FAILED_DRAWS = 10_000  # stop after this number of consecutive draws without a new prompt
_NUMERALS = {number: word for word, number in NUMBERS.items()}
_TRIES = 20  # attempts to fill one template with different objects

Value = TypeVar("Value")


class Templates(Protocol):
    """The templates of a list of prompts."""

    def varies(self, index: int) -> bool:
        """Whether the template of the prompt can give another prompt."""

    def draw(self, index: int, rng: random.Random) -> str | None:
        """Fill the template of the prompt with random fillers; None if the drawn fillers do not fit together."""


class Weighted(Generic[Value]):
    """Values that are drawn with probability proportional to their weights."""

    def __init__(self, weights: dict[Value, float]):
        self.values = list(weights)
        self._ends = list(accumulate(weights.values()))

    def __len__(self) -> int:
        return len(self.values)

    def draw(self, rng: random.Random) -> Value:
        return self.values[bisect(self._ends, rng.random() * self._ends[-1], hi=len(self.values) - 1)]


class TextTemplates:
    """Templates of free English.

    Args:
        weights: weight of each prompt. Fillers are drawn by the weights of the prompts that contain them. A prompt of
            weight 0 gives no fillers; it only shows which attributes fit which nouns.
    """

    def __init__(self, prompts: Sequence[str], weights: Sequence[float], find_phrases: FindPhrases = plain_phrases):
        self.templates = [template_of(prompt, find_phrases) for prompt in prompts]
        self._phrases: dict[tuple, Counter[Form]] = defaultdict(Counter)
        self._values: dict[str, Counter[str]] = defaultdict(Counter)
        self._seen: dict[tuple[str, str], set[str]] = defaultdict(set)  # (kind, noun) -> values
        self._counts: dict[int, Counter[int]] = defaultdict(Counter)  # noun phrases enumerated -> counts
        self._relation_weights: Counter[str] = Counter()
        self._cache: dict[tuple, Weighted] = {}
        for template, weight in zip(self.templates, weights, strict=True):
            self._learn(template, weight)
        self._relations = Weighted(self._relation_weights)

    def varies(self, index: int) -> bool:
        """Whether any slot of the template has more than one possible filler."""
        for piece in self.templates[index]:
            if isinstance(piece, Relation) and len(self._relations) > 1:
                return True
            if isinstance(piece, Slot):
                choices = [self._forms(piece), *(self._attributes(k, piece.form.noun) for k in piece.form.signature)]
                choices += [self._numbers(piece)] if piece.count else []
                if any(len(choice) > 1 for choice in choices):
                    return True
        return False

    def draw(self, index: int, rng: random.Random) -> str | None:
        template = self.templates[index]
        slots = [piece for piece in template if isinstance(piece, Slot)]
        for _ in range(_TRIES):
            filled = [self._filled(slot, rng) for slot in slots]
            if _differ(slots, filled) and all(slot.count != 1 or is_singular(slot.form.words[-1]) for slot in filled):
                return self._sentence(template, filled, rng)
        return None

    # ------------------------------------------------------------------------------------------ vocabulary
    def _learn(self, template: Template, weight: float):
        for piece in template:
            if isinstance(piece, Relation) and weight:
                self._relation_weights[piece.text] += weight
            elif isinstance(piece, Slot):
                form = piece.form
                for word, kind in zip(form.words, form.kinds, strict=True):
                    if kind:
                        self._values[kind][word] += weight
                        self._seen[kind, form.noun].add(word)
                if weight:
                    for place in (piece.context, form.noun):
                        self._phrases[place, piece.grammar, form.signature][form] += weight
                    if piece.count:
                        self._counts[piece.group][piece.count] += weight

    def _forms(self, slot: Slot) -> Weighted[Form]:
        """Fillers of a slot: phrases with the same noun and, if the slot allows other nouns, phrases with those."""
        key = (slot.context, slot.form.noun, slot.grammar, slot.form.signature)
        if key not in self._cache:
            found = Counter(self._phrases[key[1:]])
            if slot.context is not None:
                found |= self._phrases[key[:1] + key[2:]]  # the larger weight of each phrase
            self._cache[key] = Weighted(found)
        return self._cache[key]

    def _attributes(self, kind: str, noun: str) -> Weighted[str]:
        if (kind, noun) not in self._cache:
            own, fit = self._seen[kind, noun], set()
            for (other, _), values in self._seen.items():
                if other == kind and (kind == "color" or values is own or len(values & own) > 1):
                    fit |= values
            found = {value: weight for value, weight in self._values[kind].items() if value in fit and weight}
            self._cache[kind, noun] = Weighted(found)
        return self._cache[kind, noun]

    def _numbers(self, slot: Slot) -> Weighted[int]:
        key = (slot.group, slot.agrees and slot.count == 1, slot.agrees)
        if key not in self._cache:
            seen = self._counts[slot.group].items()
            fit = {count: w for count, w in seen if not slot.agrees or (count == 1) == (slot.count == 1)}
            self._cache[key] = Weighted(fit)
        return self._cache[key]

    # ------------------------------------------------------------------------------------------ filling
    def _filled(self, slot: Slot, rng: random.Random) -> Slot:
        form = self._forms(slot).draw(rng)
        words = tuple(
            self._attributes(kind, form.noun).draw(rng) if kind else word
            for word, kind in zip(form.words, form.kinds, strict=True)
        )
        count = self._numbers(slot).draw(rng) if slot.count else None
        return replace(slot, form=replace(form, words=words), count=count)

    def _sentence(self, template: Template, filled: list[Slot], rng: random.Random) -> str:
        slots, text = iter(filled), ""
        for piece in template:
            if isinstance(piece, Slot):
                text += _as_text(next(slots))
            else:
                text += self._relations.draw(rng) if isinstance(piece, Relation) else piece
        capital = isinstance(template[0], Slot) and template[0].opener[:1].isupper()
        return with_right_articles(text[:1].upper() + text[1:] if capital else text)


def _differ(slots: list[Slot], filled: list[Slot]) -> bool:
    """Whether objects and attributes that differ in the template also differ after filling."""
    for (a, b), (x, y) in zip(combinations(slots, 2), combinations(filled, 2), strict=True):
        if a.form.noun != b.form.noun and x.form.noun == y.form.noun:
            return False
        if not _in_common(a, b) and _in_common(x, y):
            return False
    before, instead = ([_attributes_of(slot) for slot in some] for some in (slots, filled))
    flat, others = ([value for values in some for value in values] for some in (before, instead))
    return all(
        a[0] != b[0] or synonymous(a[1], b[1]) or not synonymous(x[1], y[1])
        for (a, b), (x, y) in zip(combinations(flat, 2), combinations(others, 2), strict=True)
    )


def _in_common(a: Slot, b: Slot) -> set[str]:
    """Words that two noun phrases share."""
    return {*a.form.words} & {*b.form.words}


def _attributes_of(slot: Slot) -> list[tuple[str, str]]:
    return [(kind, word) for word, kind in zip(slot.form.words, slot.form.kinds, strict=True) if kind]


def _as_text(slot: Slot) -> str:
    *modifiers, noun = slot.form.words
    opener = slot.opener
    if slot.count is not None:
        noun = plural(noun) if slot.count > 1 else noun
        opener = str(slot.count) if slot.opener.isdigit() else _NUMERALS[slot.count]
    return " ".join([opener, *modifiers, noun]).strip()


# ---------------------------------------------------------------------------------------------- drawing
def same(prompt: str) -> tuple:
    """A key that is equal for prompts that differ only in case, spaces, a/an, full stop, or the order of a list."""
    plain = re.sub(r"\ban\b", "a", " ".join(prompt.lower().split()).rstrip(" ."))
    pieces = template_of(plain)
    slots = iter([piece for piece in pieces if isinstance(piece, Slot)])
    phrases: list[str] = []
    for first in slots:
        group = [first, *islice(slots, first.group - 1)]
        phrases += sorted(f"{slot.opener} {' '.join(slot.form.words)}" for slot in group)
    return (*phrases, *("" if isinstance(piece, Slot) else str(piece) for piece in pieces))


def recombined(
    templates: Templates,
    weights: Sequence[float],
    seed: int,
    excluded: Iterable[str],
    fits: Callable[[str], bool] = lambda prompt: True,
) -> Iterator[tuple[int, str]]:
    """Yield (index of the source template, new prompt). All prompts differ. It stops after `MAX_FAILED_DRAWS` failures.

    Args:
        weights: relative frequency of each prompt's template.
        excluded: prompts that must not be generated, including those of the list itself.
        fits: an additional condition for a prompt.
    """
    usable = {i: weight for i, weight in enumerate(weights) if weight > 0 and templates.varies(i)}
    if not usable:
        return
    rng, indices = random.Random(seed), Weighted(usable)
    made = set(excluded)
    seen, failed = {same(prompt) for prompt in made}, 0
    while failed < MAX_FAILED_DRAWS:
        failed += 1
        index = indices.draw(rng)
        prompt = templates.draw(index, rng)
        if prompt is None or prompt in made:
            continue
        made.add(prompt)
        key = same(prompt)
        if key in seen:
            continue
        seen.add(key)
        if fits(prompt):
            failed = 0
            yield index, prompt
