"""The judges of the embedded world: their training examples are true, and the metrics load and run the shipped ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mi_ray.alignment.metric import check_prompts, load_metrics, measure
from mi_ray.shapes import judges
from mi_ray.shapes.grammar import CATEGORIES, ObjectSpec, draw_scene, is_held_out, noun_phrase, parse
from mi_ray.shapes.oracle import read, score
from mi_ray.shapes.scenes import COLORS, IMAGE_SIZE, render

SHIPPED = ("blip-vqa@shapes", "clip-score@shapes")


def test_captions_of_a_group_are_exact_for_their_own_scene_as_the_oracle_says():
    images, groups, truth = judges.draw_pool(len(CATEGORIES), seed=3)
    assert images.shape == (6, judges.GROUP, IMAGE_SIZE, IMAGE_SIZE, 3)
    for of_group, group, exact in zip(images, groups, truth, strict=True):
        assert exact.diagonal().all()
        assert not any(is_held_out(example.spec) for example in group)
        assert [parse(example.caption) for example in group] == [example.spec for example in group]
        found = [[score(image, example.caption).exact for example in group] for image in of_group]
        np.testing.assert_array_equal(exact, found)
    again = judges.draw_pool(2, seed=3)[0]
    np.testing.assert_array_equal(again, images[:2])  # a group depends only on the seed and its number


def test_answers_are_those_of_the_oracle_and_about_half_are_yes():
    rng, answers = np.random.default_rng(0), []
    for n in range(24):
        scene = draw_scene(judges.sample_spec(CATEGORIES[n % 6], rng), rng, unseen=True)
        found = read(render(scene))
        for _ in range(6):
            question = judges.draw_question(scene, rng)
            spec = parse(question.text.removesuffix("?"))
            (asked,) = spec.objects
            number = sum(
                all(getattr(each, key) == value for key in judges.VALUES if (value := getattr(asked, key)))
                for each in found
            )
            assert len(question.shown) == number
            assert question.answer == (number == asked.count if spec.numeric else number > 0), question
            answers.append(question.answer)
    assert 0.35 < np.mean(answers) < 0.65


def test_a_shifted_image_shows_the_shifted_scene():
    rng = np.random.default_rng(1)
    for category in CATEGORIES:
        example = judges.draw_group(category, rng)[0]
        image, scene = judges.shifted(example, render(example.scene), rng)
        assert np.abs(image.astype(int) - render(tuple(scene))).max() <= 3  # rounding of edges
        owners = judges.patch_owners(scene)
        labels = judges.patch_labels(scene, owners)
        assert not labels[owners < 0].any()
        for number, each in enumerate(scene):
            assert (owners == number).any()
            for patch in np.flatnonzero(owners == number):
                assert abs(patch % 8 * 8 + 4 - each.x) <= each.size / 2
                assert abs(patch // 8 * 8 + 4 - each.y) <= each.size / 2
                named = [values[i - 1] for i, values in zip(labels[patch, :3], judges.VALUES.values(), strict=True)]
                assert named == [each.color, each.shape, each.texture]
                kinds = [(o.shape, o.color, o.texture) for o in scene]
                same = [sum(k[:n] == kinds[number][:n] for k in kinds) for n in (1, 2, 3)]
                assert labels[patch, 3:].tolist() == same


def test_the_enlarged_judge_reads_480_pixels_as_the_small_one_reads_the_scene():
    tokenizer = judges.build_tokenizer()
    torch.manual_seed(0)
    small = judges.build_blip(tokenizer).eval()
    large = judges.enlarged(small, tokenizer).eval()
    image = render(draw_scene(parse("a red striped star left of a blue dotted circle"), np.random.default_rng(0)))
    shown = Image.fromarray(image).resize((480, 480), Image.Resampling.BICUBIC)
    x, big = (torch.tensor(np.array(each)).permute(2, 0, 1)[None] / 127.5 - 1 for each in (image, shown))
    axis = judges.seen_pixels()
    with torch.inference_mode():
        expected = small.vision_model(pixel_values=axis @ x @ axis.T).last_hidden_state
        found = large.vision_model(pixel_values=big, interpolate_pos_encoding=True).last_hidden_state
    assert float((found - expected).abs().max()) < 0.02  # the enlarged image is rounded and cut at white
    assert float(expected.std()) > 0.5


def test_the_shipped_judges_prefer_the_right_image_and_are_small():
    """Through the metrics, as any other judge: of two images that differ in a color, mostly the right one."""
    rng, prompts, images = np.random.default_rng(0), [], ([], [])
    for color, other in zip(COLORS, (*COLORS[3:], *COLORS[:3]), strict=True):
        for shape in ("circle", "star", "cross"):
            prompts.append(noun_phrase(ObjectSpec(shape, color), False))
            for made, shown in zip(images, (color, other), strict=True):
                made.append(render(draw_scene(parse(noun_phrase(ObjectSpec(shape, shown), False)), rng, unseen=True)))
    metrics = load_metrics(SHIPPED)
    check_prompts(metrics, prompts)
    better, worse = (measure(metrics, np.stack(made), prompts) for made in images)
    for column in ("blip_vqa", "clip_score"):
        assert np.mean(np.array(better[column]) > np.array(worse[column])) > 0.9, column
    for metric in metrics.values():
        assert metric.columns[0].model == "shapes"  # no path of this machine
        assert sum(path.stat().st_size for path in metric.folder.iterdir()) < 8 * 2**20


def test_the_shipped_blip_gives_the_answers_of_the_stock_processor_and_model():
    """The processor of the folder, and generation of the first token by transformers' own forward pass."""
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForQuestionAnswering

    (metric,) = load_metrics([SHIPPED[0]]).values()
    image = render(draw_scene(parse("a red circle and a blue square"), np.random.default_rng(2)))
    questions = ["a red circle?", "a pink star?"]
    blip = BlipForQuestionAnswering.from_pretrained(metric.folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(metric.folder)(questions, return_tensors="pt")
    tokens["input_ids"][:, 0] = blip.config.text_config.bos_token_id + 1
    pixels = AutoImageProcessor.from_pretrained(metric.folder)(images=[image] * 2, return_tensors="pt")["pixel_values"]
    start = torch.full((2, 1), blip.config.text_config.bos_token_id)
    with torch.inference_mode():
        seen = blip.vision_model(pixels).last_hidden_state
        asked = blip.text_encoder(**tokens, encoder_hidden_states=seen).last_hidden_state
        answer = blip.text_decoder(start, encoder_hidden_states=asked).logits[:, 0]
    yes_no = metric.p_yes([image] * 2, questions)
    ids = metric.tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert yes_no == pytest.approx(answer[:, ids].softmax(1)[:, 0].tolist(), abs=1e-3)
    assert yes_no[0] > 0.5 > yes_no[1]


def test_no_attribute_of_a_scene_is_lost_by_a_shift():
    example = judges.draw_group("complex", np.random.default_rng(5))[0]
    _, scene = judges.shifted(example, render(example.scene), np.random.default_rng(6))
    assert [replace(each, x=0, y=0) for each in scene] == [replace(each, x=0, y=0) for each in example.scene]
    assert judges.is_exact(scene, example.spec)
