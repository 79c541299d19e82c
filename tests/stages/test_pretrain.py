"""The pre-training of the embedded model, on a few steps: it continues where it was killed."""

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

from mi_ray.shapes.model import build_vae

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 80, 30
BUDGET = ["--steps", STEPS, "--checkpoint-every", EVERY, "--pairs", 200, "--batch-size", 4, "--threads-per-worker", 1]


def command(folder: Path) -> list[str]:
    return [sys.executable, "jobs/pretrain_shapes.py", "--folder", str(folder), *map(str, BUDGET)]


def with_autoencoder(folder: Path) -> Path:
    """As after the first two phases, with an autoencoder that nobody trained."""
    torch.manual_seed(0)
    vae = build_vae()
    for name in ("vae", "vae-refined"):
        vae.save_pretrained(folder / name)
    return folder


def registered(folder: Path) -> bool:
    """Whether Ray knows of a checkpoint: it notes one after its files are written."""
    snapshot = folder / "ray/denoiser/checkpoint_manager_snapshot.json"
    return snapshot.exists() and "checkpoint_2" in snapshot.read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_killed_and_given_again_it_ends_with_the_same_model(tmp_path):
    whole, killed = with_autoencoder(tmp_path / "whole"), with_autoencoder(tmp_path / "killed")
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

    logged = [json.loads(line)["step"] for line in (killed / "denoiser.jsonl").read_text().splitlines()]
    assert logged.count(20) == 1  # it went on from step 30 and did not begin again
    assert logged[-1] == STEPS
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        one, two = (load_file(folder / "model" / f"{part}.safetensors") for folder in (whole, killed))
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)
    StableDiffusionPipeline.from_pretrained(killed / "model", safety_checker=None)
