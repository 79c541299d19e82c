"""The port of GenEval: hand-computed cases of its rules, and its objects and colours by tiny models."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import save_mask2former
from tiny_judges import save_clip
from torch.nn.functional import interpolate, normalize
from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

from mi_ray.alignment import geneval_port
from mi_ray.alignment.geneval_port import COLORS, OBJECTS, ColorReader, Found, Segmenter, cut_out, is_correct, positions
from mi_ray.alignment.metric import Unusable, check_prompts, load_metrics, measure
from mi_ray.inputs.prompt_sets import Prompt

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
MASK = np.zeros((24, 40), bool)
A, B = (0.0, 0.0, 10.0, 10.0), (100.0, 0.0, 110.0, 10.0)


def objects(**boxes) -> dict[str, list[Found]]:
    return {name: [Found(box, MASK) for box in of_name] for name, of_name in boxes.items()}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (A, B, {"left of"}),
        (B, A, {"right of"}),
        (A, (0, 100, 10, 110), {"above"}),
        ((0, 100, 10, 110), A, {"below"}),
        (A, (100, 100, 110, 110), {"left of", "above"}),  # (100 - 2) / 141 of the way in both directions
        (A, (100, 55, 110, 65), {"left of"}),  # 53 / 114 is not more than a half
        (A, (1, 1, 11, 11), set()),  # within a tenth of both sizes
        ((0, 0, 100, 10), (30, 0, 130, 10), set()),  # 30 - 20 is a third of 30
    ],
)
def test_positions(first, second, expected):
    assert positions(first, second) == expected


def test_objects_and_their_numbers():
    two = [{"class": "dog", "count": 2}]
    assert is_correct(two, [], objects(dog=[A, B]), None)
    assert not is_correct(two, [], objects(dog=[A]), None)
    assert is_correct(two, [], objects(dog=[A, B, A]), None)  # more are allowed, unless they are excluded
    assert not is_correct(two, [{"class": "dog", "count": 3}], objects(dog=[A, B, A]), None)


def test_only_the_best_objects_have_their_colour_and_position_checked():
    red = [{"class": "dog", "count": 1, "color": "red", "position": None}]
    asked = []

    def colors(name, found):
        asked.append((name, [each.box for each in found]))
        return ["red" if each.box == A else "blue" for each in found]

    assert is_correct(red, [], objects(dog=[A, B]), colors)
    assert not is_correct(red, [], objects(dog=[B, A]), colors)
    assert asked == [("dog", [A]), ("dog", [B])]
    above = [{"class": "tv", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}]
    assert is_correct(above, [], objects(tv=[A], cat=[B]), None)
    assert not is_correct(above, [], objects(tv=[B], cat=[A]), None)
    blue_tv = [{**above[0], "color": "blue"}, above[1]]
    assert not is_correct(blue_tv, [], objects(tv=[A], cat=[B]), colors)  # no target of this colour


def test_a_cut_out_object_is_on_grey():
    mask = MASK.copy()
    mask[5:8, 10:14] = True
    cut = cut_out(IMAGE, Found((10.0, 4.0, 14.0, 8.0), mask))
    assert (cut[0] == 0x99).all()
    assert (cut[1:] == IMAGE[5:8, 10:14]).all()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(geneval_port, "SHORT_SIDE", 40)  # 40 x 67, padded to 64 x 96


def test_objects_by_mask2former(tmp_path, small):
    """A score is the probability of the class times the mean probability within the mask."""
    folder = save_mask2former(tmp_path)
    scaled = np.asarray(Image.fromarray(IMAGE).resize((67, 40), Image.Resampling.BILINEAR)) / 255
    pixels = np.zeros((64, 96, 3))
    pixels[:40, :67] = (scaled - (0.485, 0.456, 0.406)) / np.array((0.229, 0.224, 0.225))
    with torch.no_grad():
        output = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()(
            pixel_values=torch.tensor(pixels).permute(2, 0, 1)[None].float()
        )
    masks = interpolate(output.masks_queries_logits, size=(64, 96), mode="bilinear")[..., :40, :67]
    masks = interpolate(masks, size=(24, 40), mode="bilinear")[0].numpy()
    shares = output.class_queries_logits[0].softmax(1)[:, :-1].numpy()
    rows = []
    for query, label in zip(*np.unravel_index(np.argsort(-shares, axis=None)[:100], shares.shape), strict=True):
        inside = masks[query] > 0
        if inside.any():
            score = shares[query, label] * (1 / (1 + np.exp(-masks[query][inside]))).mean()
            y, x = np.nonzero(inside)
            rows.append((score, OBJECTS[label], (x.min(), y.min(), x.max() + 1, y.max() + 1), inside))
    threshold = float(np.median([row[0] for row in rows]))
    found = Segmenter(str(folder)).find(IMAGE, threshold)
    for name in OBJECTS:
        expected = sorted((row for row in rows if row[1] == name and row[0] > threshold), key=lambda row: -row[0])[:16]
        assert [each.box for each in found.get(name, [])] == [row[2] for row in expected]
        for each, row in zip(found.get(name, []), expected, strict=True):
            assert (each.mask == row[3]).all()
    assert 1 < len(found) < len({row[1] for row in rows})


def test_colours_by_clip(tmp_path):
    """The nearest of ten colours, each the normalised mean of three normalised texts."""
    save_clip(tmp_path)
    mask = np.ones((24, 40), bool)
    boxes = [(0.0, 0.0, 16.0, 16.0), (20.0, 4.0, 36.0, 20.0)]
    clip = CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    best = []
    for box in boxes:
        cut = IMAGE[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] / 255
        cut = (cut - (0.48145466, 0.4578275, 0.40821073)) / np.array((0.26862954, 0.26130258, 0.27577711))
        pixels, cosines = torch.tensor(cut).permute(2, 0, 1)[None].float(), []
        for color in COLORS:
            texts = [f"a photo of a {color} star", f"a photo of a {color}-colored star", f"a photo of a {color} object"]
            with torch.no_grad():
                tokens = [tokenizer(text, truncation=True, max_length=12, return_tensors="pt") for text in texts]
                each = [clip(**ids, pixel_values=pixels) for ids in tokens]
            mean = torch.stack([normalize(output.text_embeds[0], dim=0) for output in each]).mean(0)
            cosines.append(float(normalize(mean, dim=0) @ normalize(each[0].image_embeds[0], dim=0)))
        best.append(COLORS[int(np.argmax(cosines))])
    assert ColorReader(str(tmp_path)).colors(IMAGE, [Found(box, mask) for box in boxes], "star") == best


def test_prompts_counting_threshold_and_columns(tmp_path, monkeypatch):
    save_mask2former(tmp_path / "m")
    save_clip(tmp_path / "c")
    name = f"geneval-port@{tmp_path}/m+{tmp_path}/c"
    metrics, asked = load_metrics([name]), []

    def find(self, image, threshold):
        asked.append(threshold)
        return objects(dog=[A, B])

    monkeypatch.setattr(Segmenter, "find", find)
    prompts = [
        Prompt("two dogs", '{"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}'),
        Prompt("a cat", '{"include": [{"class": "cat", "count": 1}]}'),
    ]
    assert measure(metrics, np.stack([IMAGE] * 2), prompts) == {"geneval_port": [1, 0]}
    assert asked == [0.9, 0.3]
    check_prompts(metrics, prompts)
    dragon = Prompt("a dragon", '{"include": [{"class": "dragon", "count": 1}]}')
    with pytest.raises(ValueError, match=r"`include` and objects of COCO, .* not 'a dog', 'a dragon' \(2 of 4\)"):
        check_prompts(metrics, [*prompts, "a dog", dragon])
    (column,) = metrics[name].columns
    assert column.model == f"{tmp_path}/m; {tmp_path}/c"
    assert column.template.startswith("a photo of a {c} {}; ")
    assert len(column.revision.split("; ")) == 2
    monkeypatch.undo()
    save_mask2former(tmp_path / "other", labels=3)
    with pytest.raises(Unusable, match=r"needs a model with COCO's 80 classes, but .* has 3"):
        Segmenter(str(tmp_path / "other")).find(IMAGE, 0.3)
