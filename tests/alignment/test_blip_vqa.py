"""BLIP-VQA, compared with the released recipe written out for one image and one question at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import BLIP_WORDS, save_blip
from transformers import BlipForQuestionAnswering

from mi_ray.alignment import blip_vqa, english
from mi_ray.alignment.metric import Unusable, check_prompts, load_metrics, measure

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red circle", "a blue square left of a green star", "A Man (old) on the left of a dog", "sleeping"]
CHUNKS = {PROMPTS[2]: ["A Man (old)", "the left", "a dog"], PROMPTS[3]: []}
QUESTIONS = [["a red circle?"], ["a blue square?", "a green star?"], ["a man old?", "a dog?"], []]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_blip(tmp_path_factory.mktemp("judges") / "blip")


@pytest.fixture
def metric(folder, monkeypatch) -> blip_vqa.BlipVqa:
    monkeypatch.setattr(blip_vqa, "SIZE", 24)  # the model was made for 16: its positions are interpolated
    monkeypatch.setattr(blip_vqa, "spacy_chunks", lambda: CHUNKS.get)
    return load_metrics([f"blip-vqa@{folder}"])[f"blip-vqa@{folder}"]


def p_yes(model: BlipForQuestionAnswering, image: np.ndarray, question: str) -> float:
    """The first token after [DEC], as a share of yes and no, in the released code's order."""
    pixels = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC))
    pixels = ((torch.tensor(pixels) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
    start, ask = BLIP_WORDS.index("[DEC]"), BLIP_WORDS.index("[ENC]")
    words = question.replace("?", " ?").split()
    ids = torch.tensor([[ask, *(BLIP_WORDS.index(word) for word in words), BLIP_WORDS.index("[SEP]")]])
    with torch.no_grad():
        seen = model.vision_model(pixels.float(), interpolate_pos_encoding=True)[0]
        asked = model.text_encoder(input_ids=ids, encoder_hidden_states=seen)[0]
        logits = model.text_decoder(input_ids=torch.tensor([[start]]), encoder_hidden_states=asked).logits[0, 0]
    probabilities = logits.softmax(0)
    yes, no = (float(probabilities[BLIP_WORDS.index(word)]) for word in ("yes", "no"))
    return yes / (yes + no)


def test_blip_vqa_is_the_product_of_rounded_shares_of_yes(metric, folder):
    images = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), np.uint8)
    assert [metric.questions(prompt) for prompt in PROMPTS] == QUESTIONS
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    shares = [[p_yes(model, image, q) for q in asked] for image, asked in zip(images, QUESTIONS, strict=True)]
    assert np.std([p for ps in shares for p in ps]) > 0.01  # the images and questions matter
    expected = [np.prod([round(p, 4) for p in ps]) for ps in shares[:3]]
    found = measure({"blip-vqa": metric}, images, PROMPTS)["blip_vqa"]
    assert found[:3] == pytest.approx(expected, abs=1.1e-4)
    assert found[3] is None  # no noun phrase
    assert all(abs(value * 1e4 - round(value * 1e4)) < 1e-3 for value in found[:3])  # four decimals
    metric.batch_size = 2
    assert measure({"blip-vqa": metric}, images, PROMPTS)["blip_vqa"][:3] == pytest.approx(found[:3], abs=1.1e-4)


def test_at_most_eight_chunks_count(metric):
    metric.find_chunks = lambda prompt: ["the top", *prompt.split(), "top"]
    assert len(metric.questions("a b c d e f g h i j")) == 8
    assert metric.questions("x") == ["the top?", "x?"]


def test_a_missing_parser_is_told_before_a_run(folder, monkeypatch):
    monkeypatch.setattr(english, "PARSER", "en_core_web_none")
    metrics = load_metrics([f"blip-vqa@{folder}"])
    check_prompts(metrics, PROMPTS[:2])  # the grammar parses these
    with pytest.raises(Unusable, match=r"needs the spaCy model en_core_web_none.*spacy download"):
        check_prompts(metrics, PROMPTS)
