"""Hard negatives of general English prompts, from a small lexicon and the noun phrases of the prompt.

Noun phrases come from regular expressions, or from spaCy if it and a spaCy model are installed. Neither knows the
meaning of words: a word is replaced by another word of the same list (`lexicon`). A prompt without a known word,
number, relation or second noun phrase has no negatives. Two noun phrases can be exchanged around a verb in -ing or a
relation. One of two noun phrases joined by `and` can be omitted. For prompts of the shapes grammar, the module `shapes`
gives exact negatives.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

from mi_ray.language.lexicon import (
    ATTRIBUTES,
    BOUNDARIES,
    CONTRARIES,
    DETERMINERS,
    MUTUAL,
    NUMBERS,
    RELATIONS,
    SYNONYMS,
)
from mi_ray.language.negatives import Negative, shuffled

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_RELATION = re.compile(r"\b(?:" + "|".join(RELATIONS).replace(" ", r"\s+") + r")\b", re.IGNORECASE)
_AND = re.compile(r"(,?\s+and\s+)(?:[a-z]+\s+)?", re.IGNORECASE)
_VOWEL = re.compile(r"(?!uni|us[aeiu]|eu|one(?:\b|-)|once)(?:[aeiou]|hour|hon(?:est|our|or)|heir)", re.IGNORECASE)
_MAX_MODIFIERS = 4


@dataclass(frozen=True)
class Phrase:
    """Character offsets of a noun phrase without its determiner, and of its head noun."""

    start: int
    end: int
    head: int  # start of the head noun, which ends with the phrase


FindPhrases = Callable[[str], list[Phrase]]
_Edit = tuple[int, int, str]  # start, end, replacement
_Change = tuple[str, str, str, str, list[_Edit]]  # kind, attribute, original, instead, the edits


# ---------------------------------------------------------------------------------------------- noun phrases
def plain_phrases(prompt: str) -> list[Phrase]:
    """Noun phrases: the words between a determiner or number and the next boundary word, comma or word in -ing."""
    words = list(WORD.finditer(prompt))
    relations = [match.span() for match in _RELATION.finditer(prompt)]
    phrases, index = [], 0
    while index < len(words):
        opener = words[index].group().lower()
        index += 1
        if not is_opener(opener):
            continue
        end = index
        while end < len(words) and end - index <= _MAX_MODIFIERS:
            word, gap = words[end].group().lower(), prompt[words[end - 1].end() : words[end].start()]
            ends = word in BOUNDARIES or word in DETERMINERS or word in NUMBERS
            ends = ends or (word.endswith("ing") and end > index)
            if ends or gap.strip() or any(a <= words[end].start() < b for a, b in relations):
                break
            end += 1
        if end > index + 1 and re.fullmatch(r"\w{3,}ed", words[end - 1].group()):  # a car parked
            end -= 1
        if end > index:
            phrases.append(Phrase(words[index].start(), words[end - 1].end(), words[end - 1].start()))
            index = end
    return phrases


def spacy_phrases(model: str) -> FindPhrases:
    """Noun phrases from spaCy's noun chunks.

    Args:
        model: name or folder of an installed spaCy pipeline with a parser.

    Raises:
        ValueError: spaCy or the model is not installed.
    """
    try:
        import spacy
    except ImportError as error:
        raise ValueError('"spacy" needs spaCy, which is not installed; run: pip install "mi-ray[nlp]"') from error
    try:
        pipeline = spacy.load(model)
    except OSError as error:
        message = f"the spaCy model {model!r} is not installed; run: python -m spacy download {model}"
        raise ValueError(message) from error
    return lambda prompt: chunks(pipeline(prompt))


def chunks(document) -> list[Phrase]:
    """The noun chunks of a parsed spaCy document, without determiners, numbers and pronouns."""
    phrases = []
    for chunk in document.noun_chunks:
        words = [word for word in chunk if word.i <= chunk.root.i and word.pos_ not in ("DET", "NUM", "PRON", "PUNCT")]
        if words and words[-1].i == chunk.root.i:
            head = words[-1]
            phrases.append(Phrase(words[0].idx, head.idx + len(head), head.idx))
    return phrases


# ---------------------------------------------------------------------------------------------- negatives
def negatives(prompt: str, find_phrases: FindPhrases = plain_phrases) -> list[Negative]:
    """All negatives of the prompt that the lexicon allows. None repeats the prompt or another negative."""
    phrases = find_phrases(prompt)
    made, meanings = [], {_meaning(prompt, phrases)}
    for kind, attribute, original, instead, edits in _changes(prompt, phrases):
        other = _edited(prompt, edits)
        meaning = _meaning(other, find_phrases(other))
        if meaning not in meanings:
            meanings.add(meaning)
            made.append(Negative(other, kind, attribute, original, instead))
    return made


def _meaning(prompt: str, phrases: list[Phrase]) -> tuple:
    """A key that is equal for prompts that differ only in the order of noun phrases without a relation or verb."""
    text = " ".join(prompt.lower().split())
    gaps = _gaps(prompt, phrases)[1:-1]
    if _RELATION.search(text) or any(len(WORD.findall(gap)) > 1 or _is_action(gap) for gap in gaps):
        return (text,)
    named = sorted(prompt[p.start : p.end].lower() for p in phrases)
    return (*named, *(" ".join(_without_articles(gap)) for gap in _gaps(prompt, phrases)))


def _gaps(prompt: str, phrases: list[Phrase]) -> list[str]:
    edges = [0, *(edge for p in phrases for edge in (p.start, p.end)), len(prompt)]
    return [_without(prompt[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _without(text: str) -> str:
    return " ".join(_without_articles(text))


def _without_articles(text: str) -> list[str]:
    return [word for word in text.lower().split() if word not in ("a", "an")]


def _edited(prompt: str, edits: list[_Edit]) -> str:
    for start, end, text in sorted(edits, reverse=True):
        prompt = prompt[:start] + text + prompt[end:]
    return with_right_articles(prompt)


def with_right_articles(text: str) -> str:
    """Use `a` before consonants and `an` before vowels, by the spelling of the next word."""
    return re.sub(r"\b([Aa])n?(?=\s+(\w+))", lambda m: m.group(1) + "n" * bool(_VOWEL.match(m.group(2))), text)


def _changes(prompt: str, phrases: list[Phrase]) -> Iterator[_Change]:
    words = [(m.start(), m.end(), m.group()) for m in WORD.finditer(prompt)]
    heads = {phrase.head for phrase in phrases}  # "orange" in "an orange" is a noun, not an attribute
    attributes = [
        (kind, start, end, word)
        for start, end, word in words
        if start not in heads
        for kind, values in ATTRIBUTES.items()
        if word.lower() in values
    ]
    for (kind, s1, e1, one), (other_kind, s2, e2, two) in combinations(attributes, 2):
        if kind == other_kind and not synonymous(one, two) and not _about_one(prompt, e1, s2, e2):
            original, instead = f"{one} … {two}", f"{two} … {one}"
            yield "attribute swap", kind, original, instead, [(s1, e1, _cased(two, one)), (s2, e2, _cased(one, two))]
    related = list(_RELATION.finditer(prompt))
    for match in related:
        original = " ".join(match.group().lower().split())
        flipped = RELATIONS[original]
        yield "relation flip", "relation", original, flipped, [(*match.span(), _cased(flipped, original))]
    yield from _object_swaps(prompt, phrases, related)
    yield from _omissions(prompt, phrases)
    yield from _replacements(prompt, attributes)
    for (start, end, word), (_, _, after) in zip(words, [*words[1:], (0, 0, "of")], strict=False):
        yield from _counts(start, end, word, after)


def _about_one(prompt: str, end: int, start: int, after: int) -> bool:
    """Whether an exchange of two attributes does not change the meaning. One ends at `end`, one is at [start, after).

    This holds for attributes of one noun (a red, white and blue flag) and of equal nouns in a list (red cars and blue
    cars).
    """
    between = [m.group().lower() for m in WORD.finditer(prompt, end, start)]
    between = [word for word in between if word not in ("and", "or", "a", "an")]
    noun = WORD.search(prompt, after)
    of_lists = {value for values in ATTRIBUTES.values() for value in values}
    return all(word in of_lists for word in between) or (noun is not None and between == [noun.group().lower()])


def _object_swaps(prompt: str, phrases: list[Phrase], related: list[re.Match]) -> Iterator[_Change]:
    """Exchange the head nouns of two phrases that both have attributes, or that a relation or an action joins."""
    for a, b in combinations(phrases, 2):
        heads = prompt[a.head : a.end], prompt[b.head : b.end]
        if heads[0].lower() == heads[1].lower() or heads[0].endswith("s") != heads[1].endswith("s"):
            continue  # a plural noun would get the article of the singular one
        between = any(a.end <= match.start() and match.end() <= b.start for match in related)
        between = between or _is_action(prompt[a.end : b.start])
        part = {"of", "with"} & set(prompt[a.end : b.start].lower().split())  # a woman with golden hair
        if between or (a.head > a.start and b.head > b.start and not part):
            original = " … ".join(prompt[p.start : p.end] for p in (a, b))
            instead = " … ".join((prompt[a.start : a.head] + heads[1], prompt[b.start : b.head] + heads[0]))
            yield "object swap", "object", original, instead, [(a.head, a.end, heads[1]), (b.head, b.end, heads[0])]


def _is_action(gap: str) -> bool:
    """Whether the text between two noun phrases is an action, as in "an astronaut riding a horse"."""
    words = [word for word in WORD.findall(gap.lower()) if word not in DETERMINERS]
    return len(words) == 1 and words[0].endswith("ing") and words[0] not in MUTUAL


def _omissions(prompt: str, phrases: list[Phrase]) -> Iterator[_Change]:
    """Omit one of two noun phrases that are joined by `and`. No omission if a verb agrees with both."""
    for a, b in pairwise(phrases):
        joined = _AND.fullmatch(prompt, a.end, b.start)
        if not joined or re.match(r"\s+(?:are|were|both)\b", prompt[b.end :]):
            continue
        opened = list(WORD.finditer(prompt, 0, a.start))
        first = opened[-1].start() if opened else a.start  # with its determiner or number
        yield "object omission", "object", prompt[b.start : b.end], "", [(a.end, b.end, "")]
        if opened and is_opener(opened[-1].group()):
            yield "object omission", "object", prompt[a.start : a.end], "", [(first, joined.end(1), "")]


def is_opener(word: str) -> bool:
    return word.lower() in DETERMINERS or word.lower() in NUMBERS or word.isdigit()


def _replacements(prompt: str, attributes: list[tuple[str, int, int, str]]) -> Iterator[_Change]:
    """Replace every attribute once, then again, and so on: first by another word of the prompt, then of its list."""
    queues = []
    for kind, start, end, word in attributes:
        others = [v for v in ATTRIBUTES[kind] if not synonymous(v, word)]
        if word.lower() in CONTRARIES:
            others = [CONTRARIES[word.lower()]]
        used = {w.lower() for k, *_, w in attributes if k == kind}
        others = sorted(shuffled(others, prompt, str(start)), key=lambda value, used=used: value not in used)
        queues.append([(kind, start, end, word, other) for other in others])
    for place in range(max(map(len, queues), default=0)):
        for kind, start, end, word, other in (queue[place] for queue in queues if place < len(queue)):
            yield "attribute replacement", kind, word, other, [(start, end, _cased(other, word))]


def _counts(start: int, end: int, word: str, after: str) -> Iterator[_Change]:
    """Replace a number by one more and one less, still plural. `one` and years stay unchanged."""
    known = {number: name for name, number in NUMBERS.items()}
    number = NUMBERS.get(word.lower()) or (int(word) if re.fullmatch("[0-9]{1,2}", word) else 0)
    if not 2 <= number <= 12 or after.lower() in ("of", "am", "pm", "k", "d", "mm"):
        return
    for other in (number + 1, number - 1):
        if 2 <= other <= 12:
            text = str(other) if word.isdigit() else _cased(known[other], word)
            yield "count change", "count", word, text, [(start, end, text)]


def synonymous(one: str, two: str) -> bool:
    one, two = one.lower(), two.lower()
    return one == two or any(one in group and two in group for group in SYNONYMS)


def _cased(word: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word.capitalize() if like[:1].isupper() else word.lower()
