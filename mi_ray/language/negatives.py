"""Hard negatives: prompts that differ from a prompt in one thing. Likelihoods tell which one fits an image."""

import hashlib
from dataclasses import dataclass

KINDS = (
    "attribute swap",  # two objects exchange an attribute, as when a model binds it to the wrong object
    "relation flip",
    "object swap",  # two objects exchange their places in a relation or their attributes
    "attribute replacement",
    "count change",
    "object omission",  # an object is left out, as when a model neglects it
)


@dataclass(frozen=True)
class Negative:
    """A prompt that differs from the original prompt in one thing."""

    prompt: str
    kind: str  # one of KINDS
    attribute: str  # category of the changed words: color, shape, texture, size, count, relation, object ...
    original: str  # the changed words in the original prompt; an image of this negative contradicts them
    instead: str  # the words that replace them in this negative; empty if they are left out


def chosen(negatives: list[Negative], limit: int) -> list[Negative]:
    """Select at most `limit` negatives: take the kinds in turn, each kind in the given order.

    Each turn takes three attribute replacements: the most common error of an image is an attribute that belongs to
    another object, and it can appear on any object.
    """
    queues = {kind: [n for n in negatives if n.kind == kind] for kind in KINDS}
    in_turn = []
    while any(queues.values()):
        for kind, queue in queues.items():
            share = 3 if kind == "attribute replacement" else 1
            in_turn += queue[:share]
            del queue[:share]
    return in_turn[:limit]


def shuffled(values: list[str], *key: str) -> list[str]:
    """Shuffle values deterministically. The order depends only on values and `key`, so negatives are reproducible."""
    return sorted(values, key=lambda value: hashlib.sha256("/".join([*key, value]).encode()).digest())
