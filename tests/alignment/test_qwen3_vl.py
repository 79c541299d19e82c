"""vqa-score and soft-tifa by the class that they name: a tiny random Qwen3-VL, and the same model called by hand."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from mi_ray.alignment.chat_judge import ChatJudge
from mi_ray.alignment.metric import check_prompts, load_metrics, measure

PROMPTS = ["a red circle", "there is a blue striped square and a star", "three hearts"]
SHOWN = [f'Does this figure show "{prompt}"? Please answer Yes or No.' for prompt in PROMPTS]
ASKED = ["Is there a red circle? Answer in one word.", "How many hearts are there? Answer in one word."]
SPECIAL = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|> user {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %} <|im_end|> "
    "{% endfor %}<|im_start|> assistant"
)
ANSWERS = ["Yes", "yes", "No", "no", "two", "Two", "2", "three", "Three", "3"]
WORDS = ["<pad>", "<unk>", *SPECIAL.values(), "<|im_start|>", "<|im_end|>", "user", "assistant", *ANSWERS]
WORDS = list(dict.fromkeys([*WORDS, *" ".join(SHOWN + ASKED).split()]))
PATCH = 4  # pixels; 2 x 2 patches are one token


class WithoutVideos(Qwen3VLProcessor):
    """Its part for videos needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def tokenizer() -> PreTrainedTokenizerFast:
    inside = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=SPECIAL
    )


def image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(patch_size=PATCH, size={"shortest_edge": 64, "longest_edge": 1024})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judges") / "qwen3_vl"
    both = {"hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.4}
    text = {
        **both, "vocab_size": len(WORDS), "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "max_position_embeddings": 128,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        **both, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "deepstack_visual_indexes": [0],
        "patch_size": PATCH, "num_position_embeddings": 16,
    }  # fmt: skip
    ids = {f"{name}_id": WORDS.index(word) for name, word in SPECIAL.items()}
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def images() -> np.ndarray:
    """16 x 16 pixels: four tokens."""
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


@pytest.fixture
def by_hand(monkeypatch):
    """The metrics get this processor; all else is their own."""
    made = WithoutVideos(image_processor(), tokenizer(), None, chat_template=TEMPLATE)
    monkeypatch.setattr(ChatJudge, "load_reader", lambda self: made)


def next_word(folder: Path, image: np.ndarray, question: str) -> dict[str, float]:
    """The probability of each word after the last position of one chat, without padding."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    seen = ["<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>"]
    words = ["<|im_start|>", "user", *seen, *question.split(), "<|im_end|>", "<|im_start|>", "assistant"]
    ids = torch.tensor([[WORDS.index(word) if word in WORDS else WORDS.index("<unk>") for word in words]])
    pixels = image_processor()(images=[Image.fromarray(image)], return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 4, 4]]
    marks = (ids == WORDS.index("<|image_pad|>")).int()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=marks, **pixels).logits
    return dict(zip(WORDS, logits[0, -1].softmax(0).tolist(), strict=True))


@pytest.mark.usefixtures("by_hand")
def test_vqa_score_is_the_softmax_at_the_last_position_whatever_the_batch(folder, images):
    metrics = load_metrics([f"vqa-score@{folder}"])
    check_prompts(metrics, PROMPTS)
    found = measure(metrics, images, PROMPTS)["vqa_score"]
    expected = [next_word(folder, image, text)["Yes"] for image, text in zip(images, SHOWN, strict=True)]
    (metric,) = metrics.values()
    assert type(metric.chat) is Qwen3VLForConditionalGeneration
    assert len({len(text.split()) for text in SHOWN}) > 1  # shorter texts are padded
    assert np.std(expected) > 0.1 * np.mean(expected)  # images and texts matter
    assert found == pytest.approx(expected, abs=1e-5)
    alone = [measure(metrics, images[i : i + 1], PROMPTS[i : i + 1])["vqa_score"][0] for i in range(3)]
    assert alone == pytest.approx(found, abs=1e-5)


@pytest.mark.usefixtures("by_hand")
def test_soft_tifa_asks_about_objects_and_numbers(folder, images):
    found = measure(load_metrics([f"soft-tifa@{folder}"]), images[:2], [PROMPTS[0], PROMPTS[2]])["soft_tifa_gm"]
    there, number = (next_word(folder, image, text) for image, text in zip(images[:2], ASKED, strict=True))
    expected = [there["Yes"] + there["yes"], number["three"] + number["Three"] + number["3"]]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_missing_torchvision_is_told_before_a_run(folder):
    kinds = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(kinds))
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"})
    )
    tokenizer().save_pretrained(folder)
    metrics = load_metrics([f"vqa-score@{folder}"])
    message = r"^'vqa-score@.* cannot load the processor of '.*': install the missing library \(.*[Tt]orchvision"
    with pytest.raises(ValueError, match=message) as refused:
        check_prompts(metrics, PROMPTS)
    assert len(str(refused.value).splitlines()) == 1
