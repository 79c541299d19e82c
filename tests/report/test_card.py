"""The model card of an exported model."""

import io

import numpy as np
import pytest
import yaml
from PIL import Image

from mi_ray.report.card import model_card


@pytest.fixture(scope="module")
def card(config) -> dict[str, bytes]:
    settings = config.results_config()
    settings["prompts"]["file"], settings["model"]["path"] = "/home/someone/prompts.txt", "/data/models/mine"
    content = {"config": settings, "model_commit": "0123abcd", "versions": {"torch": "2.0"}}
    return model_card(config, content, "tuned", "StableDiffusionPipeline")


def test_the_hub_reads_its_head_and_finds_its_figures(card):
    text = card["README.md"].decode()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "text-to-image"
    assert "base_model" not in head  # the embedded model is not on the hub
    figures = [name for name in card if name != "README.md"]
    assert {"figures/differences.svg", "figures/samples.png"} <= set(figures)
    for name in figures:
        assert f"]({name})" in text
    assert b"<svg" in card["figures/differences.svg"]
    assert np.array(Image.open(io.BytesIO(card["figures/samples.png"]))).std() > 0


def test_it_tells_prompts_scores_and_results_and_no_places_of_the_machine(card, config):
    text = card["README.md"].decode()
    for fact in (
        "prompts: 25 to train on, 24 held out",
        "scores: mitune, pmi_negatives",
        "selected by: pmi_negatives",
        "digest `0123abcd`",
        "diffusers.StableDiffusionPipeline.from_pretrained",
        "tuned − base",
        "torch 2.0",
    ):
        assert fact in text
    assert "/home/someone" not in text
    assert "/data/models" not in text
    assert config.run_dir not in text
    assert "file: prompts.txt" in text


def test_a_model_of_the_hub_is_named_as_the_base(config):
    of_hub = config.model_copy(update={"model": config.model.model_copy(update={"path": "owner/name@abc"})})
    content = {"config": config.results_config()}
    text = model_card(of_hub, content, "random", "FluxPipeline")["README.md"].decode()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "owner/name"
    assert "# Control random: tuned from [owner/name](https://huggingface.co/owner/name)" in text
