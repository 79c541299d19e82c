"""Metrics of CLIP models, compared with values computed by hand from the raw outputs of the same model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_judges import OpenClip, clip_config, save_clip

from mi_ray.alignment.hps import ARCHITECTURE, CHECKPOINT
from mi_ray.alignment.judges import cropped, padded
from mi_ray.alignment.metric import Column, Unusable, check_prompts, load_metrics, measure
from mi_ray.shapes.model import build_tokenizer

PROMPTS = ["a red circle", "a blue square left of a green star", "a red circle", "two white hearts"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judges") / "clip"
    save_clip(folder)
    return folder


@pytest.fixture
def images() -> np.ndarray:
    """Images of 24 x 40 pixels."""
    return np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 24, 40, 3), np.uint8)


def by_hand(folder: Path, image: np.ndarray, ids: list[int]) -> float:
    """The cosine of one image (16, 16, 3) and the token ids of one text."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    pixels = (torch.from_numpy(image.copy()).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), pixel_values=pixels.permute(2, 0, 1)[None].float())
    image, text = output.image_embeds[0], output.text_embeds[0]
    return float(image @ text / (image.norm() * text.norm()))


def token_ids(text: str, positions: int = 12) -> list[int]:
    """CLIP's own tokenization: at most `positions` tokens, of which the last is the end token."""
    tokenizer = build_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids[: positions - 2], tokenizer.eos_token_id]


def central(image: np.ndarray) -> np.ndarray:
    """24 x 40 to 16 x 26, bicubic, then the central 16 columns."""
    return np.asarray(Image.fromarray(image).resize((26, 16), Image.Resampling.BICUBIC))[:, 5:21]


def test_clip_score_is_the_paper_s_equation_with_its_text(folder, images):
    name = f"clip-score@{folder}"
    found = measure(load_metrics([name]), images, PROMPTS)
    texts = [f"A photo depicts {prompt}" for prompt in PROMPTS]
    cosines = [by_hand(folder, central(image), token_ids(text)) for image, text in zip(images, texts, strict=True)]
    assert len(build_tokenizer()(texts[1])["input_ids"]) > 12  # this text is cut
    assert min(cosines) < 0 < max(cosines)
    assert found["clip_score"] == pytest.approx([2.5 * max(cosine, 0) for cosine in cosines], abs=1e-5)


def test_clip_cosine_is_the_cosine_of_the_prompt_itself(folder, images):
    found = measure(load_metrics([f"clip-cosine@{folder}"]), images, PROMPTS)
    cosines = [by_hand(folder, central(image), token_ids(text)) for image, text in zip(images, PROMPTS, strict=True)]
    assert min(cosines) < 0 < max(cosines)
    assert found["clip_cosine"] == pytest.approx(cosines, abs=1e-5)


def test_pick_score_is_the_cosine_times_the_logit_scale(folder, images):
    found = measure(load_metrics([f"pick-score@{folder}"]), images, PROMPTS)
    cosines = [by_hand(folder, central(image), token_ids(text)) for image, text in zip(images, PROMPTS, strict=True)]
    scale = load_file(folder / "model.safetensors")["logit_scale"].exp().item()
    assert found["pick_score"] == pytest.approx([scale * cosine for cosine in cosines], abs=1e-4)


