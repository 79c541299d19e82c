"""Who makes the hard negatives of a prompt: the grammar of the embedded world, or rules for free English."""

from collections.abc import Callable
from functools import partial

from mi_ray.language import shapes, text
from mi_ray.language.negatives import Negative

MakeNegatives = Callable[[str], list[Negative]]


def negatives_by(source: str) -> MakeNegatives:
    """The function that makes the negatives of a prompt.

    Args:
        source: "shapes": the embedded world's grammar. "text": free English, by a lexicon and regular expressions.
            "spacy": free English, its noun phrases found by spaCy (extra `nlp`, and a model of spaCy's). "auto": the
            grammar where it reads the prompt, else "text". "spacy" with a model of another name: "spacy:NAME".

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
    raise ValueError(f"{source!r} makes no negatives: one of auto, shapes, text, spacy, spacy:MODEL")
