"""A denoiser that cannot process large batches: they are halved for good, without changing candidates."""

import os
import platform
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from mi_ray.config import SamplerConfig, ScoreConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.fitting import fitting
from mi_ray.scoring.machine import Turn, take_share, usable_cores
from mi_ray.scoring.sampler import Sampler
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work

PROMPTS = ["a red circle", "two hearts"]
SEEDS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
DDPM = SamplerConfig(solver="ddpm", num_inference_steps=6, guidance_scale=3.0)


@pytest.fixture
def small_memory(tiny_pipeline):
    """A denoiser that runs out of memory with more than 8 rows, also during sampling; and its batch sizes."""
    denoiser = load_denoiser(str(tiny_pipeline))
    sizes = []

    def limited(unet, arguments):
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 8 and len(sizes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    denoiser.network.register_forward_pre_hook(limited)
    return denoiser, sizes


def test_halved_batch_size_stays_and_changes_no_candidate(tiny_pipeline, small_memory):
    denoiser, sizes = small_memory
    sampler = Sampler(denoiser, DDPM, 10)
    conditioning = denoiser.encode_prompts(PROMPTS)
    sampled = sampler(conditioning, SEEDS, work := Work())
    assert work.batch_halvings >= 1
    whole = Sampler(load_denoiser(str(tiny_pipeline)), DDPM, 10)(conditioning, SEEDS, Work())
    torch.testing.assert_close(sampled.latents, whole.latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sampled.delta_sq, whole.delta_sq, rtol=1e-3, atol=1e-3)
    assert sampler.batch_size <= 4  # both branches of 4 candidates are 8 rows
    before = len(sizes)
    sampler(conditioning, SEEDS, Work())
    assert max(sizes[before:]) <= 8


def test_scores_use_smaller_batches_if_memory_runs_out(tiny_pipeline, small_memory):
    denoiser, _ = small_memory
    config = ScoreConfig(names=("pmi",), num_samples=3)
    conditioning = denoiser.encode_prompts(PROMPTS)
    sampled = Sampler(denoiser, DDPM, 2)(conditioning, SEEDS, Work())
    index = torch.arange(2).repeat_interleave(5)
    scorer = Scorer(denoiser, config, 16, 0, [])
    scores = scorer(PROMPTS, conditioning, index, sampled, Work())
    whole = Scorer(load_denoiser(str(tiny_pipeline)), config, 16, 0, [])(PROMPTS, conditioning, index, sampled, Work())
    assert scores["score_pmi"] == pytest.approx(whole["score_pmi"], rel=1e-3, abs=1e-3)
    assert scorer.batch_size <= 4


def test_single_row_that_does_not_fit_is_an_error():
    def never():
        raise torch.OutOfMemoryError("out of memory")

    worker = SimpleNamespace(batch_size=8)
    with pytest.raises(torch.OutOfMemoryError):
        fitting(worker, never, work := Work())
    assert (worker.batch_size, work.batch_halvings) == (1, 3)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_of_a_freed_tensor_is_reused():
    """Told by page faults: a tensor in new memory has one for each page. It is larger than 32 MiB, above which glibc
    never learns by itself to keep a block; and a heap that keeps it may first move it a few times.
    """
    program = """
        import resource, torch
        from mi_ray.scoring.machine import keep_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        torch.set_num_threads(1)
        before = min(faults() for _ in range(5))
        keep_memory()
        print(before, min(faults() for _ in range(100)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 4


def test_missing_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    take_share(1, 0)
    with pytest.raises(RuntimeError, match=r"built for CUDA 13\.0 .*; check the driver with nvidia-smi"):
        take_share(1, 0.5)
    monkeypatch.setattr(torch.version, "cuda", None)  # torch without CUDA is used on purpose
    take_share(1, 0.5)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_a_process_counts_only_the_cores_that_it_may_use():
    own = os.sched_getaffinity(0)
    assert usable_cores() == len(own)
    os.sched_setaffinity(0, {min(own)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, own)


def test_a_shard_that_waits_gives_its_turn_away_and_its_waiting_is_not_counted():
    turn, steps, seconds = Turn(), [], {}
    waiting, computed = threading.Event(), threading.Event()

    def first():
        with turn():
            steps.append("first computes")
            with turn.given_away():
                waiting.set()
                assert computed.wait(60)
                time.sleep(0.2)
            steps.append("first goes on")
            seconds["first"] = turn.seconds

    def second():
        assert waiting.wait(60)
        with turn():
            steps.append("second computes")
            computed.set()
            time.sleep(0.5)  # the first one has its values by now, but not the turn
            steps.append("second is done")
            seconds["second"] = turn.seconds

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert steps == ["first computes", "second computes", "second is done", "first goes on"]
    assert 0.5 <= seconds["second"] < 30
    assert seconds["first"] < 0.5  # it computed almost nothing, and waited for longer than that


def test_an_error_while_waiting_leaves_the_turn_with_its_shard():
    turn = Turn()
    with pytest.raises(RuntimeError, match="lost"), turn(), turn.given_away():
        raise RuntimeError("the judge was lost")
    with turn():  # the turn is free again
        assert turn.seconds < 0.5
