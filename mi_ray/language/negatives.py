"""Hard negatives: a prompt changed in one thing, so that a model's likelihood can say which of them an image shows."""

import hashlib
from dataclasses import dataclass

KINDS = (
    "attribute swap",  # two objects exchange an attribute: the model binds it to the wrong one
    "relation flip",
    "object swap",  # two objects exchange their places, in a relation or under their attributes
    "attribute replacement",
    "count change",
    "object omission",  # an object is not there: the model neglects it
)


@dataclass(frozen=True)
class Negative:
    """A prompt that differs from another in one thing."""

    prompt: str
    kind: str  # one of KINDS
    attribute: str  # what sort of word changed: color, shape, texture, size, count, relation, object ...
    said: str  # the words that an image of this negative contradicts, as the original has them
    instead: str  # what this negative says in their place; empty where it leaves them out


def chosen(negatives: list[Negative], limit: int) -> list[Negative]:
    """At most `limit` of a prompt's negatives: the kinds in turn, each in the order that it was made in.

    Replacements come three at a turn: an image most often has an attribute that another object should have, and any of
    the objects may be the one that has it.
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
    """The values in an order that depends on them and on `key` alone, so that a prompt's negatives never change."""
    return sorted(values, key=lambda value: hashlib.sha256("/".join([*key, value]).encode()).digest())
