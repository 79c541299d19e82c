"""A proxy of T2I-CompBench's numeracy score (Huang et al., arXiv 2307.06350v3) by an open-vocabulary detector."""

import re

import numpy as np

from mi_ray.alignment.detector import Box, Detector, area, intersection, overlap
from mi_ray.alignment.metric import Column
from mi_ray.alignment.spatial_proxy import PERSONS
from mi_ray.language.nouns import is_plural, singular

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
SAME = 0.9  # boxes of an object that overlap more, or of which one contains more of the other, are one
OTHER_NAMES = {**dict.fromkeys(PERSONS, "person"), "ship": "boat", "goldfish": "fish", "painting": "picture"}
# "a" counts at the beginning, after a comma and after "and": "two guitars and a drum", not "gathered for a meeting".
_COUNTED = re.compile(rf"(?:\b({'|'.join(NUMBERS)})|(?:^|,\s*|\band )an?) (\w+)")


class NumeracyProxy(Detector):
    """The mean over the named objects of 0.5 if it is found, and 0.5 more if it is found as often as the prompt says.

    As in the released code (1b70949), but by another detector, so values are not comparable with published ones: there
    it is UniDet. The released code knows 100 objects by a list; here an object is the noun after a number. A prompt
    without a number has no value.
    """

    declared = (
        Column(
            "numeracy_proxy",
            "proxy of T2I-CompBench's numeracy by an open-vocabulary detector: objects that are there as often as said",
            "share",
            0,
            1,
            nullable=True,
        ),
    )
    reads_only = "prompts with a number before a noun, such as `two cats`"
    reads_all = False

    def reads(self, prompt: str) -> bool:
        return bool(counted(prompt))

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float | None]]:
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            objects = [(OTHER_NAMES.get(name, name), number) for name, number in counted(prompt)]
            seen = self.detect(image, [name for name, _ in objects])
            boxes = {name: [detection.box for detection in of_name] for name, of_name in seen.items()}
            found.append(numeracy_score(objects, boxes) if objects else None)
        return {"numeracy_proxy": found}


def counted(prompt: str) -> list[tuple[str, int]]:
    """The objects of a prompt that have a number: (singular, number)."""
    found = []
    for word, noun in _COUNTED.findall(prompt.lower()):
        number = NUMBERS.get(word, 1)
        if number == 1:
            found.append((noun, 1))
        elif is_plural(noun):
            found.append((singular(noun) or noun, number))
    return found


def numeracy_score(objects: list[tuple[str, int]], boxes: dict[str, list[Box]]) -> float:
    """The score of an image.

    Args:
        objects: (name, number) of each named object, at least one.
        boxes: the boxes of each name, the best first.
    """
    counts = {name: len(merged(of_name)) for name, of_name in boxes.items()}
    each = [0.5 * (counts.get(name, 0) > 0) + 0.5 * (counts.get(name, 0) == number) for name, number in objects]
    return sum(each) / len(objects)


def merged(boxes: list[Box]) -> list[Box]:
    """The boxes without those that are nearly the same as an earlier one. Sides count pixels, so they gain one."""
    kept: list[Box] = []
    for box in boxes:
        if not any(_same(box, other) for other in kept):
            kept.append(box)
    return kept


def _same(first: Box, second: Box) -> bool:
    common = intersection(first, second, 1)
    contained = common / min(area(first, 1), area(second, 1))
    return overlap(first, second, 1) > SAME or contained > SAME
