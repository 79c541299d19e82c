"""Trial runs of the denoiser on one device: which batch size is fastest, and which fits into memory."""

import resource
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

import torch

from mi_ray.config import ModelConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.diffusion.fitting import fitting
from mi_ray.scoring.sampler import batch_at_size

BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)
WORTH_IT = 1.05  # smallest speed-up for which a larger batch, or more actors per GPU, is used


@dataclass(frozen=True)
class Trial:
    """Measurements of a denoiser batch with both branches, conditional and unconditional."""

    batch_size: int  # as `resources.batch_size` counts: candidates of the model's own size
    seconds_per_evaluation: float
    memory_gib: float  # peak memory of the GPU, or of the process without a GPU
    memory_left_gib: float  # free memory of the GPU at the peak; infinite without a GPU


def try_batch(denoiser: Denoiser, batch_size: int, seconds: float = 0.0) -> Trial:
    """Measure denoiser batches for at least `seconds`, at least one batch, after one batch to warm up."""
    rows = 2 * batch_at_size(denoiser, batch_size)
    conditioning = denoiser.encode_prompts([""]).expand(rows)
    latents = torch.randn(rows, *denoiser.latent_shape, device=denoiser.device)
    timesteps = torch.full((rows,), 500, device=denoiser.device)
    on_gpu = denoiser.device.type == "cuda"

    def run() -> float:
        with torch.inference_mode():
            denoiser.predict_epsilon(latents, timesteps, conditioning)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began, now, done = run(), 0.0, 0
    while not done or now - began < seconds:
        now, done = run(), done + 1
    each = (now - began) / (done * rows)
    if not on_gpu:
        return Trial(batch_size, each, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, float("inf"))
    peak = torch.cuda.max_memory_reserved()
    return Trial(batch_size, each, peak / 2**30, (torch.cuda.mem_get_info()[1] - peak) / 2**30)


def try_fitting(denoiser: Denoiser, batch_size: int) -> Trial:
    """`try_batch` with this batch size. If it does not fit, the size is halved until it fits, as in an actor.

    Raises:
        ConfigError: a batch of one candidate does not fit.
    """
    tried = SimpleNamespace(batch_size=batch_size)
    try:
        return fitting(tried, lambda: try_batch(denoiser, tried.batch_size), make_room=denoiser.make_room)
    except torch.OutOfMemoryError as error:
        message = "model.path: the model does not fit into memory with a batch of one candidate; use a larger GPU"
        raise ConfigError([message]) from error


def swept_text(trials: list[Trial]) -> str:
    """The speed for each batch size, and the memory of the largest."""
    if not trials:
        return "the smallest batch does not fit"
    speeds = ", ".join(f"{trial.batch_size}: {1e3 * trial.seconds_per_evaluation:.2f}" for trial in trials)
    return f"{speeds} ms; up to {trials[-1].memory_gib:.1f} GiB"


class Sized(Protocol):
    """A denoiser, or the sizes of a model without weights."""

    image_size: tuple[int, int]
    latent_shape: tuple[int, ...]
    own_latent_shape: tuple[int, ...]


def size_text(denoiser: Sized) -> str:
    """The sizes of images and latents. If they are not the model's own, also how batches are counted."""
    height, width = denoiser.image_size
    sizes = f"{height} x {width} pixels, latents of {' x '.join(map(str, denoiser.latent_shape))}"
    if denoiser.latent_shape == denoiser.own_latent_shape:
        return f"{sizes}, the model's own size"
    own = " x ".join(map(str, denoiser.own_latent_shape))
    return f"{sizes}; resources.batch_size counts candidates of the model's own size, {own}"


def sweep(denoiser: Denoiser) -> list[Trial]:
    """Try batches of increasing size, until one does not fit or two of them in a row are not worth it."""
    trials: list[Trial] = []
    for batch_size in BATCH_SIZES:
        try:
            trials.append(_with_room(denoiser, batch_size))
        except torch.OutOfMemoryError:
            break
        if len(trials) > 2:
            before, last = (min(t.seconds_per_evaluation for t in some) for some in (trials[:-2], trials[-2:]))
            if before < WORTH_IT * last:
                break
    return trials


def _with_room(denoiser: Denoiser, batch_size: int) -> Trial:
    """`try_batch`. If the smallest batch does not fit, text encoders leave the device; larger ones are not worth it."""
    try:
        return try_batch(denoiser, batch_size)
    except torch.OutOfMemoryError:
        if batch_size > BATCH_SIZES[0] or not denoiser.make_room():
            raise
    return try_batch(denoiser, batch_size)


def best(trials: list[Trial]) -> Trial:
    """The smallest batch that is nearly as fast as the fastest. A small batch wastes less on the last candidates.

    Raises:
        ConfigError: the smallest batch did not fit.
    """
    if not trials:
        message = f"auto failed: the smallest batch, {BATCH_SIZES[0]} candidates, does not fit; set a smaller number"
        raise ConfigError([f"resources.batch_size: {message}"])
    fastest = min(trial.seconds_per_evaluation for trial in trials)
    return next(trial for trial in trials if trial.seconds_per_evaluation <= WORTH_IT * fastest)


def sweep_dtypes(model: ModelConfig) -> dict[str, list[Trial]]:
    """`sweep` in the configured dtype (first) and in the other dtypes that are useful on this device."""
    useful = ("float32", "float16", "bfloat16") if torch.cuda.is_available() else ("float32", "bfloat16")
    trials = {}
    for dtype in (model.dtype, *useful):
        denoiser = load_denoiser(model.path, dtype, size=model.size)
        name = str(denoiser.dtype).removeprefix("torch.")  # auto is resolved to one of the others
        if name not in trials:
            trials[name] = sweep(denoiser)
        del denoiser  # free it before the next is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return trials
