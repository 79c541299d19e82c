"""A proxy of T2I-CompBench's 2D-spatial score (Huang et al., 2023, arXiv 2307.06350) by an open-vocabulary detector."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mi_ray.alignment.detector import Box, Detection, Detector, overlap
from mi_ray.alignment.english import load_parser
from mi_ray.alignment.metric import Column

if TYPE_CHECKING:
    from spacy.tokens import Doc

# The order is that of the released code: the first one that is in the prompt counts.
RELATIONS = (
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
    "on top of",
)  # fmt: skip
BESIDE = RELATIONS[:3]
DISTANCE = 150  # pixels within which things are beside each other
SHORT_SIDE, LONG_SIDE = 479, 480  # of the image in which the released code measures the distance, pixels
IOU = 0.1  # boxes that overlap more lose a part of a relation's score
LOWEST = 0.5  # a lower score of an image counts as 0
PERSONS = ("girl", "boy", "man", "woman")  # the detector is asked for a person
_SIMPLE = re.compile(rf"(?:an?|the) (\w+) (?:is )?(?:{'|'.join(RELATIONS)}) (?:an?|the) (\w+)\.?", re.IGNORECASE)


class SpatialProxy(Detector):
    """0.25 s1 + 0.25 s2 + 0.5 r for two found objects with the scores s, 0.25 s for one; less than 0.5 counts as 0.

    r is the score of the relation (`relation_score`). Of several boxes of an object the best one counts. The objects
    are the first and the last noun of the prompt; boys, girls, men and women are persons. As in the released code
    (1b70949), but by another detector, so values are not comparable with published ones: there it is UniDet, with its
    own scale of scores.

    A prompt such as "a cat next to a lamp" needs no parser. Others need spaCy. A prompt without a relation or without
    two nouns has no value.

    Raises:
        Unusable: also in `reads`, if a prompt needs spaCy or its model en_core_web_sm and it is missing.
    """

    declared = (
        Column(
            "spatial_proxy",
            "proxy of T2I-CompBench's 2D-spatial by an open-vocabulary detector: two objects and their relation",
            "share",
            0,
            1,
            nullable=True,
        ),
    )
    reads_only = "prompts with a relation such as `next to` and two nouns"
    reads_all = False
    parse: "Callable[[str], Doc] | None" = None

    def reads(self, prompt: str) -> bool:
        return None not in self.question(prompt)

    def question(self, prompt: str) -> tuple[str | None, str | None, str | None]:
        """The relation of a prompt and its two objects."""
        relation = relation_of(prompt)
        if simple := _SIMPLE.fullmatch(prompt):
            return relation, *simple.groups()
        if relation is None:
            return None, None, None
        if self.parse is None:
            self.parse = load_parser("spatial-proxy")
        return relation, *self.objects(self.parse(prompt))

    @staticmethod
    def objects(doc: "Doc") -> tuple[str | None, str | None]:
        """The two objects of a parsed prompt: its first and its last noun."""
        nouns = [token.text for token in doc if token.pos_ == "NOUN"]
        return (nouns[0], nouns[-1]) if len(nouns) > 1 else (None, None)

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float | None]]:
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            relation, *objects = self.question(prompt)
            if None in (relation, *objects):
                found.append(None)
                continue
            names = ["person" if name in PERSONS else name for name in objects]
            seen = self.detect(image, names)
            best = [seen[name][0] if seen[name] else None for name in names]
            found.append(spatial_score(relation, *best, image.shape[:2]))
        return {self.declared[0].name: found}


def relation_of(prompt: str) -> str | None:
    return next((relation for relation in RELATIONS if relation in prompt), None)


def spatial_score(
    relation: str | None, first: Detection | None, second: Detection | None, size: tuple[int, int]
) -> float:
    """The score of an image from the best detections of the two objects, None if there is none.

    Args:
        size: (height, width) of the image in pixels.
    """
    score = sum(0.25 * found.score for found in (first, second) if found)
    if first and second:
        score += relation_score(relation, *(_scaled(found.box, size) for found in (first, second))) / 2
    return score if score >= LOWEST else 0.0


def relation_score(relation: str | None, first: Box, second: Box) -> float:
    """How well a relation holds between two boxes in an image with the short side `SHORT_SIDE`, 0 to 1.

    Beside: 1 if the centres are within `DISTANCE` in one direction, otherwise `DISTANCE` over the larger distance. A
    direction: 1 if the centres differ more in it than in the other one and the boxes hardly overlap, `IOU` over their
    IoU if they overlap more. As in the released code, "on top of" has no score: only "on the top of" has.
    """
    x, y = ((second[i] + second[i + 2] - first[i] - first[i + 2]) / 2 for i in (0, 1))
    if relation in BESIDE:
        near = min(abs(x), abs(y)) < DISTANCE
        return 1.0 if near else DISTANCE / max(abs(x), abs(y))
    holds = {
        "on the left of": x > 0 and abs(x) > abs(y),
        "on the right of": x < 0 and abs(x) > abs(y),
        "on the top of": y > 0 and abs(y) > abs(x),
        "on the bottom of": y < 0 and abs(y) > abs(x),
    }
    if not holds.get(relation, False):
        return 0.0
    shared = overlap(first, second)
    return 1.0 if shared < IOU else IOU / shared


def _scaled(box: Box, size: tuple[int, int]) -> Box:
    """A box in pixels of an image of this size, in pixels of the image that the released code measures."""
    short, long = min(size), max(size)
    scale = min(SHORT_SIDE / short, LONG_SIDE / long)
    return tuple(side * scale for side in box)
