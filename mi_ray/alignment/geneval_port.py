"""A port of GenEval (Ghosh et al., NeurIPS 2023, arXiv 2310.11513) to Mask2Former and CLIP of transformers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mi_ray.alignment.clip_judge import Clip
from mi_ray.alignment.detector import IMAGENET, LONG_SIDE, SHORT_SIDE, Box
from mi_ray.alignment.judges import Model, cropped, described, device, fitted_size, normalised, resized, several
from mi_ray.alignment.metric import Column, Metric, Unusable, details_of

# COCO's objects in the order of the detector's labels, with GenEval's names.
OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {c} {}", "a photo of a {c}-colored {}", "a photo of a {c} object")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # lowest score of an object; of prompts that exclude a further one
MOST = 16  # objects of a class
BACKGROUND = 0x99  # grey around an object whose colour is asked
MARGIN, ALONG = 0.1, 0.5  # of a position: share of both sizes, and cosine of the direction
MASKS = 100  # pairs of query and class with the highest probability


class Found(NamedTuple):
    """An object in an image."""

    box: Box
    mask: np.ndarray  # (h, w) bool


class Segmenter(Model):
    """Instances of COCO's classes by Mask2Former, after mmdetection's settings of GenEval's detector."""

    default = "facebook/mask2former-swin-small-coco-instance"
    model_class = "Mask2FormerForUniversalSegmentation"
    model_types = ("mask2former",)
    network = None  # Mask2FormerForUniversalSegmentation, loaded by `prepare`

    def check(self):
        """As `Model.check`, and that the classes are COCO's 80.

        Raises:
            Unusable: as `Model.check`, or the model has another number of classes.
        """
        super().check()
        self._check_classes()

    def prepare(self):
        """Load the model, once.

        Raises:
            Unusable: its classes are not COCO's 80.
        """
        if self.network is None:
            self._check_classes()
            self.network = self.load()

    def _check_classes(self):
        if (count := self._config().num_labels) != len(OBJECTS):
            raise Unusable(
                f"needs a model with COCO's {len(OBJECTS)} classes, but {self.model!r} has {count}: give another"
            )

    def find(self, image: np.ndarray, threshold: float) -> dict[str, list[Found]]:
        """The objects of an image (h, w, 3) uint8 above a score: {class: at most `MOST`, the best first}.

        A score is the probability of the class times the mean probability of the mask's pixels. The box surrounds the
        mask.
        """
        import torch
        from torch.nn.functional import interpolate, pad

        self.prepare()
        height, width = fitted_size(*image.shape[:2], SHORT_SIDE, LONG_SIDE)
        pixels = normalised([resized(image, height, width, "bilinear")], *IMAGENET)
        pixels = pad(pixels, (0, -width % 32, 0, -height % 32))
        with torch.inference_mode():
            output = self.network(pixel_values=pixels)
            logits = output.masks_queries_logits.float()
            logits = interpolate(logits, size=pixels.shape[2:], mode="bilinear")[..., :height, :width]
            logits = interpolate(logits, size=image.shape[:2], mode="bilinear")[0]
            shares = output.class_queries_logits[0].float().softmax(1)[:, :-1]
            best, place = shares.flatten().topk(min(MASKS, shares.numel()))
            found: dict[str, list[Found]] = {}
            scored = []
            for share, query, label in zip(best, place // shares.shape[1], place % shares.shape[1], strict=True):
                mask = logits[query] > 0
                score = share * (logits[query].sigmoid() * mask).sum() / (mask.sum() + 1e-6)
                if score > threshold:
                    scored.append((float(score), OBJECTS[label], mask.cpu().numpy()))
        for _, name, mask in sorted(scored, key=lambda item: -item[0]):
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            found.setdefault(name, []).append(Found(tuple(map(float, box)), mask))
        return {name: of_name[:MOST] for name, of_name in found.items()}


class ColorReader(Clip):
    """The colour of objects by CLIP."""

    default = "openai/clip-vit-large-patch14"
    template = "; ".join(TEMPLATES)

    def colors(self, image: np.ndarray, objects: list[Found], name: str) -> list[str]:
        """The most probable colour of each object of this name: that whose mean text embedding is nearest."""
        import torch
        from torch.nn.functional import normalize

        self.prepare()
        clip, size = self.clip, self.clip.config.vision_config.image_size
        longest = clip.config.text_config.max_position_embeddings
        texts = [template.format(name, c=color) for color in COLORS for template in TEMPLATES]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        tokens = tokens.to(device())
        with torch.inference_mode():
            embedded = clip.text_projection(clip.text_model(**tokens).pooler_output)
            embedded = normalize(normalize(embedded, dim=1).unflatten(0, (len(COLORS), -1)).mean(1), dim=1)
            pixels = normalised([cropped(cut_out(image, each), size) for each in objects])
            seen = normalize(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output), dim=1)
            return [COLORS[best] for best in (seen @ embedded.T).argmax(1).tolist()]


