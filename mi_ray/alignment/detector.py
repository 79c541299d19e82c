"""Objects in an image by their names: open-vocabulary detectors of transformers, for the proxies that need boxes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mi_ray.alignment.judges import Judge, device, fitted_size, normalised, resized

if TYPE_CHECKING:
    import torch

OVERLAP = 0.5  # of an object's boxes only the best remains if they overlap more: as in the published detectors
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels that detectors of the DETR type read

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class Detection(NamedTuple):
    """A found object."""

    box: Box
    score: float  # in [0, 1]


@dataclass(frozen=True)
class Family:
    """How the models of one type are used."""

    model_class: str  # of transformers
    template: str
    threshold: float  # lowest score of a detection, that of the model's own example


FAMILIES = {
    "owlv2": Family("Owlv2ForObjectDetection", "a photo of a {}", 0.1),
    "grounding-dino": Family("GroundingDinoForObjectDetection", "{}.", 0.35),
    "mm-grounding-dino": Family("MMGroundingDinoForObjectDetection", "{}.", 0.35),
}


class Detector(Judge):
    """A metric by a detector that finds objects by their names. A subclass turns boxes into its value."""

    default = "google/owlv2-base-patch16-ensemble"
    model_types = tuple(FAMILIES)
    reader = "tokenizer"
    network = None  # the model, loaded by `prepare`
    tokenizer = None

    @property
    def family(self) -> Family:
        return FAMILIES[json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["model_type"]]

    @property
    def template(self) -> str:
        return self.family.template

    @property
    def model_class(self) -> str:
        return self.family.model_class

    def prepare(self):
        """Load the model and the tokenizer, once."""
        if self.network is None:
            self.tokenizer, self.network = self.load_reader(), self.load()

    def detect(self, image: np.ndarray, names: Iterable[str]) -> dict[str, list[Detection]]:
        """The objects of an image (h, w, 3) uint8: {name: detections, the best first}."""
        self.prepare()
        names = list(dict.fromkeys(names))
        if not names:
            return {}
        find = self._by_queries if self.network.config.model_type == "owlv2" else self._by_phrases
        found, family = find(image, names), self.family
        kept = {name: [] for name in names}
        for name, detection in sorted(found, key=lambda pair: -pair[1].score):
            others = (overlap(detection.box, other.box) for other in kept[name])
            if detection.score > family.threshold and all(share <= OVERLAP for share in others):
                kept[name].append(detection)
        return kept

    def _by_queries(self, image: np.ndarray, names: list[str]) -> list[tuple[str, Detection]]:
        """OWLv2: all names at once. A box has the name with the highest score."""
        import torch

        config, (height, width) = self.network.config, image.shape[:2]
        side, size = max(height, width), config.vision_config.image_size
        square = np.zeros((side, side, 3), np.uint8)  # the image is in the upper left corner
        square[:height, :width] = image
        texts = [self.template.format(name) for name in names]
        length = config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            output = self.network(
                input_ids=tokens["input_ids"].to(device()),
                attention_mask=tokens["attention_mask"].to(device()),
                pixel_values=normalised([resized(square, size, size, "bilinear")]),
            )
        scores, best = output.logits[0].float().sigmoid().max(1)
        boxes = _corners(output.pred_boxes[0], side, side)
        return [(names[i], Detection(b, s)) for i, b, s in zip(best.tolist(), boxes, scores.tolist(), strict=True)]

    def _by_phrases(self, image: np.ndarray, names: list[str]) -> list[tuple[str, Detection]]:
        """Grounding DINO: one name at a time, so that no token belongs to two names."""
        import torch

        height, width = image.shape[:2]
        scaled = resized(image, *fitted_size(height, width, SHORT_SIDE, LONG_SIDE), "bilinear")
        pixels, found = normalised([scaled], *IMAGENET), []
        for name in names:
            tokens = self.tokenizer(self.template.format(name.lower()), return_tensors="pt").to(device())
            with torch.inference_mode():
                output = self.network(pixel_values=pixels, **tokens)
            scores = output.logits[0].float().sigmoid().max(1).values.tolist()  # over the tokens of the name
            boxes = _corners(output.pred_boxes[0], height, width)
            found += [(name, Detection(box, score)) for box, score in zip(boxes, scores, strict=True)]
        return found


def _corners(boxes: "torch.Tensor", height: int, width: int) -> list[Box]:
    """Boxes (n, 4) as centre and size, in shares of an image, to corners in its pixels."""
    x, y, w, h = boxes.double().cpu().unbind(1)
    sides = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    return list(zip(*(side.tolist() for side in sides), strict=True))


def overlap(first: Box, second: Box, extra: float = 0) -> float:
    """Intersection over union of two boxes; 0 if both are empty. `extra`: pixels that sides gain in pixel counts."""
    common = intersection(first, second, extra)
    union = area(first, extra) + area(second, extra) - common
    return common / union if union else 0.0


def intersection(first: Box, second: Box, extra: float = 0) -> float:
    """Common area of two boxes."""
    left, top = max(first[0], second[0]), max(first[1], second[1])
    right, bottom = min(first[2], second[2]), min(first[3], second[3])
    return max(0, right - left + extra) * max(0, bottom - top + extra)


def area(box: Box, extra: float = 0) -> float:
    return (box[2] - box[0] + extra) * (box[3] - box[1] + extra)
