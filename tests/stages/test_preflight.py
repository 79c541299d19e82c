"""The plan of a dry run: its time and cost from a measured speed, by hand."""

import re

import pytest
import torch

from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError
from mi_ray.runs.cost import evaluations
from mi_ray.scoring.trial import Trial, try_fitting
from mi_ray.stages import preflight
from mi_ray.stages.pipeline import Plan

NO_ORACLE = ["--generate.alignment", "none", "--evaluation.alignment", "none", "--evaluation.controls", "none"]
SECONDS = 0.6  # an evaluation, so that a hundred take a minute


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """The plan of a smoke run: 12 prompts in 4 shards of 3, 6 of the evaluation in 2."""
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
        (8, 0.5, (2, 1), (2, 1)),  # two that share a GPU do no more than one of them alone
        (3, 0.25, (1, 1), (1, 1)),
        (2, 2, (2, 2), (4, 4)),
    ],
)
def test_actors_that_share_a_gpu_share_its_speed_and_its_price(plan, actors, share, at_once, gpus):
    resources = ["--resources.num-actors", str(actors), "--resources.gpus-per-actor", str(share)]
    made = plan(*resources, "--resources.price-per-gpu-hour", "3")
    counts, text = evaluations(made.config, 12, 6), preflight.describe(made)
    told = minutes(text)
    for stage, parallel in zip(("generate", "score", "evaluate"), (at_once[0], *at_once), strict=True):
        assert told[stage] == pytest.approx(counts[stage] * SECONDS / 60 / parallel, abs=0.06), stage
    assert told["finetune"] == pytest.approx(counts["finetune"] * SECONDS / 60, abs=0.06)
    hours = (gpus[0] * (told["generate"] + told["score"]) + gpus[1] * told["evaluate"]) / 60
    cost = re.search(r"cost +([\d,.]+) GPU-hours at 3 each: ([\d,.]+)", text)
    assert float(cost[1]) == pytest.approx(hours, abs=0.02)
    assert float(cost[2]) == pytest.approx(3 * hours, abs=0.06)
    assert ("this machine's CPU" in text) == (share > 0 and not torch.cuda.is_available())


def test_a_job_of_some_stages_plans_no_more(plan):
    made = plan()
    assert [*minutes(preflight.describe(made, "generate"))] == ["generate", "score", "total"]
    assert [*minutes(preflight.describe(made, "finetune"))] == ["generate", "score", "finetune", "total"]


def test_a_batch_that_does_not_fit_is_halved_and_told(plan, monkeypatch):
    monkeypatch.setattr(preflight, "try_fitting", lambda *_: Trial(16, SECONDS, 1.0, 7.0))
    assert "batches of 16 candidates (not 64, which do not fit)" in preflight.describe(plan())


@pytest.mark.parametrize(("fits", "tried"), [(16, [64, 32, 16]), (0, [64, 32, 16, 8, 4, 2, 1])])
def test_halving_ends_where_memory_suffices(monkeypatch, fits, tried):
    sizes = []

    def try_batch(denoiser, batch_size):
        sizes.append(batch_size)
        if batch_size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Trial(batch_size, SECONDS, 1.0, 7.0)

    monkeypatch.setattr("mi_ray.scoring.trial.try_batch", try_batch)
    if fits:
        assert try_fitting(None, 64).batch_size == fits
    else:
        with pytest.raises(ConfigError, match="does not fit into memory with a batch of one"):
            try_fitting(None, 64)
    assert sizes == tried


def test_another_size_is_told_and_its_batches_hold_as_many_latent_tokens(plan):
    own, sized = plan(), plan("--model.height", "128", *NO_ORACLE)
    assert re.search(
        r"^images +64 x 64 pixels, latents of \d+ x 8 x 8, the model's own size$", preflight.describe(own), re.M
    )
    text = preflight.describe(sized)
    assert re.search(
        r"^images +128 x 64 pixels, .* counts candidates of the model's own size, \d+ x 8 x 8$", text, re.M
    )
    assert "batches of 32 candidates" in text  # 64 of the model's own size fit


def test_a_size_that_will_not_do_is_told_with_all_other_faults(plan):
    with pytest.raises(ConfigError) as told:
        plan("--model.height", "100", "--model.width", "60", "--prompts.file", "nowhere.txt")
    assert [fault.partition(":")[0] for fault in told.value.faults] == ["model.height", "model.width", "prompts.file"]
    assert "take 96 or 112" in told.value.faults[0]


def test_the_oracle_reads_scenes_of_its_own_size_alone(plan):
    with pytest.raises(ConfigError) as told:
        plan("--model.height", "128")
    assert [fault.partition(":")[0] for fault in told.value.faults] == ["generate.alignment", "evaluation.alignment"]
    assert "the oracle reads only images of 64 x 64 pixels, but the model makes 128 x 64" in told.value.faults[0]
