"""The plan of a dry run: its time and cost, compared with a calculation by hand."""

import re
from types import SimpleNamespace

import pytest
import torch

from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError
from mi_ray.runs.cost import evaluations
from mi_ray.scoring.trial import Trial, try_fitting
from mi_ray.stages import preflight
from mi_ray.stages.pipeline import Plan

NO_ORACLE = ["--generate.alignment", "none", "--evaluation.alignment", "none", "--evaluation.controls", "none"]
SECONDS = 0.6  # per evaluation: 100 evaluations take a minute


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """The plan of a smoke run: 12 prompts in 4 shards of 3, and 6 evaluation prompts in 2 shards."""
    measured = Trial(64, SECONDS, 1.0, 7.0)
    monkeypatch.setattr(preflight, "sweep_dtypes", lambda *_: {"float32": [measured]})
    monkeypatch.setattr(preflight, "try_fitting", lambda *_: measured)

    def make(*arguments: str) -> Plan:
        smoke = ["--config", "jobs/configs/shapes-smoke.yaml", "--run-dir", str(tmp_path / "run")]
        return Plan(load_config([*smoke, "--generate.prompts-per-shard", "3", *arguments])[0])

    return make


def minutes(text: str) -> dict[str, float]:
    found = re.findall(r"^  (generate|score|finetune|evaluate|total) .* ([\d.]+) min$", text, re.MULTILINE)
    return {stage: float(value) for stage, value in found}


@pytest.mark.parametrize(
    ("actors", "share", "at_once", "gpus"),
    [
        (8, 0, (4, 2), (0, 0)),  # no more actors than shards
        (8, 1, (4, 2), (4, 2)),
        (8, 0.5, (2, 1), (2, 1)),  # two actors on one GPU are as fast as one actor
        (3, 0.25, (1, 1), (1, 1)),
        (2, 2, (2, 2), (4, 4)),
    ],
)
def test_actors_that_share_a_gpu_share_its_speed_and_its_price(plan, actors, share, at_once, gpus):
    resources = ["--resources.num-actors", str(actors), "--resources.gpus-per-actor", str(share)]
    made = plan(*resources, "--resources.price-per-gpu-hour", "3")
    counts, text = evaluations(made.config, 12, 6), preflight.describe(made)
    planned = minutes(text)
    for stage, parallel in zip(("generate", "score", "evaluate"), (at_once[0], *at_once), strict=True):
        assert planned[stage] == pytest.approx(counts[stage] * SECONDS / 60 / parallel, abs=0.06), stage
    assert planned["finetune"] == pytest.approx(counts["finetune"] * SECONDS / 60, abs=0.06)
    hours = (gpus[0] * (planned["generate"] + planned["score"]) + gpus[1] * planned["evaluate"]) / 60
    cost = re.search(r"cost +([\d,.]+) GPU-hours at 3 each: ([\d,.]+)", text)
    assert float(cost[1]) == pytest.approx(hours, abs=0.02)
    assert float(cost[2]) == pytest.approx(3 * hours, abs=0.06)
    assert ("for the CPU of this machine" in text) == (share > 0 and not torch.cuda.is_available())


def test_plan_contains_only_the_stages_of_the_job(plan):
    made = plan()
    assert [*minutes(preflight.describe(made, "generate"))] == ["generate", "score", "total"]
    assert [*minutes(preflight.describe(made, "finetune"))] == ["generate", "score", "finetune", "total"]


def test_plan_shows_a_batch_that_does_not_fit_and_was_halved(plan, monkeypatch):
    monkeypatch.setattr(preflight, "try_fitting", lambda *_: Trial(16, SECONDS, 1.0, 7.0))
    assert "batches of 16 candidates (the configured 64 do not fit)" in preflight.describe(plan())


@pytest.mark.parametrize(("fits", "tried"), [(16, [64, 32, 16]), (0, [64, 32, 16, 8, 4, 2, 1])])
def test_batch_is_halved_until_it_fits(monkeypatch, fits, tried):
    sizes = []

    def try_batch(denoiser, batch_size):
        sizes.append(batch_size)
        if batch_size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Trial(batch_size, SECONDS, 1.0, 7.0)

    monkeypatch.setattr("mi_ray.scoring.trial.try_batch", try_batch)
    if fits:
        assert try_fitting(SimpleNamespace(make_room=lambda: False), 64).batch_size == fits
    else:
        with pytest.raises(ConfigError, match="does not fit into memory with a batch of one"):
            try_fitting(SimpleNamespace(make_room=lambda: False), 64)
    assert sizes == tried


def test_batches_at_another_size_have_the_same_number_of_latent_tokens(plan):
    own, sized = plan(), plan("--model.height", "128", *NO_ORACLE)
    assert re.search(
        r"^images +64 x 64 pixels, latents of \d+ x 8 x 8, the model's own size$", preflight.describe(own), re.M
    )
    text = preflight.describe(sized)
    assert re.search(
        r"^images +128 x 64 pixels, .* counts candidates of the model's own size, \d+ x 8 x 8$", text, re.M
    )
    assert "batches of 32 candidates" in text  # 64 of the model's own size fit


def test_wrong_size_is_reported_together_with_all_other_faults(plan):
    with pytest.raises(ConfigError) as raised:
        plan("--model.height", "100", "--model.width", "60", "--prompts.file", "nowhere.txt")
    faults = raised.value.faults
    assert [fault.partition(":")[0] for fault in faults] == ["model.height", "model.width", "prompts.file"]
    assert "take 96 or 112" in faults[0]


def test_oracle_refuses_images_of_another_size(plan):
    with pytest.raises(ConfigError) as raised:
        plan("--model.height", "128")
    faults = raised.value.faults
    assert [fault.partition(":")[0] for fault in faults] == ["generate.alignment", "evaluation.alignment"]
    assert "the oracle reads only images of 64 x 64 pixels, but the model makes 128 x 64" in faults[0]
