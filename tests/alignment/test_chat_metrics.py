"""VQAScore and Soft-TIFA, compared with the probabilities of a tiny LLaVA for one image and one question at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import CHAT_WORDS, save_chat
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mi_ray.alignment.metric import check_prompts, load_metrics, measure
from mi_ray.alignment.soft_tifa import spellings
from mi_ray.inputs.prompt_sets import Prompt

PROMPTS = ["two cars", "a red car and a dog", "two cars"]
PAIRS = {"two cars": [["How many cars?", "two"], ["Are there cars?", "Yes"]], "a red car and a dog": [["Red?", "No"]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_chat(tmp_path_factory.mktemp("judges") / "chat")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


def next_word(folder: Path, image: np.ndarray, question: str) -> dict[str, float]:
    """The probability of each word as the first one of the answer."""
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    text = f"USER: <image> {question} ASSISTANT:"
    inputs = processor(text=text, images=Image.fromarray(image), return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, -1].softmax(0)
    return dict(zip(CHAT_WORDS, probabilities.tolist(), strict=True))


def test_vqa_score_is_the_probability_of_yes(folder, images):
    found = measure(metrics := load_metrics([f"vqa-score@{folder}"]), images, PROMPTS)["vqa_score"]
    expected = [
        next_word(folder, image, f'Does this figure show "{prompt}"? Please answer Yes or No.')["Yes"]
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) == 3
    (metric,) = metrics.values()
    metric.batch_size = 1
    assert measure(metrics, images, PROMPTS)["vqa_score"] == pytest.approx(found, abs=1e-5)


def test_soft_tifa_is_both_means_over_the_questions(folder, images, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "vqa_list": pairs}) for p, pairs in PAIRS.items()) + "\n")
    metrics = load_metrics([f"soft-tifa@{file}@{folder}"])
    found = measure(metrics, images, [*PROMPTS[:2], "a cat"])
    number = next_word(folder, images[0], "How many cars? Answer in one word.")
    there = next_word(folder, images[0], "Are there cars? Answer in one word.")
    red = next_word(folder, images[1], "Red? Answer in one word.")
    ps = [number["two"] + number["Two"] + number["2"], there["Yes"] + there["yes"]]
    yes = red["Yes"] + red["yes"]  # also where the file's answer is another
    assert found["soft_tifa_gm"] == [
        pytest.approx((ps[0] * ps[1]) ** 0.5, abs=1e-5),
        pytest.approx(yes, abs=1e-5),
        None,
    ]
    assert found["soft_tifa_am"] == [pytest.approx(sum(ps) / 2, abs=1e-5), pytest.approx(yes, abs=1e-5), None]
    check_prompts(metrics, PROMPTS)
    with pytest.raises(ValueError, match=r"prompts with questions: the column `vqa_list`, .* not 'a cat' \(1 of 2\)"):
        check_prompts(metrics, [PROMPTS[0], "a cat"])


def test_soft_tifa_finds_the_questions_of_a_prompt_set(folder, images, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"prompt": PROMPTS[0], "vqa_list": PAIRS[PROMPTS[0]]}))
    from_file = measure(load_metrics([f"soft-tifa@{file}@{folder}"]), images[:1], PROMPTS[:1])
    prompt = Prompt(PROMPTS[0], json.dumps({"vqa_list": PAIRS[PROMPTS[0]]}))
    metrics = load_metrics([f"soft-tifa@{folder}"])
    assert measure(metrics, images[:1], [prompt]) == from_file
    check_prompts(metrics, [prompt])
    with pytest.raises(ValueError, match=r"prompts with questions: .* not 'two cars' \(1 of 1\); set it to none"):
        check_prompts(metrics, [PROMPTS[0]])


def test_spellings_of_answers():
    assert spellings("How many cars?", "two") == ["two", "Two", "2", " two", " Two", " 2"]
    assert spellings("Is it red?", "red") == ["Yes", "yes", " Yes", " yes"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "needs a file of questions"),
        ('{"prompt": "a"}', r"cannot read line 1 of .*KeyError: 'vqa_list'"),
        ('\n{"prompt": "a", "vqa_list": [["q"]]}', r"cannot read line 2 of .*ValueError"),
        ('{"prompt": "a", "vqa_list": []}', "has no question for the prompt in line 1"),
    ],
)
def test_a_wrong_file_of_questions_gives_one_message(folder, tmp_path, content, message):
    file = tmp_path / "questions.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        load_metrics([f"soft-tifa@{file}@{folder}"])
    assert len(str(refused.value).splitlines()) == 1
