"""A prompt as a template: its noun phrases, with their attributes and counts, and its relations are slots.

All other text stays unchanged. Which noun phrase can fill a slot depends on the words beside it:

- A phrase that stands alone, in a list or beside a relation can be replaced by any phrase that stands like this.
- A phrase beside other words (The blanket draped over the couch) can be replaced only by a phrase that was seen beside
  the same words.
- A phrase beside a plain preposition (a bathroom with a sink), or in a prompt with a pronoun, keeps its noun.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from mi_ray.language.lexicon import (
    ATTRIBUTES,
    BOUNDARIES,
    DETERMINERS,
    NEARNESS,
    NUMBERS,
    PICTURES,
    PRONOUNS,
    RELATIONS,
    SHADES,
    VERBS,
)
from mi_ray.language.nouns import is_plural, singular
from mi_ray.language.text import WORD, FindPhrases, Phrase, is_opener, plain_phrases

_KINDS = {word: kind for kind, words in reversed(ATTRIBUTES.items()) for word in words}
# An object inside another one must fit into it, so "inside" and "outside" are not exchanged with other relations.
_PLACES = [relation for relation in (*RELATIONS, *NEARNESS) if relation not in ("inside", "outside")]
_ANY_RELATION = "|".join(sorted(_PLACES, key=len, reverse=True)).replace(" ", r"\s+")
_BESIDE_RELATION = re.compile(rf"(\s+(?:(?:is|are|was|were)\s+)?)({_ANY_RELATION})(\s+)", re.IGNORECASE)
_JOINED = re.compile(r"\s*,\s+|\s*,?\s+and\s+", re.IGNORECASE)
_THERE = re.compile(r"there\s+(?:is|are|was|were)", re.IGNORECASE)
_RELATION = "<relation>"  # placeholder for any relation in a context
_COPULAS = ("is", "are", "was", "were")

Context = tuple[str, str]  # the text before and after the phrase, see `_normalised`
FREE: Context = ("", "")


@dataclass(frozen=True)
class Form:
    """A noun phrase without its opener: its words, and the attribute kind of each word. The noun is the last word."""

    words: tuple[str, ...]
    kinds: tuple[str | None, ...]

    @property
    def noun(self) -> str:
        """The last word in the singular, which identifies the object."""
        word = self.words[-1].lower()
        return (singular(word) or word) if is_plural(word) else word

    @property
    def signature(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.kinds if kind)


@dataclass(frozen=True)
class Slot:
    """A noun phrase at its place in a template."""

    opener: str  # the determiner or number as in the prompt; empty: none
    form: Form  # in the singular after a number
    count: int | None = None
    context: Context | None = None  # phrases with the same context can replace this one; None: the noun stays
    group: int = 1  # number of noun phrases in the same list
    agrees: bool = False  # a verb agrees with it, so singular stays singular and plural stays plural

    @property
    def grammar(self) -> str:
        """The grammatical form that the determiner or number requires. Phrases with the same value can be exchanged."""
        if self.count is not None:
            return "number"
        opener = "a" if self.opener.lower() in ("a", "an") else self.opener.lower()
        return f"{opener} {'plural' if is_plural(self.form.words[-1]) else 'singular'}"


@dataclass(frozen=True)
class Relation:
    """A relation word or phrase between two noun phrases."""

    text: str


Template = tuple[str | Slot | Relation, ...]


def template_of(prompt: str, find_phrases: FindPhrases = plain_phrases) -> Template:
    """Split the prompt into text and slots. A prompt in capital letters is read in lower case."""
    prompt = prompt.lower() if prompt.isupper() else prompt
    found = list(_slots(prompt, find_phrases(prompt)))
    edges = [0, *(edge for start, end, _ in found for edge in (start, end)), len(prompt)]
    between = [prompt[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    slots = _placed([slot for *_, slot in found], between, prompt)
    pieces: list[str | Slot | Relation] = [between[0]]
    for slot, text in zip(slots, between[1:], strict=True):
        pieces.append(slot)
        match = _BESIDE_RELATION.fullmatch(text)
        pieces += [match[1], Relation(" ".join(match[2].lower().split())), match[3]] if match else [text]
    return tuple(piece for piece in pieces if piece)


# ---------------------------------------------------------------------------------------------- noun phrases
def _slots(prompt: str, phrases: list[Phrase]) -> Iterator[tuple[int, int, Slot]]:
    """(start, end, slot) of each noun phrase that can be parsed, including its opener."""
    for phrase in sorted(phrases, key=lambda phrase: phrase.start):
        before = re.search(r"[\w'’-]+(?=\s+$)", prompt[: phrase.start])
        opener = before.group() if before and is_opener(before.group()) else ""
        count = NUMBERS.get(opener.lower()) or (int(opener) if opener.isdigit() else None)
        words = list(WORD.finditer(prompt, phrase.start, phrase.end))
        words = _without_verb(prompt, words, opener.lower(), count)
        if not words or words[-1].group().isdigit() or _is_incomplete(prompt, words):
            continue
        if count is not None and not 1 <= count <= 12:
            continue
        form = _form([word.group() for word in words])
        if count is not None and count > 1:
            form = replace(form, words=(*form.words[:-1], singular(form.words[-1]) or form.words[-1]))
        yield before.start() if opener else phrase.start, words[-1].end(), Slot(opener, form, count)


def _without_verb(prompt: str, words: list[re.Match], opener: str, count: int | None) -> list[re.Match]:
    """The words of the phrase before a verb or adverb that was wrongly included in it."""
    lower = [word.group().lower() for word in words]
    after = re.match(r"\s+([\w'’-]+)", prompt[words[-1].end() :])
    follows = after[1].lower() if after else ""
    end = len(words)
    for i in range(1, end):
        is_last = i + 1 == end or lower[i + 1].endswith("ly")
        participle = lower[i].endswith("ed") and lower[i] not in _KINDS and is_last
        past = lower[i] in VERBS and follows not in ("", "and", "or", "with", "of", *_COPULAS)
        if lower[i].endswith("ly") or participle or (past and not all(word in _KINDS for word in lower[:i])):
            end = i
            break
    if end == len(words) > 1:
        third_person = opener in ("a", "an", "one") and is_plural(lower[-1]) and lower[-1].endswith("s")
        if third_person or (follows and is_opener(follows)):  # a man rides a horse
            end -= 1
    if count is not None and count > 1 and not is_plural(lower[end - 1]):  # two cars stuck on the road
        end = next((i + 1 for i in reversed(range(end)) if is_plural(lower[i])), 0)
    return words[:end]


def _is_incomplete(prompt: str, words: list[re.Match]) -> bool:
    """Whether the phrase is incomplete: its last word is an adjective, or more nouns follow."""
    last, rest = words[-1].group().lower(), prompt[words[-1].end() :]
    following = re.match(r"(\s*,|\s+and\b|\s*,\s+and\b)?\s+([\w'’-]+)", rest)
    if not following:
        return bool(re.match(r"['’/]", rest))
    joined, word = following[1], following[2].lower()
    if joined:
        listed = is_opener(word) or (word == "and" and not re.match(r"\s*,\s+and\s+\w+\s*$", rest))
        return not listed and (joined.strip() == "," or last in _KINDS or word in _KINDS)
    return last in _KINDS and word not in BOUNDARIES and not is_opener(word) and not word.endswith(("ed", "ing"))


def _form(words: list[str]) -> Form:
    """The words with their attribute kinds. A shade and its colour are one attribute (dark grey)."""
    kinds = [_KINDS.get(word.lower()) for word in words[:-1]] + [None]
    for i in reversed(range(len(words) - 1)):
        if words[i].lower() in SHADES and kinds[i + 1] == "color":
            words[i : i + 2], kinds[i : i + 2] = [f"{words[i]} {words[i + 1]}"], ["color"]
    texts = (word.lower() if kind else word for word, kind in zip(words, kinds, strict=True))
    return Form(tuple(texts), tuple(kinds))


# ---------------------------------------------------------------------------------------------- contexts
def _placed(slots: list[Slot], between: list[str], prompt: str) -> list[Slot]:
    """Set the context of each slot. Slots that are joined by commas and `and` share one context."""
    if not slots:
        return []
    texts = [_normalised(text) for text in between]
    if not _opens(texts[0]):
        of_picture = False
    else:
        texts[0] = ""
        of_picture = slots[0].form.noun in PICTURES and texts[1] == "of"
    if of_picture:
        texts[0], texts[1] = "of", ""
    keeps_nouns = any(word.group().lower() in PRONOUNS for word in WORD.finditer(prompt))
    borders = [i for i in range(1, len(slots)) if not _JOINED.fullmatch(between[i])]
    placed = []
    for first, last in pairwise([0, *borders, len(slots)]):
        sides = texts[first], texts[last]
        free = all(side in ("", _RELATION) for side in sides)
        context = FREE if free else sides
        if keeps_nouns or any(_is_only_prepositions(side) for side in sides):
            context = None
        agrees = not free or (first == 0 and bool(_THERE.search(between[0])))
        placed += [replace(s, context=context, group=last - first, agrees=agrees) for s in slots[first:last]]
    return placed


def _normalised(text: str) -> str:
    """The normalised text between two noun phrases. Every relation is replaced by the same placeholder."""
    match = _BESIDE_RELATION.fullmatch(text)
    if match:
        return " ".join([*match[1].lower().split(), _RELATION])
    return " ".join(text.lower().split()).strip(" .,;:!")


def _opens(text: str) -> bool:
    return not text or bool(_THERE.fullmatch(text))


def _is_only_prepositions(text: str) -> bool:
    """Whether the words are only prepositions and the like, which do not restrict the noun phrase beside them."""
    words = [word for word in text.split() if word not in DETERMINERS]
    return bool(words) and _RELATION not in words and all(word in BOUNDARIES for word in words)
