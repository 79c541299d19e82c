"""A trial before the run, on the actors' own hardware: which batch size, and how many actors to a GPU, go fastest."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mi_ray.config import ModelConfig, ResourcesConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.diffusion.fitting import fitting
from mi_ray.scoring.machine import take_share
from mi_ray.scoring.sampler import batch_at_size, specialise

BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)
ACTORS_TO_A_GPU = (2, 4)
WORTH_IT = 1.05  # the gain in speed for which larger batches, or more actors to a GPU, are taken
MEMORY_SHARE = 0.85  # of a GPU, which its actors may fill: scoring and decoding need room beside the denoiser


@dataclass(frozen=True)
class Trial:
    """One denoiser batch of both branches, measured."""

    batch_size: int  # as `resources.batch_size` counts: candidates of the model's own size
    seconds_per_evaluation: float
    memory_gib: float  # at its peak: of the GPU, or of the process where there is none
    memory_left_gib: float  # what the GPU has beside that; infinite where there is none


def try_batch(denoiser: Denoiser, batch_size: int, seconds: float = 0.0) -> Trial:
    """Run denoiser batches, after one to warm up, for at least so many seconds and at least once."""
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


def size_text(denoiser: Denoiser) -> str:
    """The sizes of images and latents and, where they are not the model's own, how batches are counted."""
    height, width = denoiser.image_size
    told = f"{height} x {width} pixels, latents of {' x '.join(map(str, denoiser.latent_shape))}"
    if denoiser.latent_shape == denoiser.own_latent_shape:
        return f"{told}, the model's own size"
    own = " x ".join(map(str, denoiser.own_latent_shape))
    return f"{told}; resources.batch_size counts candidates of the model's own size, {own}"


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


def sweep_dtypes(model: ModelConfig) -> dict[str, list[Trial]]:
    """`sweep` in the configured precision of the denoiser (first) and in the others that have a use here."""
    useful = ("float32", "float16", "bfloat16") if torch.cuda.is_available() else ("float32", "bfloat16")
    trials = {}
    for dtype in (model.dtype, *useful):
        denoiser = load_denoiser(model.path, dtype, size=model.size)
        name = str(denoiser.dtype).removeprefix("torch.")  # auto is one of them
        if name not in trials:
            trials[name] = sweep(denoiser)
        del denoiser  # before the next is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return trials


# ------------------------------------------------------------------------------------------ on the cluster
class Probe:
    """Ray actor that holds the model as a generating one does."""

    def __init__(self, model: dict, cpus: float, gpus: float):
        take_share(cpus, gpus)
        self.model = ModelConfig.model_validate(model)
        self.denoiser = load_denoiser(self.model.path, self.model.dtype, size=self.model.size)

    def sweep(self) -> list[Trial]:
        return sweep(self.denoiser)

    def try_fitting(self, batch_size: int) -> Trial:
        specialise(self.denoiser, self.model, batch_at_size(self.denoiser, batch_size))
        return try_fitting(self.denoiser, batch_size)

    def try_batch(self, batch_size: int, seconds: float = 0.0) -> Trial:
        specialise(self.denoiser, self.model, batch_at_size(self.denoiser, batch_size))
        return try_batch(self.denoiser, batch_size, seconds)


@contextmanager
def _probes(model: ModelConfig, cpus: float, gpus: float, count: int) -> Iterator[list]:
    """So many probes, on one GPU together if they need one at all."""
    bundle = {"CPU": cpus * count, "GPU": float(gpus > 0) if count > 1 else gpus}
    group: PlacementGroup = placement_group([{name: amount for name, amount in bundle.items() if amount}])
    ray.get(group.ready())
    here = PlacementGroupSchedulingStrategy(group)
    actor = ray.remote(Probe).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=here)
    probes = [actor.remote(model.model_dump(mode="json"), cpus, gpus) for _ in range(count)]
    try:
        yield probes
    finally:
        for probe in probes:
            ray.kill(probe)
        remove_placement_group(group)


def settle(model: ModelConfig, resources: ResourcesConfig) -> ResourcesConfig:
    """Put what a trial finds in the place of every `auto`; without one, nothing is tried.

    More actors share a GPU as long as, running at the same time, they do more together than fewer did.
    """
    auto_batch, auto_share = resources.batch_size == "auto", resources.gpus_per_actor == "auto"
    if not (auto_batch or auto_share):
        return resources
    cpus, gpus = resources.cpus_per_actor, 1 if auto_share else resources.gpus_per_actor
    with _probes(model, cpus, gpus, 1) as (probe,):
        if auto_batch:
            chosen = best(ray.get(probe.sweep.remote()))
        else:
            chosen = ray.get(probe.try_fitting.remote(resources.batch_size))
    if auto_share:
        gpus = _share(model, cpus, chosen)
    settled = resources.model_copy(update={"batch_size": chosen.batch_size, "gpus_per_actor": gpus})
    of_own = " of the model's own size" if any(model.size) else ""
    print(
        f"trial: batches of {settled.batch_size} candidates{of_own}, {1e3 * chosen.seconds_per_evaluation:.2f} ms a"
        f" denoiser evaluation, {chosen.memory_gib:.1f} GiB; resources.gpus_per_actor {settled.gpus_per_actor:g}"
    )
    return settled


def _share(model: ModelConfig, cpus: float, chosen: Trial) -> float:
    """GPUs an actor: 1, or less where several on one GPU are faster together."""
    room = MEMORY_SHARE * (chosen.memory_gib + chosen.memory_left_gib)
    count, together = 1, 1 / chosen.seconds_per_evaluation
    for more in ACTORS_TO_A_GPU:
        if more * chosen.memory_gib > room:
            break
        with _probes(model, cpus, 1 / more, more) as probes:
            ray.get([probe.try_batch.remote(chosen.batch_size) for probe in probes])  # all are loaded and warm
            trials = ray.get([probe.try_batch.remote(chosen.batch_size, 2.0) for probe in probes])
        rate = sum(1 / trial.seconds_per_evaluation for trial in trials)
        if rate < WORTH_IT * together:
            break
        count, together = more, rate
    return 1 / count
