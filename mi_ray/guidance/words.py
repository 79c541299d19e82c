"""The noun phrases of a prompt as positions of tokens."""

import re
from collections.abc import Callable
from typing import NamedTuple

from mi_ray.diffusion.denoisers import PipelineDenoiser
from mi_ray.language.text import FindPhrases, is_opener, plain_phrases, spacy_phrases


class Span(NamedTuple):
    """A noun phrase: its text with the determiner or number, its tokens, and the last token of its noun.

    A text encoder with causal attention puts the whole phrase into this last token.
    """

    text: str
    start: int
    end: int  # after the last token
    noun: int


def phrase_finder(phrases: str) -> FindPhrases:
    """The function that finds noun phrases.

    Args:
        phrases: "text": rules for English; "spacy" or "spacy:MODEL".

    Raises:
        ValueError: spaCy or its model is not installed.
    """
    name, _, model = phrases.partition(":")
    return plain_phrases if name == "text" else spacy_phrases(model or "en_core_web_sm")


def noun_spans(denoiser: PipelineDenoiser, prompt: str, find: Callable[[str], list]) -> list[Span]:
    """The noun phrases of a prompt whose tokens the text encoder reads, in order. Token 0 is that of the start."""
    places = denoiser.token_offsets(prompt)
    spans = []
    for phrase in sorted(find(prompt), key=lambda phrase: phrase.start):
        opener = re.search(r"[\w'’-]+(?=\s+$)", prompt[: phrase.start])
        start = opener.start() if opener and is_opener(opener.group()) else phrase.start
        tokens = [i for i, (a, b) in enumerate(places) if a < phrase.end and b > start]
        if tokens and tokens[-1] < denoiser.max_tokens - 1:
            spans.append(Span(prompt[start : phrase.end], tokens[0], tokens[-1] + 1, tokens[-1]))
    return spans
