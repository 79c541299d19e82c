"""T2I-CompBench's 2D-spatial, numeracy and 3-in-1 over a detector: hand-computed cases, and tiny models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import WORDS, save_grounding_dino, save_owlv2
from transformers import AutoTokenizer, GroundingDinoForObjectDetection, Owlv2ForObjectDetection

from mi_ray.alignment import detector, three_in_one_proxy
from mi_ray.alignment.detector import Detection, overlap
from mi_ray.alignment.metric import Unusable, check_prompts, load_metrics, measure
from mi_ray.alignment.numeracy_proxy import NumeracyProxy, counted, merged, numeracy_score
from mi_ray.alignment.spatial_proxy import SpatialProxy, relation_score, spatial_score
from mi_ray.alignment.three_in_one_proxy import complex_objects
from mi_ray.inputs.prompt_sets import Prompt

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def box(x: float, y: float, side: float = 20) -> tuple[float, ...]:
    """A square box by its centre."""
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


# ------------------------------------------------------------------------------------------ 2D-spatial
@pytest.mark.parametrize(
    ("relation", "first", "second", "score"),
    [
        ("on the left of", box(100, 100), box(200, 150), 1),
        ("on the left of", box(100, 100), box(150, 200), 0),  # the other direction is larger
        ("on the left of", box(200, 100), box(100, 100), 0),
        ("on the right of", box(200, 100), box(100, 150), 1),
        ("on the top of", box(100, 100), box(120, 200), 1),
        ("on the bottom of", box(100, 200), box(120, 100), 1),
        ("on top of", box(100, 100), box(100, 200), 0),  # only "on the top of" has a score
        ("on the left of", box(100, 100, 40), box(110, 100, 40), 0.1 / (30 * 40 / (2 * 1600 - 30 * 40))),
        ("next to", box(0, 0), box(149, 400), 1),  # near in one direction is enough
        ("near", box(0, 0), box(150, 400), 150 / 400),
        ("on side of", box(0, 0), box(300, -200), 0.5),
        (None, box(0, 0), box(1, 0), 0),
    ],
)
def test_relations(relation, first, second, score):
    assert relation_score(relation, first, second) == pytest.approx(score)


def test_a_spatial_score_below_a_half_counts_as_zero():
    left, right = Detection(box(100, 100), 0.8), Detection(box(200, 100), 0.6)
    assert spatial_score("on the left of", left, right, (479, 479)) == pytest.approx(0.35 + 0.5)
    assert spatial_score("on the right of", left, right, (479, 479)) == 0  # 0.35
    assert spatial_score("on the right of", left._replace(score=1), right._replace(score=1), (479, 479)) == 0.5
    assert spatial_score("next to", left, None, (479, 479)) == 0  # 0.2


@pytest.mark.parametrize(("size", "near"), [((479, 479), 140), ((958, 958), 280), ((64, 64), 18), ((240, 480), 140)])
def test_the_distance_is_measured_in_an_image_of_479_pixels(size, near):
    """150 pixels are 150 of 479 of the short side, but of 480 of the long side if it would be longer."""

    def score(distance: float) -> float:
        far = [Detection(box(0, 0), 1), Detection(box(distance, distance), 1)]
        return spatial_score("next to", *far, size)

    assert score(near) == 1
    assert score(near * 1.2) < 1


def test_prompts_of_2d_spatial(tmp_path, monkeypatch):
    metric = SpatialProxy(str(save_owlv2(tmp_path)))
    assert metric.question("a girl on the top of a frog") == ("on the top of", "girl", "frog")
    assert not metric.reads("a red circle")
    found = {"person": [Detection((0, 10, 10, 20), 0.9)], "lamp": [Detection((12, 10, 22, 20), 0.5)], "frog": []}
    monkeypatch.setattr(SpatialProxy, "detect", lambda self, image, names: {name: found[name] for name in names})
    prompts = ["a man on the left of a lamp", "a red circle", "a boy next to a frog", "a lamp on the left of a woman"]
    values = measure({"s": metric}, np.stack([IMAGE] * 4), prompts)["spatial_proxy"]
    assert values == [pytest.approx(0.25 * 1.4 + 0.5), None, 0, 0]
    check_prompts({"s": metric}, prompts)  # one without a relation has no value
    with pytest.raises(ValueError, match=r"the s reads only prompts with a relation such as `next to` .*\(1 of 1\)"):
        check_prompts({"s": metric}, prompts[1:2])


# ------------------------------------------------------------------------------------------ numeracy
def test_objects_with_a_number():
    assert counted("four pears, four desks, three paddles and two rabbits") == [
        ("pear", 4),
        ("desk", 4),
        ("paddle", 3),
        ("rabbit", 2),
    ]
    assert counted("a chicken, one vase and a dog gathered for a meeting") == [("chicken", 1), ("vase", 1), ("dog", 1)]
    assert counted("two sheep and six goldfish") == [("sheep", 2), ("goldfish", 6)]
    assert counted("two red cars") == []  # the word after the number is no plural
    assert counted("an old house") == [("old", 1)]


def test_numeracy_counts_half_for_an_object_and_half_for_its_number():
    near = [(0, 0, 100, 100), (1, 1, 100, 100), (200, 0, 220, 20), (205, 5, 210, 10)]  # two pairs are one each
    assert merged(near) == [near[0], near[2]]
    assert numeracy_score([("cat", 2), ("dog", 1)], {"cat": near, "dog": []}) == 0.5
    assert numeracy_score([("cat", 3), ("dog", 1)], {"cat": near, "dog": near[:1]}) == 0.25 + 0.5
    apart = [(0, 0, 99, 99), (0, 6, 99, 105)]  # intersection 9400 of 10600, and of 10000: 0.94 is contained
    assert merged(apart) == apart[:1]
    assert merged([(0, 0, 99, 99), (0, 11, 99, 110)]) == [(0, 0, 99, 99), (0, 11, 99, 110)]  # 0.89


def test_numeracy_asks_the_detector_for_singular_names(tmp_path, monkeypatch):
    metric, asked = NumeracyProxy(str(save_owlv2(tmp_path))), []

    def detect(self, image, names):
        asked.append(list(names))
        return {name: [Detection((0, 0, 9, 9), 0.9), Detection((20, 0, 29, 9), 0.8)] for name in names}

    monkeypatch.setattr(NumeracyProxy, "detect", detect)
    values = measure({"n": metric}, np.stack([IMAGE] * 2), ["two ships and three women", "a red one"])
    assert asked[0] == ["boat", "person"]
    assert values["numeracy_proxy"][0] == 0.75


# ------------------------------------------------------------------------------------------ 3-in-1
class Doc(list):
    """A parsed prompt: words with their parts of speech."""

    def __init__(self, *words: str):
        super().__init__(SimpleNamespace(text=w, pos_=p) for w, p in (word.split("/") for word in words))

    def __getitem__(self, place):
        part = super().__getitem__(place)
        if isinstance(place, slice):
            made = Doc()
            made.extend(part)
            return made
        return part

    @property
    def text(self) -> str:
        return " ".join(token.text for token in self)


HAT = Doc(
    "The/DET", "red/ADJ", "hat/NOUN", "sat/VERB", "next/ADV", "to/ADP", "the/DET", "brown/ADJ", "Tom/PROPN", "rack/NOUN"
)


def test_objects_of_a_complex_prompt_are_beside_the_relation():
    assert complex_objects(HAT) == ("hat", "rack")
    assert complex_objects(Doc("A/DET", "hat/NOUN", "near/ADP", "Big/PROPN", "Ben/PROPN", "today/ADV")) == (
        "hat",
        "Ben",
    )
    assert complex_objects(Doc("A/DET", "hat/NOUN", "on/ADP", "a/DET", "rack/NOUN")) == (None, None)


def test_3_in_1_averages_what_the_prompt_has(monkeypatch):
    metric = object.__new__(three_in_one_proxy.ThreeInOneProxy)
    seen = []

    def part(column: str, values: list[float | None]) -> SimpleNamespace:
        def measure(images, prompts):
            seen.append((column, list(prompts)))
            return {column: values[: len(prompts)]}

        return SimpleNamespace(measure=measure, check=lambda: None)

    metric.blip = part("blip_vqa", [0.6, 0.4, None])
    metric.spatial = part("spatial_proxy", [0.9, 0.0, None])
    metric.clip = part("clip_cosine", [0.1, 0.2, 0.3])
    metric.columns = (metric.declared,)
    monkeypatch.setattr(three_in_one_proxy, "load_parser", lambda name: lambda prompt: HAT)
    kinds = ("spatial", "spatialaction", "action")
    prompts = [Prompt("a hat", f'{{"relations": "{kind}"}}') for kind in kinds]
    prompts.insert(1, "a hat")
    found = measure({"3": metric}, np.stack([IMAGE] * 4), prompts)["three_in_one_proxy"]
    assert found == [(0.6 + 0.9) / 2, None, pytest.approx((0.4 + 0.0 + 0.2) / 3), pytest.approx((1 + 0.3) / 2)]
    assert dict(seen)["clip_cosine"] == ["The hat sat next to the Tom rack"] * 3  # without adjectives
    with pytest.raises(ValueError, match=r"only prompts with the column `relations`: .*\(1 of 1\); set it to none"):
        check_prompts({"3": metric}, ["a hat"])


# ------------------------------------------------------------------------------------------ detectors
def pixels_of(image: np.ndarray, size: tuple[int, int], mean, std) -> torch.Tensor:
    scaled = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)) / 255
    return torch.tensor((scaled - np.array(mean)) / np.array(std)).permute(2, 0, 1)[None].float()


def without_repeats(rows: list[tuple[float, tuple[float, ...]]], threshold: float) -> list[tuple[float, tuple]]:
    kept = []
    for score, corners in sorted(rows, key=lambda row: -row[0]):
        if score > threshold and all(overlap(corners, other) <= 0.5 for _, other in kept):
            kept.append((score, corners))
    return kept


def corners_of(boxes: torch.Tensor, width: int, height: int) -> list[tuple[float, ...]]:
    scale = (width, height, width, height)
    return [tuple(v * s for v, s in zip((x - w / 2, y - h / 2, x + w / 2, y + h / 2), scale, strict=True))
            for x, y, w, h in boxes.tolist()]  # fmt: skip


def check_found(found: list[Detection], expected: list[tuple[float, tuple]]):
    assert [d.score for d in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    for detection, (_, corners) in zip(found, expected, strict=True):
        assert detection.box == pytest.approx(corners, abs=1e-2)


def test_owlv2_finds_what_its_raw_outputs_say(tmp_path):
    """Padded to a square in black; a box has its most probable name; of overlapping boxes the best remains."""
    folder = save_owlv2(tmp_path)
    square = np.zeros((40, 40, 3), np.uint8)
    square[:24] = IMAGE
    tokens = AutoTokenizer.from_pretrained(folder)(
        ["a photo of a circle", "a photo of a star"], padding="max_length", max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        output = Owlv2ForObjectDetection.from_pretrained(folder).eval()(
            pixel_values=pixels_of(square, (32, 32), *CLIP), **tokens
        )
    probabilities, corners = output.logits[0].sigmoid(), corners_of(output.pred_boxes[0], 40, 40)
    found = SpatialProxy(str(folder)).detect(IMAGE, ["circle", "star"])
    assert all(found.values())
    for index, name in enumerate(("circle", "star")):
        rows = [(float(p[index]), c) for p, c in zip(probabilities, corners, strict=True) if p.argmax() == index]
        check_found(found[name], without_repeats(rows, 0.1))


def test_grounding_dino_is_asked_for_one_name_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(detector, "SHORT_SIDE", 48)
    folder = save_grounding_dino(tmp_path)
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = SpatialProxy(str(folder)).detect(IMAGE, ["Cat", "lamp"])
    for name in ("Cat", "lamp"):
        ids = torch.tensor([[2, WORDS.index(name.lower()), WORDS.index("."), 3]])
        with torch.no_grad():
            output = model(pixel_values=pixels_of(IMAGE, (48, 80), mean, std), input_ids=ids)
        scores = output.logits[0].sigmoid().max(1).values.tolist()
        rows = list(zip(scores, corners_of(output.pred_boxes[0], 40, 24), strict=True))
        check_found(found[name], without_repeats(rows, 0.35))


def test_columns_of_a_detector_name_the_model_and_its_text(tmp_path):
    (metric,) = load_metrics([f"numeracy-proxy@{save_grounding_dino(tmp_path)}"]).values()
    (column,) = metric.columns
    assert (column.model, column.template) == (str(tmp_path), "{}.")
    assert "proxy" in column.name
    assert column.library.startswith("transformers ")
    with pytest.raises(Unusable, match=r"takes 3 models, but .* names 4"):
        three_in_one_proxy.ThreeInOneProxy("a+b+c+d")
