"""A proxy of T2I-CompBench's 3-in-1 score for complex prompts (Huang et al., 2023, arXiv 2307.06350)."""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mi_ray.alignment.blip_vqa import BlipVqa
from mi_ray.alignment.clip_cosine import ClipCosine
from mi_ray.alignment.english import load_parser
from mi_ray.alignment.judges import described, several
from mi_ray.alignment.metric import Column, Metric, details_of
from mi_ray.alignment.spatial_proxy import SpatialProxy, relation_of

if TYPE_CHECKING:
    from spacy.tokens import Doc

PLACES = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
PARTS = {  # which scores are averaged with BLIP-VQA, by the column `relations` of a prompt
    "spatial": ("spatial",),
    "action": ("action",),
    "spatialaction": ("spatial", "action"),
}


class ComplexSpatialProxy(SpatialProxy):
    """2D-spatial of a complex prompt: its objects are the nouns before and after the relation."""

    def question(self, prompt: str) -> tuple[str | None, str | None, str | None]:
        return relation_of(prompt), *complex_objects(self.parse(prompt))


class ThreeInOneProxy(Metric):
    """The mean of BLIP-VQA and, as the column `relations` says, 2D-spatial or CLIP's cosine or both.

    As in the released code (1b70949): CLIP reads the prompt without its adjectives, and a prompt without noun phrases
    has the BLIP-VQA 1. The 2D-spatial part is by another detector than there: values are not comparable with published
    ones. Prompts without the column have no value.

    Args:
        argument: DETECTOR+BLIP+CLIP, each a local folder or a hub id; nothing means the default.

    Raises:
        Unusable: as `Judge`; spaCy or its model en_core_web_sm is missing (when the first prompt is read).
    """

    declared = Column(
        "three_in_one_proxy",
        "proxy of T2I-CompBench's 3-in-1: mean of BLIP-VQA, 2D-spatial by an open-vocabulary detector, CLIP's cosine",
        low=-1,
        high=1,
        nullable=True,
    )
    reads_only = (
        "prompts with the column `relations`: spatial, action or spatialaction, as the files complex_val_*.txt of"
        " T2I-CompBench"
    )
    reads_all = False
    parse: "Callable[[str], Doc] | None" = None

    def __init__(self, argument: str = ""):
        detector, blip, clip = several(argument, 3)
        self.spatial, self.blip, self.clip = ComplexSpatialProxy(detector), BlipVqa(blip), ClipCosine(clip)
        self.columns = (described(self.declared, self.spatial, self.blip, self.clip),)

    def check(self):
        for part in (self.spatial, self.blip, self.clip):
            part.check()

    def reads(self, prompt: str) -> bool:
        """Whether the prompt has relations. It also loads the parser, so that a missing one is told at the start."""
        known = details_of(prompt).get("relations") in PARTS
        if known:
            self.prepare()
        return known

    def prepare(self):
        if self.parse is None:
            self.parse = self.spatial.parse = load_parser("3-in-1-proxy")

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float | None]]:
        values: list[float | None] = [None] * len(prompts)
        rows = [row for row, prompt in enumerate(prompts) if details_of(prompt).get("relations") in PARTS]
        if rows:
            self.prepare()
            asked, shown = [prompts[row] for row in rows], images[rows]
            plain = [" ".join(t.text for t in self.parse(prompt) if t.pos_ != "ADJ") for prompt in asked]
            vqa = self.blip.measure(shown, asked)["blip_vqa"]
            parts = {
                "spatial": self.spatial.measure(shown, asked)["spatial_proxy"],
                "action": self.clip.measure(shown, plain)["clip_cosine"],
            }
            for i, row in enumerate(rows):
                # A prompt whose objects the parser does not find has the spatial score 0.
                others = [parts[name][i] or 0.0 for name in PARTS[details_of(prompts[row])["relations"]]]
                attribute = 1.0 if vqa[i] is None else vqa[i]
                values[row] = (attribute + sum(others)) / (1 + len(others))
        return {self.declared.name: values}


def complex_objects(doc: "Doc") -> tuple[str | None, str | None]:
    """The noun before and the noun after the relation of a parsed prompt; (None, None) unless these are two in all."""
    found = []
    for start in range(len(doc)):
        length = next((n for n in (3, 2, 1) if doc[start : start + n].text in PLACES), None)
        if length is None:
            continue
        before, after = list(doc[:start])[::-1], list(doc[start + length :])
        found += [token.text for token in before if token.pos_ in ("NOUN", "PROPN")][:1]
        nouns = [token.text for token in after if token.pos_ == "NOUN"]
        names = [a.text for a, b in pairwise(after) if a.pos_ == "PROPN" and b.pos_ != "PROPN"]
        found += (nouns or names)[:1]
    return (found[0], found[1]) if len(found) == 2 else (None, None)
