"""Estimates of memory and time for GPUs: the documented formula, and what a dry run prints without weights."""

import re

import pytest

from mi_ray.config import FinetuneConfig, ModelConfig
from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.footprint import Counted, CountedTraining
from mi_ray.scoring.estimate import CARDS, Card, ModelSizes, estimate, model_sizes, why_not_measured
from mi_ray.stages.pipeline import Plan
from mi_ray.stages.preflight import describe

GIB = 2**30
CARD = Card("a card", 10, 100.0, 10.0)  # 9 GiB can be used


def sizes(**changes) -> ModelSizes:
    values = {
        "network": GIB,
        "encoders": GIB,
        "autoencoder": GIB // 4,
        "upcast": True,
        "dtype": "float16",
        "image_size": (64, 64),
        "latent_shape": (4, 8, 8),
        "own_latent_shape": (4, 8, 8),
        "counted": Counted(flops=27e12, activations=GIB / 8),
        "training": CountedTraining(trained=1, state=GIB // 2, activations=GIB / 2),
    }
    return ModelSizes(**(values | changes))


def test_largest_batches_fill_nine_tenths_of_the_memory():
    """Weights: 2 + 2 GiB in half precision and 1 GiB of the autoencoder in fp32; 4 GiB are left."""
    assert sizes().weights("float16") == 5 * GIB
    assert sizes(upcast=False).weights("float16") == 4.5 * GIB
    assert sizes().weights("float32", encoders=False) == 5 * GIB
    assert sizes().largest_batch(CARD) == (15, True)  # 2 rows of 1/8 GiB and 6 fp32 latents: a little more than 1/4
    assert sizes().largest_training_batch(CARD) == (7, True)  # 4 GiB less 0.5 GiB


def test_text_encoders_leave_if_they_do_not_fit():
    assert sizes(encoders=3 * GIB).largest_batch(CARD) == (23, False)  # 9 - 3 GiB
    assert sizes(network=5 * GIB).largest_batch(CARD) == (0, False)


def test_seconds_are_operations_over_a_share_of_the_peak():
    assert sizes().seconds(CARD) == pytest.approx(27 / (0.27 * 100))
    assert sizes(dtype="float32").seconds(CARD) == pytest.approx(27 / (0.27 * 10))


def test_a_model_that_is_too_large_for_this_machine_is_not_measured(tiny_pipeline):
    model = ModelConfig(path=str(tiny_pipeline))
    found = model_sizes(model, FinetuneConfig(rank=2))
    assert why_not_measured(model, found) is None
    assert "this machine has" in why_not_measured(model, sizes(network=10**15))


@pytest.fixture
def config(tmp_path):
    """Stable Diffusion 1.5 at 64 by 64 pixels: the real network, few tokens, so that it is counted fast."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red circle number {i}" for i in range(20)))
    size = ["--model.height", "64", "--model.width", "64"]
    place = ["--prompts.file", str(tmp_path / "prompts.txt"), "--run-dir", str(tmp_path / "run"), *size]
    price = ["--resources.gpus-per-actor", "1", "--resources.price-per-gpu-hour", "3"]
    return load_config(["--model.path", "architecture:sd15", *place, *price, "--finetune.rank", "2"])[0]


def test_dry_run_without_weights_states_memory_batches_time_and_price(config):
    text = describe(Plan(config, dry_run=True))
    assert "denoiser of 859.5 M parameters, text encoders of 123.1 M, autoencoder of 83.7 M" in text
    assert "not measured: the weights are not on this machine" in text
    assert "counted from the configuration, not measured; float16" in text
    found = model_sizes(config.model, config.finetune)
    total = int(re.search(r"^  total +([\d,]+)$", text, re.M)[1].replace(",", ""))
    for card in CARDS:
        row = re.search(
            rf"^  {card.name}, {card.memory} GB +(\d+)\*? +(\d+)\*? +([\d.]+) +([\d.,]+) +([\d.,]+)$", text, re.M
        )
        batch, rows, milliseconds, hours, cost = (float(value.replace(",", "")) for value in row.groups())
        assert (batch, rows) == (found.largest_batch(card)[0], found.largest_training_batch(card)[0])
        assert milliseconds == pytest.approx(1e3 * found.seconds(card), abs=0.006)
        assert hours == pytest.approx(total * found.seconds(card) / 3600, abs=0.006)
        assert cost == pytest.approx(3 * total * found.seconds(card) / 3600, abs=0.006)


def test_dry_run_says_who_measures_the_metrics(config):
    evaluation = config.evaluation.model_copy(update={"alignment": ("clip-score@shapes", "blip-vqa@shapes")})
    shared = config.model_copy(update={"evaluation": evaluation})
    own = shared.model_copy(update={"resources": config.resources.model_copy(update={"judge_actors": 2})})
    text = [next(row for row in estimate(of, {}) if row.startswith("metrics")) for of in (shared, own)]
    assert "clip-score@shapes, blip-vqa@shapes: measured by every generating actor" in text[0]
    assert text[1].endswith("clip-score@shapes, blip-vqa@shapes: measured by 2 judges")


def test_a_real_run_needs_weights(config):
    with pytest.raises(ConfigError, match=r"model\.path: 'architecture:sd15' has no weights"):
        Plan(config)
