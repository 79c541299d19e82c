"""A sampling step at full size: python benchmarks/real_sizes.py [--architectures sd21,sdxl] [--out FILE.json] [--check]

One step of one candidate, with both branches and the statistics of the score, at the model's own image size. The
weights are random. On a CPU the text encoders and the autoencoder are in fp32, as in a run.
"""

import gc
import multiprocessing
import resource
import time
from typing import Literal

import torch
from gates import Benchmark, Findings, Gate, main
from pydantic import Field
from random_models import denoiser_of, pipeline_of

from mi_ray.config import SamplerConfig
from mi_ray.scoring.estimate import GIB
from mi_ray.scoring.sampler import Sampler
from mi_ray.scoring.work import Work

MOST_GIB = 20  # memory of the process


class RealSizesBenchmark(Benchmark):
    """Does a full-size step run on this machine within 20 GiB, and how does its memory compare with the estimate?"""

    architectures: tuple[Literal["sd15", "sd21", "sdxl", "sd35-medium"], ...] = Field(
        ("sd21", "sdxl"), description="models, in this order, each in a process of its own"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="dtype of the network")
    height: int | None = Field(None, description="height and width in pixels; none: the model's own")

    def answer(self) -> Findings:
        names, rows = ("sd21",) if self.smoke else self.architectures, []
        for name in names:
            arguments = name, self.dtype, 64 if self.smoke else self.height
            if len(names) == 1:
                rows.append(step(*arguments))
                continue
            with multiprocessing.get_context("spawn").Pool(1) as process:  # peak memory is that of a process
                rows.append(process.apply(step, arguments))
        gates = {f"{row['model']}_gib": Gate(row["peak_gib"], maximum=MOST_GIB) for row in rows}
        gates |= {f"{row['model']}_finite": Gate(float(row["finite"]), minimum=1) for row in rows}
        return Findings(rows, gates)


def peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step(name: str, dtype: str, side: int | None) -> dict:
    """Build the model, encode a prompt, make one step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    of_network, before = getattr(torch, dtype), peak()
    pipeline = pipeline_of(name, of_network, device)
    denoiser = denoiser_of(name, pipeline, side)
    gc.collect()
    loaded = peak()
    conditioning = denoiser.encode_prompts(["a red circle left of a blue square"])
    config = SamplerConfig(solver="ddim", num_inference_steps=1, guidance_scale=5.0)
    sampler = Sampler(denoiser, config, 1, "eager")
    began = time.perf_counter()
    with torch.inference_mode():
        sampled = sampler(conditioning, [[0]], Work())
    finite = bool(sampled.latents.isfinite().all() and sampled.delta_sq.isfinite().all())
    return {
        "model": name,
        "pixels": denoiser.image_size[0],
        "dtype": dtype,
        "parameters_m": sum(p.numel() for p in denoiser.network.parameters()) / 1e6,
        "step_s": time.perf_counter() - began,
        "before_gib": before,
        "loaded_gib": loaded,
        "peak_gib": peak(),
        "finite": finite,
    }


if __name__ == "__main__":
    main(RealSizesBenchmark)
