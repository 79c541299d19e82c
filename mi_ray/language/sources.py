"""The parser of prompts for negatives and templates: the shapes grammar, or rules for general English."""

import random
from collections.abc import Callable, Sequence
from functools import partial

from mi_ray.language import shapes, text
from mi_ray.language.negatives import Negative
from mi_ray.language.recombine import Templates, TextTemplates
from mi_ray.language.shapes_templates import ShapesTemplates

MakeNegatives = Callable[[str], list[Negative]]
MakeTemplates = Callable[[Sequence[str], Sequence[float]], Templates]


def negatives_by(source: str) -> MakeNegatives:
    """The function that makes the negatives of a prompt.

    Args:
        source: "shapes": the shapes grammar. "text": general English, with a lexicon and regular expressions.
            "spacy": general English, with noun phrases from spaCy (needs the extra `nlp` and a spaCy model).
            "spacy:NAME": the same with another spaCy model. "auto": the grammar if it can parse the prompt, otherwise
            "text".

    Raises:
        ValueError: the source is unknown, or spaCy or its model is not installed.
    """
    name, _, model = source.partition(":")
    match name:
        case "auto":
            return lambda prompt: (shapes.negatives if shapes.reads(prompt) else text.negatives)(prompt)
        case "shapes":
            return shapes.negatives
        case "text":
            return text.negatives
        case "spacy":
            return partial(text.negatives, find_phrases=text.spacy_phrases(model or "en_core_web_sm"))
    raise ValueError(f"{source!r} is not a source of negatives; use one of auto, shapes, text, spacy, spacy:MODEL")


def templates_by(source: str, split: str) -> MakeTemplates:
    """The function that makes the templates of a list of prompts, from the prompts and their weights.

    Args:
        source: the parser of the prompts, as in `negatives_by`.
        split: the split of the grammar that new prompts of the grammar belong to.

    Raises:
        ValueError: the source is unknown, or spaCy or its model is not installed.
    """
    name, _, model = source.partition(":")
    if name not in ("auto", "shapes", "text", "spacy"):
        raise ValueError(f"{source!r} is not a parser of prompts; use one of auto, shapes, text, spacy, spacy:MODEL")
    find_phrases = text.spacy_phrases(model or "en_core_web_sm") if name == "spacy" else text.plain_phrases

    def make(prompts: Sequence[str], weights: Sequence[float]) -> Templates:
        read = [name in ("auto", "shapes") and shapes.reads(prompt) for prompt in prompts]
        by_grammar = [i for i, is_read in enumerate(read) if is_read]
        others = [i for i, is_read in enumerate(read) if not is_read and name != "shapes"]
        of = [([prompts[i] for i in some], [weights[i] for i in some]) for some in (by_grammar, others)]
        return _Shared([(by_grammar, ShapesTemplates(*of[0], split)), (others, TextTemplates(*of[1], find_phrases))])

    return make


class _Shared:
    """Templates of a list that is divided into parts, each with its own templates. Other prompts have no template."""

    def __init__(self, parts: list[tuple[list[int], Templates]]):
        self._where = {index: (part, place) for some, part in parts for place, index in enumerate(some)}

    def varies(self, index: int) -> bool:
        part, place = self._where.get(index, (None, 0))
        return part is not None and part.varies(place)

    def draw(self, index: int, rng: random.Random) -> str | None:
        part, place = self._where[index]
        return part.draw(place, rng)
