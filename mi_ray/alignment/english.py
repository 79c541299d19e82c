"""spaCy's parser of English, which some recipes need."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mi_ray.alignment.metric import Unusable

if TYPE_CHECKING:
    from spacy.tokens import Doc

PARSER = "en_core_web_sm"


def load_parser(metric: str) -> "Callable[[str], Doc]":
    """spaCy's English model: text to its tokens.

    Args:
        metric: name of the metric, for the message.

    Raises:
        Unusable: spaCy or its English model is not installed.
    """
    try:
        import spacy
    except ImportError as error:
        raise Unusable(f'{metric} needs spaCy, which is not installed; run: pip install "mi-ray[nlp]"') from error
    try:
        return spacy.load(PARSER)
    except OSError as error:
        raise Unusable(
            f"{metric} needs the spaCy model {PARSER}, which is not installed; run: python -m spacy download {PARSER}"
        ) from error
