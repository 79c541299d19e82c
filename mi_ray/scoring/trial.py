"""Trial runs of the denoiser on one device: which batch size is fastest, and which fits into memory."""

import resource
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.diffusion.fitting import fitting

BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)
WORTH_IT = 1.05  # smallest speed-up for which a larger batch, or more actors per GPU, is used


@dataclass(frozen=True)
class Trial:
    """Measurements of a denoiser batch with both branches, conditional and unconditional."""

    batch_size: int  # candidates
    seconds_per_evaluation: float
    memory_gib: float  # peak memory of the GPU, or of the process without a GPU
    memory_left_gib: float  # free memory of the GPU at the peak; infinite without a GPU


def try_batch(denoiser: Denoiser, batch_size: int, seconds: float = 0.0) -> Trial:
    """Run denoiser batches for at least `seconds` and at least once, after one warm-up batch."""
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
    """`try_batch` with this batch size. If it does not fit, the size is halved until it fits, as in an actor.

    Raises:
        ConfigError: a batch of one candidate does not fit.
    """
    tried = SimpleNamespace(batch_size=batch_size)
    try:
        return fitting(tried, lambda: try_batch(denoiser, tried.batch_size))
    except torch.OutOfMemoryError as error:
        message = "model.path: the model does not fit into memory with a batch of one candidate; use a larger GPU"
        raise ConfigError([message]) from error


def sweep(denoiser: Denoiser) -> list[Trial]:
    """Try increasing batch sizes, until one does not fit or two in a row are not faster than the earlier ones."""
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
    """The smallest batch that is nearly as fast as the fastest. A small batch wastes less on the last candidates.

    Raises:
        ConfigError: the smallest batch did not fit.
    """
    if not trials:
        message = f"auto failed: the smallest batch, {BATCH_SIZES[0]} candidates, does not fit; set a smaller number"
        raise ConfigError([f"resources.batch_size: {message}"])
    fastest = min(trial.seconds_per_evaluation for trial in trials)
    return next(trial for trial in trials if trial.seconds_per_evaluation <= WORTH_IT * fastest)


def sweep_dtypes(path: str, configured: str) -> dict[str, list[Trial]]:
    """`sweep` with the configured dtype of the denoiser (first) and with the other dtypes that are useful here."""
    useful = ("float32", "float16", "bfloat16") if torch.cuda.is_available() else ("float32", "bfloat16")
    trials = {}
    for dtype in (configured, *useful):
        denoiser = load_denoiser(path, dtype)
        name = str(denoiser.dtype).removeprefix("torch.")  # `auto` stands for one of these dtypes
        if name not in trials:
            trials[name] = sweep(denoiser)
        del denoiser  # free the memory before the next one is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return trials
