"""Pre-training of the embedded model with a few steps: it continues after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from mi_ray.shapes.model import build_scheduler
from mi_ray.training.pretrain_denoiser import timestep_frequency

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 80, 30
BUDGET = ["--steps", STEPS, "--checkpoint-every", EVERY, "--pairs", 200, "--batch-size", 4, "--threads-per-worker", 1]
BUDGET += ["--start-from", "shapes", "--layout-share", 0.5]


def command(folder: Path) -> list[str]:
    return [sys.executable, "jobs/pretrain_shapes.py", "--folder", str(folder), *map(str, BUDGET)]


def registered(folder: Path) -> bool:
    """Whether Ray has recorded a checkpoint, which it does after the files are written."""
    snapshot = folder / "ray/denoiser/checkpoint_manager_snapshot.json"
    return snapshot.exists() and "checkpoint_2" in snapshot.read_text()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_pretraining_continues_after_a_kill_with_the_same_model(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), cwd=ROOT, check=True, capture_output=True)

    process = subprocess.Popen(
        command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not registered(killed) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "model").exists()
    subprocess.run(command(killed), cwd=ROOT, check=True, capture_output=True)

    lines = [json.loads(line) for line in (killed / "denoiser.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] < 0.2  # it started from the embedded model; from scratch the loss is 1
    logged = [line["step"] for line in lines]
    assert logged.count(20) == 1  # it continued from step 30
    assert logged[-1] == STEPS
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        one, two = (load_file(folder / "model" / f"{part}.safetensors") for folder in (whole, killed))
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)
    StableDiffusionPipeline.from_pretrained(killed / "model", safety_checker=None)


def test_timesteps_follow_the_min_snr_weights_and_the_layout_share():
    alphas_cumprod = build_scheduler().alphas_cumprod
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = snr.clamp(max=5) / snr
    torch.testing.assert_close(timestep_frequency(alphas_cumprod, 5.0, 0.0), weight / weight.sum())
    mixed = timestep_frequency(alphas_cumprod, 5.0, 0.5)
    assert mixed.sum() == pytest.approx(1)
    assert mixed[600:800].sum() > 1.5 * (weight / weight.sum())[600:800].sum()