class GenEvalPort(Metric):
    """1 if the detector finds the objects that the prompt names, in their number, colours and positions, otherwise 0.

    As in the released code (af4902f), whose detector is the same architecture in mmdetection 2 with other weights: a
    value is not a GenEval score. The objects, and those that must not be there, are the columns `include` and `exclude`
    of evaluation_metadata.jsonl. GenEval's overall score is the mean over the categories.

    Args:
        argument: MASK2FORMER+CLIP, each a local folder or a hub id; nothing means the default.

    Raises:
        Unusable: as `Judge`.
    """

    declared = Column("geneval_port", "port of GenEval: 1 if all named objects are found as said", "yes/no", 0, 1)
    reads_only = "prompts with the column `include` and objects of COCO, as GenEval's evaluation_metadata.jsonl"

    def __init__(self, argument: str = ""):
        segmenter, clip = several(argument, 2)
        self.segmenter, self.clip = Segmenter(segmenter), ColorReader(clip)
        self.columns = (described(self.declared, self.segmenter, self.clip),)

    def check(self):
        self.segmenter.check()
        self.clip.check()

    def reads(self, prompt: str) -> bool:
        wanted = [*details_of(prompt).get("include", ()), *details_of(prompt).get("exclude", ())]
        return bool(wanted) and all(isinstance(w, dict) and w.get("class") in OBJECTS for w in wanted)

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float]]:
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            details = details_of(prompt)
            include, exclude = details.get("include", ()), details.get("exclude", ())
            objects = self.segmenter.find(image, COUNTING_THRESHOLD if exclude else THRESHOLD)

            def colors(name: str, of_name: list[Found], image: np.ndarray = image) -> list[str]:
                return self.clip.colors(image, of_name, name)

            found.append(float(is_correct(include, exclude, objects, colors)))
        return {"geneval_port": found}


def is_correct(
    include: Sequence[Mapping[str, Any]], exclude: Sequence[Mapping[str, Any]], objects: dict[str, list[Found]], colors
) -> bool:
    """Whether the objects are as the prompt says.

    Args:
        include: {"class", "count", "color", "position": (relation, index of an earlier entry)}; only as many objects
            count as are named, the best ones.
        exclude: {"class", "count"}: fewer objects than this are allowed.
        objects: {class: objects, the best first}.
        colors: (class, objects) to the colour of each.
    """
    matched: list[list[Found] | None] = []
    for wanted in include:
        name, count = wanted["class"], wanted["count"]
        best = objects.get(name, [])[:count]
        right = len(best) == count
        if right and wanted.get("color"):
            right = colors(name, best).count(wanted["color"]) == count
        if right and wanted.get("position"):
            relation, place = wanted["position"]
            others = matched[place]
            right = others is not None and all(
                relation in positions(one.box, other.box) for one in best for other in others
            )
        matched.append(best if right else None)
    return None not in matched and all(len(objects.get(w["class"], ())) < w["count"] for w in exclude)


def positions(first: Box, second: Box) -> set[str]:
    """Where the first box is, seen from the second: left of, right of, above, below.

    The distance of the centres, in each direction, loses `MARGIN` times the sum of the boxes' sizes. What remains must
    be more than `ALONG` of the whole distance.
    """
    boxes = np.array([first, second]).reshape(2, 2, 2)  # box, corner, direction
    offset = np.subtract(*boxes.mean(1))
    margin = MARGIN * np.abs(np.diff(boxes, axis=1)).sum((0, 1))
    rest = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(rest) < 1e-3).all():
        return set()
    x, y = rest / np.linalg.norm(offset)
    holds = {"left of": x < -ALONG, "right of": x > ALONG, "above": y < -ALONG, "below": y > ALONG}
    return {relation for relation, true in holds.items() if true}


def cut_out(image: np.ndarray, found: Found) -> np.ndarray:
    """The pixels of an object on grey, within its box."""
    left, top, right, bottom = map(round, found.box)
    on_grey = np.where(found.mask[..., None], image, np.uint8(BACKGROUND))
    return on_grey[top:bottom, left:right]
