"""The trial before a run: what it chooses from what it measured, and that it measures where the actors will run."""

import time

import pytest
import ray
import torch

from mi_ray.config import ModelConfig, ResourcesConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.scoring.trial import BATCH_SIZES, Trial, best, sweep, sweep_dtypes, try_batch
from mi_ray.stages import trial
from mi_ray.stages.trial import settle


def made(*milliseconds: float) -> list[Trial]:
    return [Trial(8 * 2**i, ms / 1e3, 1.0, 7.0) for i, ms in enumerate(milliseconds)]


@pytest.mark.parametrize(("milliseconds", "chosen"), [((4, 2, 1, 0.98), 32), ((1, 2, 3), 8), ((4, 3, 2, 1), 64)])
def test_the_smallest_batch_that_is_about_as_fast_as_the_fastest(milliseconds, chosen):
    assert best(made(*milliseconds)).batch_size == chosen


def test_nothing_fits():
    with pytest.raises(ConfigError, match=r"resources\.batch_size"):
        best([])


def test_a_sweep_ends_where_memory_does(tiny_pipeline):
    denoiser = load_denoiser(str(tiny_pipeline))

    def limited(unet, arguments):
        if len(arguments[0]) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    denoiser.network.register_forward_pre_hook(limited)
    sizes = [t.batch_size for t in sweep(denoiser)]
    assert sizes == [8, 16, 32][: len(sizes)]
    assert len(sizes) >= 3  # a batch of 32 candidates is 64 rows


def test_each_useful_precision_is_tried_once_the_configured_one_first(tiny_pipeline):
    useful = ["float32", "float16", "bfloat16"] if torch.cuda.is_available() else ["float32", "bfloat16"]
    for configured in ("auto", "bfloat16"):
        trials = sweep_dtypes(ModelConfig(path=str(tiny_pipeline), dtype=configured))
        first = configured if configured != "auto" else ("float16" if torch.cuda.is_available() else "float32")
        assert list(trials) == [first, *[dtype for dtype in useful if dtype != first]]
        assert all(trial.seconds_per_evaluation > 0 for of_dtype in trials.values() for trial in of_dtype)


def test_a_trial_runs_as_long_as_it_is_told(tiny_pipeline):
    denoiser, calls = load_denoiser(str(tiny_pipeline)), []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    try_batch(denoiser, 2)
    assert len(calls) == 2  # one to warm up
    measured = try_batch(denoiser, 2, seconds=0.2)
    assert len(calls) - 3 == pytest.approx(0.2 / (4 * measured.seconds_per_evaluation), abs=1)


def test_without_auto_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(trial, "_probes", None)
    resources = ResourcesConfig(batch_size=5, gpus_per_actor=0.5)
    assert settle(ModelConfig(), resources) is resources


@pytest.mark.ray
@pytest.mark.slow
def test_auto_is_settled_by_actors_that_share_a_gpu(tiny_pipeline, capsys):
    ray.init(address="local", num_cpus=4, num_gpus=1, logging_level="error")  # a GPU in name, the model on the CPU
    try:
        resources = ResourcesConfig(batch_size="auto", gpus_per_actor="auto")
        settled = settle(ModelConfig(path=str(tiny_pipeline)), resources)
        deadline = time.monotonic() + 30
        while ray.available_resources().get("GPU") != 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ray.available_resources().get("GPU") == 1  # the probes are gone
    finally:
        ray.shutdown()
    assert settled.batch_size in BATCH_SIZES
    assert settled.gpus_per_actor in (1, 1 / 2, 1 / 4)
    assert f"batches of {settled.batch_size} candidates" in capsys.readouterr().out
