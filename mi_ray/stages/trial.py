"""A trial before the run, on the actors' own hardware: which batch size and how many actors per GPU are fastest."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mi_ray.config import ModelConfig, ResourcesConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.scoring.machine import take_share
from mi_ray.scoring.sampler import batch_at_size, specialise
from mi_ray.scoring.trial import WORTH_IT, Trial, best, sweep, try_batch, try_fitting
from mi_ray.stages.cluster import room

ACTORS_PER_GPU = (2, 4)  # numbers that are tried
MEMORY_SHARE = 0.85  # of a GPU's memory for the denoisers of all its actors; the rest is for scoring and decoding


# ------------------------------------------------------------------------------------------ on the cluster
class Probe:
    """Ray actor that loads the model like an actor of the run and measures its speed."""

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
    """Context with `count` probes. If they need a GPU, they share one."""
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
    """Replace every `auto` of the resources by what a trial finds. Without `auto` there is no trial.

    More actors share a GPU as long as they are faster together, measured at the same time, than fewer actors.
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
        f"trial: batches of {settled.batch_size} candidates{of_own}, {1e3 * chosen.seconds_per_evaluation:.2f} ms per"
        f" evaluation, {chosen.memory_gib:.1f} GiB; resources.gpus_per_actor {settled.gpus_per_actor:g}"
    )
    return settled


def _share(model: ModelConfig, cpus: float, chosen: Trial) -> float:
    """GPUs per actor: 1, or less if several actors on one GPU are faster together."""
    memory = MEMORY_SHARE * (chosen.memory_gib + chosen.memory_left_gib)
    count, together = 1, 1 / chosen.seconds_per_evaluation
    for more in ACTORS_PER_GPU:
        if more * chosen.memory_gib > memory or not room({"CPU": more * cpus, "GPU": 1}):
            break
        with _probes(model, cpus, 1 / more, more) as probes:
            ray.get([probe.try_batch.remote(chosen.batch_size) for probe in probes])  # until all are loaded and warm
            trials = ray.get([probe.try_batch.remote(chosen.batch_size, 2.0) for probe in probes])
        rate = sum(1 / trial.seconds_per_evaluation for trial in trials)
        if rate < WORTH_IT * together:
            break
        count, together = more, rate
    return 1 / count
