"""A judge that does not fit is refused before a run starts: in one message, with its name and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_detectors import save_dinov2, save_grounding_dino, save_mask2former, save_owlv2
from tiny_judges import OpenClip, clip_config, save_blip, save_chat, save_clip

from mi_ray.alignment.encoder import check_encoder
from mi_ray.alignment.hps import CHECKPOINT
from mi_ray.alignment.metric import Unusable, check_prompts, load_metrics
from mi_ray.shapes.model import build_tokenizer

PROMPTS: list[str] = []  # the metrics are checked before the first prompt


def save_hps(folder: Path):
    tokenizer = build_tokenizer()
    clip_config(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save({"state_dict": OpenClip(clip_config(tokenizer)).state_dict()}, folder / CHECKPOINT)


SAVERS = {
    "blip": save_blip,
    "chat": save_chat,
    "clip": save_clip,
    "dino": save_grounding_dino,
    "hps": save_hps,
    "owl": save_owlv2,
    "segmenter": save_mask2former,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder with one sound model of each kind."""
    place = tmp_path_factory.mktemp("judges")
    for name, save in SAVERS.items():
        (place / name).mkdir()
        save(place / name)
    return place


def without(*parts: str) -> Callable[[Path], None]:
    """A change of a folder: it loses all files that have one of these texts in their name."""

    def change(folder: Path):
        for file in [file for file in folder.iterdir() if any(part in file.name for part in parts)]:
            file.unlink()

    return change


def three_classes(folder: Path):
    shutil.rmtree(folder)
    save_mask2former(folder, labels=3)


def no_layers(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3  # the weights have two
    (folder / "config.json").write_text(json.dumps(config))


def cut(folder: Path):
    whole = (folder / CHECKPOINT).read_bytes()
    (folder / CHECKPOINT).write_bytes(whole[: len(whole) // 2])


def another_width(folder: Path):
    weights = torch.load(folder / CHECKPOINT)["state_dict"]
    torch.save(weights | {"visual.proj": torch.zeros(3, 5)}, folder / CHECKPOINT)


def another_layout(folder: Path):
    torch.save({"unknown": torch.zeros(1)}, folder / CHECKPOINT)


NO_WORDS = "needs a tokenizer, and that of '{}' has no vocabulary: complete its files$"
NO_PROCESSOR = "cannot load the processor of '{}': complete its files "
NO_CHAT = "needs a chat model, and '{}' has no chat template: give another$"
CASES = [  # metric with its models, the model that is changed, how, the message
    ("clip-score@clip", "clip", without("tokenizer"), NO_WORDS),
    ("pick-score@clip", "clip", without("tokenizer"), NO_WORDS),
    ("hps-v2.1@hps", "hps", without("tokenizer"), NO_WORDS),
    ("hps-v2.1@hps", "hps", cut, r"cannot use HPS_v2\.1_compressed\.pt of the model '{}' \(.*\): fetch it again"),
    ("hps-v2.1@hps", "hps", another_width, r"of the model '{}' \(.*size mismatch for visual_projection.*\): fetch"),
    ("hps-v2.1@hps", "hps", another_layout, r"of the model '{}' \(.*unknown is not a weight of open_clip's CLIP"),
    ("hps-v2.1@hps", "hps", no_layers, r"of the model '{}' \(.*Missing key.*layers\.2\..*\): fetch it again"),
    ("blip-vqa@blip", "blip", without("tokenizer"), NO_WORDS),
    ("vqa-score@chat", "chat", without("processor", "tokenizer"), NO_PROCESSOR),
    ("vqa-score@chat", "chat", without("chat_template"), NO_CHAT),
    ("soft-tifa@chat", "chat", without("processor_config"), NO_PROCESSOR),
    ("spatial-proxy@owl", "owl", without("tokenizer"), NO_WORDS),
    ("numeracy-proxy@dino", "dino", without("tokenizer"), NO_WORDS),
    ("3-in-1-proxy@owl+blip+clip", "blip", without("tokenizer"), NO_WORDS),
    ("geneval-port@segmenter+clip", "clip", without("tokenizer"), NO_WORDS),
    ("geneval-port@segmenter+clip", "segmenter", three_classes, "COCO's 80 classes, but '{}' has 3: give another$"),
]


def with_folders(name: str, place: Path) -> str:
    metric, models = name.split("@")
    return f"{metric}@{'+'.join(str(place / model) for model in models.split('+'))}"


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES}))
def test_a_sound_judge_is_accepted(sound, name):
    check_prompts(load_metrics([with_folders(name, sound)]), PROMPTS)


@pytest.mark.parametrize(("name", "changed", "change", "message"), CASES)
def test_a_judge_that_does_not_fit_is_refused_before_a_run(sound, tmp_path, name, changed, change, message):
    for model in name.split("@")[1].split("+"):
        shutil.copytree(sound / model, tmp_path / model)
    change(tmp_path / changed)
    name = with_folders(name, tmp_path)
    with pytest.raises(ValueError, match=message.format(tmp_path / changed)) as refused:
        check_prompts(load_metrics([name]), PROMPTS)
    assert str(refused.value).startswith(f"'{name}' ")
    assert len(str(refused.value).splitlines()) == 1


def test_an_encoder_without_its_image_processor_is_refused_before_a_run(tmp_path):
    save_dinov2(tmp_path)
    check_encoder(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(Unusable, match=r"cannot load the image processor of .*: complete its files"):
        check_encoder(str(tmp_path))
