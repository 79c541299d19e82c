"""Measured denoiser batches on one device: which size is the fastest, and which fits."""

import resource
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.diffusion.fitting import fitting

BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)
WORTH_IT = 1.05  # the gain in speed for which larger batches, or more actors to a GPU, are taken


@dataclass(frozen=True)
class Trial:
    """One denoiser batch of both branches, measured."""

    batch_size: int  # candidates
    seconds_per_evaluation: float
    memory_gib: float  # at its peak: of the GPU, or of the process where there is none
    memory_left_gib: float  # what the GPU has beside that; infinite where there is none


def try_batch(denoiser: Denoiser, batch_size: int, seconds: float = 0.0) -> Trial:
    """Run denoiser batches, after one to warm up, for at least so many seconds and at least once."""
    conditioning = denoiser.encode_prompts([""]).expand(2 * batch_size)
    latents = torch.randn(2 * batch_size, *denoiser.latent_shape, device=denoiser.device)
    timesteps = torch.full((2 * batch_size,), 500, device=denoiser.device)
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
    each = (now - began) / (done * 2 * batch_size)
    if not on_gpu:
        return Trial(batch_size, each, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, float("inf"))
    peak = torch.cuda.max_memory_reserved()
    return Trial(batch_size, each, peak / 2**30, (torch.cuda.mem_get_info()[1] - peak) / 2**30)


def try_fitting(denoiser: Denoiser, batch_size: int) -> Trial:
    """The same with a batch of this size or, where it does not fit, of half as often as an actor would halve it.

    Raises:
        ConfigError: not even one candidate fits.
    """
    tried = SimpleNamespace(batch_size=batch_size)
    try:
        return fitting(tried, lambda: try_batch(denoiser, tried.batch_size))
    except torch.OutOfMemoryError as error:
        message = "model.path: not even a batch of one candidate fits into memory; take a larger GPU"
        raise ConfigError([message]) from error


def sweep(denoiser: Denoiser) -> list[Trial]:
    """Batches of rising size, until one does not fit or two in a row are no faster than what came before."""
    trials: list[Trial] = []
    for batch_size in BATCH_SIZES:
        try:
            trials.append(try_batch(denoiser, batch_size))
        except torch.OutOfMemoryError:
            break
        if len(trials) > 2 and min(t.seconds_per_evaluation for t in trials[-2:]) > min(
            t.seconds_per_evaluation for t in trials[:-2]
        ):
            break
    return trials


def best(trials: list[Trial]) -> Trial:
    """The smallest batch that is about as fast as the fastest: it wastes least when the last candidates are few.

    Raises:
        ConfigError: not even the smallest batch fitted.
    """
    if not trials:
        message = f"not even a batch of {BATCH_SIZES[0]} candidates fits; set a lower one instead of auto"
        raise ConfigError([f"resources.batch_size: {message}"])
    fastest = min(trial.seconds_per_evaluation for trial in trials)
    return next(trial for trial in trials if trial.seconds_per_evaluation <= WORTH_IT * fastest)


def sweep_dtypes(path: str, configured: str) -> dict[str, list[Trial]]:
    """`sweep` in the configured precision of the denoiser (first) and in the others that have a use here."""
    useful = ("float32", "float16", "bfloat16") if torch.cuda.is_available() else ("float32", "bfloat16")
    trials = {}
    for dtype in (configured, *useful):
        denoiser = load_denoiser(path, dtype)
        name = str(denoiser.dtype).removeprefix("torch.")  # auto is one of them
        if name not in trials:
            trials[name] = sweep(denoiser)
        del denoiser  # before the next is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return trials