def test_hps_reads_the_published_layout_and_pads_the_image(tmp_path, images):
    tokenizer = build_tokenizer()
    published = OpenClip(clip_config(tokenizer)).eval()
    clip_config(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save({"state_dict": published.state_dict()}, tmp_path / CHECKPOINT)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        square = np.zeros((16, 16, 3), np.uint8)  # 24 x 40 to 10 x 16, with 3 black rows above and below
        square[3:13] = np.asarray(Image.fromarray(image).resize((16, 10), Image.Resampling.BICUBIC))
        pixels = (torch.from_numpy(square).double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        with torch.no_grad():
            ids = torch.tensor([token_ids(prompt)])
            expected.append(published.cosine(pixels.permute(2, 0, 1)[None].float(), ids))
    found = measure(load_metrics([f"hps-v2.1@{tmp_path}"]), images, PROMPTS)
    assert found["hps_v21"] == pytest.approx(expected, abs=1e-5)
    torch.save({"unknown": torch.zeros(1)}, tmp_path / CHECKPOINT)
    with pytest.raises(Unusable, match="unknown is not a weight of open_clip's CLIP"):
        measure(load_metrics([f"hps-v2.1@{tmp_path}"]), images, PROMPTS)


def test_a_value_does_not_depend_on_the_batch(folder, images):
    metric = load_metrics([f"clip-score@{folder}"])[f"clip-score@{folder}"]
    whole = metric.cosines(images, PROMPTS)
    metric.batch_size = 3
    assert metric.cosines(images, PROMPTS) == pytest.approx(whole, abs=1e-5)
    alone = [metric.cosines(images[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(len(PROMPTS))]
    assert alone == pytest.approx(whole, abs=1e-5)


def test_columns_carry_model_revision_template_and_library(folder, tmp_path):
    (metric,) = load_metrics([f"clip-score@{folder}"]).values()
    (column,) = metric.columns
    assert (column.model, column.template) == (str(folder), "A photo depicts {}")
    assert column.library.startswith("transformers ")
    assert Column.from_metadata(column.name, column.as_metadata()) == column
    save_clip(tmp_path)
    again = load_metrics([f"clip-score@{tmp_path}"])[f"clip-score@{tmp_path}"].columns[0]
    assert again.revision == column.revision  # the same files in another folder
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: value * 1.5 for key, value in weights.items()}, tmp_path / "model.safetensors")
    changed = load_metrics([f"clip-score@{tmp_path}"])[f"clip-score@{tmp_path}"].columns[0]
    assert changed.revision != column.revision


def test_cropped_and_padded_keep_the_proportions():
    image = np.full((20, 10, 3), 255, np.uint8)
    assert cropped(image, 8).shape == (8, 8, 3)
    assert (cropped(image, 8) == 255).all()
    square = padded(image, 8)
    assert (square[:, 2:6] == 255).all()
    assert not square[:, :2].any()
    assert not square[:, 6:].any()


def test_a_missing_or_wrong_model_gives_one_message(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    other, bare, broken = (tmp_path / name for name in ("other", "bare", "broken"))
    for place in (other, bare, broken):
        place.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (bare / "config.json").write_text((folder / "config.json").read_text())
    messages = {
        "clip-score": "'clip-score' needs the model 'openai/clip-vit-base-patch32', which cannot be fetched from",
        "clip-score@nowhere": "names the model 'nowhere', which is neither an existing folder nor a hub id",
        f"clip-score@{other}": "needs a model of type clip, but .* is a bert: give another",
        f"clip-score@{bare}": "needs weights, and .* has none of model.safetensors",
        f"clip-score@{broken}": "cannot read config.json",
        "oracle@somewhere": r"'oracle@somewhere' cannot be loaded \(TypeError: Oracle\(\) takes no arguments",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message) as refused:
            load_metrics([name])
        assert len(str(refused.value).splitlines()) == 1


def cached(cache: Path, hub_id: str, commit: str, *files: Path):
    """Put files into a hub cache as the newest commit of a repository."""
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for file in files:
        (folder / "snapshots" / commit / file.name).write_bytes(file.read_bytes())


def test_a_hub_model_is_pinned_to_the_commit_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    first, second = "1" * 40, "2" * 40
    for commit in (first, second):
        cached(tmp_path, "owner/judge", commit, folder / "config.json")
    newest, older = (
        load_metrics([name])[name] for name in ("clip-score@owner/judge", f"clip-score@owner/judge@{first}")
    )
    assert newest.columns[0].revision == newest.source["revision"] == second
    assert (older.columns[0].revision, older.source["pretrained_model_name_or_path"]) == (first, "owner/judge")
    (tmp_path / "README.md").write_text("weights")
    cached(tmp_path, "xswu/HPSv2", first, tmp_path / "README.md")
    with pytest.raises(ValueError, match=f"needs the model '{ARCHITECTURE}', which cannot be fetched from the hub"):
        load_metrics(["hps-v2.1"])
    cached(tmp_path, ARCHITECTURE, second, folder / "config.json")
    metric = load_metrics(["hps-v2.1"])["hps-v2.1"]
    assert metric.columns[0].revision == f"{first}; {ARCHITECTURE}@{second}"
    assert metric.built_from["revision"] == second


def damaged(folder: Path, destination: Path, change: Callable[[dict], dict]) -> str:
    """The name of clip-score with a copy of the judge whose weights are changed."""
    destination.mkdir()
    for path in folder.iterdir():
        (destination / path.name).write_bytes(path.read_bytes())
    save_file(change(load_file(folder / "model.safetensors")), destination / "model.safetensors", {"format": "pt"})
    return f"clip-score@{destination}"


def test_weights_that_do_not_fit_are_refused_before_and_when_they_are_loaded(folder, tmp_path, images):
    sound = load_metrics([f"clip-score@{folder}"])
    check_prompts(sound, PROMPTS)
    assert sound[f"clip-score@{folder}"].clip is None  # the check loads no model
    key = "visual_projection.weight"
    cases = {
        "lacking": lambda weights: {name: value for name, value in weights.items() if name != key},
        "another shape": lambda weights: weights | {key: torch.zeros(3, 5)},
    }
    for title, change in cases.items():
        name = damaged(folder, tmp_path / title, change)
        message = rf"{title}' lacks 1 of the weights of CLIPModel, such as {key}: give another model$"
        with pytest.raises(ValueError, match=message) as refused:
            check_prompts(load_metrics([name]), PROMPTS)
        assert str(refused.value).startswith(f"'{name}' ")
        with pytest.raises(Unusable, match=message):
            measure(load_metrics([name]), images, PROMPTS)


def test_a_damaged_file_or_configuration_is_refused_before_it_is_loaded(folder, tmp_path):
    name = damaged(folder, tmp_path / "cut", dict)
    file = tmp_path / "cut" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read model\.safetensors of the model .*: fetch it again$"):
        check_prompts(load_metrics([name]), PROMPTS)
    file.write_bytes(whole)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    config["vision_config"]["hidden_size"] = "wide"
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot build the model .* from its config\.json"):
        check_prompts(load_metrics([name]), PROMPTS)


def test_load_metrics_imports_no_torch_for_a_local_judge(folder):
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    code += f"from mi_ray.alignment.metric import load_metrics; load_metrics(['clip-score@{folder}'])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
