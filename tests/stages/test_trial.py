"""The trial before a run: its choice from measurements, and that it measures on the hardware of the actors."""

import time
from itertools import count

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
def test_best_is_the_smallest_batch_of_nearly_the_best_speed(milliseconds, chosen):
    assert best(made(*milliseconds)).batch_size == chosen


def test_best_refuses_if_no_batch_fits():
    with pytest.raises(ConfigError, match=r"resources\.batch_size"):
        best([])


def test_sweep_ends_when_memory_runs_out(tiny_pipeline):
    denoiser = load_denoiser(str(tiny_pipeline))

    def limited(unet, arguments):
        if len(arguments[0]) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    denoiser.network.register_forward_pre_hook(limited)
    sizes = [t.batch_size for t in sweep(denoiser)]
    assert sizes == [8, 16, 32][: len(sizes)]
    assert len(sizes) >= 3  # a batch of 32 candidates is 64 rows


def test_sweep_dtypes_tries_the_configured_dtype_first(tiny_pipeline):
    useful = ["float32", "float16", "bfloat16"] if torch.cuda.is_available() else ["float32", "bfloat16"]
    for configured in ("auto", "bfloat16"):
        trials = sweep_dtypes(ModelConfig(path=str(tiny_pipeline), dtype=configured))
        first = configured if configured != "auto" else ("float16" if torch.cuda.is_available() else "float32")
        assert list(trials) == [first, *[dtype for dtype in useful if dtype != first]]
        assert all(trial.seconds_per_evaluation > 0 for of_dtype in trials.values() for trial in of_dtype)


def test_try_batch_runs_for_the_given_time(tiny_pipeline, monkeypatch):
    denoiser, calls = load_denoiser(str(tiny_pipeline)), []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    try_batch(denoiser, 2)
    assert len(calls) == 2  # one batch to warm up
    clock = count(step=0.03)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))  # each batch takes 0.03 s
    measured = try_batch(denoiser, 2, seconds=0.2)
    assert len(calls) - 3 == 7  # the first number of batches that takes at least 0.2 s
    assert measured.seconds_per_evaluation == pytest.approx(0.03 / 4)  # two candidates, both branches


def test_settle_without_auto_runs_no_trial(monkeypatch):
    monkeypatch.setattr(trial, "_probes", None)
    resources = ResourcesConfig(batch_size=5, gpus_per_actor=0.5)
    assert settle(ModelConfig(), resources) is resources


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_settle_shares_a_gpu_if_it_is_faster(tiny_pipeline, capsys):
    ray.init(address="local", num_cpus=4, num_gpus=1, logging_level="error")  # a declared GPU; the model is on the CPU
    try:
        resources = ResourcesConfig(batch_size="auto", gpus_per_actor="auto")
        settled = settle(ModelConfig(path=str(tiny_pipeline)), resources)
        deadline = time.monotonic() + 30
        while ray.available_resources().get("GPU") != 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ray.available_resources().get("GPU") == 1  # the probes were removed
    finally:
        ray.shutdown()
    assert settled.batch_size in BATCH_SIZES
    assert settled.gpus_per_actor in (1, 1 / 2, 1 / 4)
    assert f"batches of {settled.batch_size} candidates" in capsys.readouterr().out
