"""The plan that a dry run prints: sizes and counts of the run, and its time, memory and cost from a measured batch."""

import math
from dataclasses import dataclass

from mi_ray.config import RunConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.runs.cost import evaluations
from mi_ray.scoring.machine import take_cpus
from mi_ray.scoring.sampler import batch_at_size
from mi_ray.scoring.trial import Trial, best, size_text, sweep_dtypes, try_fitting
from mi_ray.stages.pipeline import Plan, run_pipeline

STAGES = {"generate": 2, "finetune": 3}  # number of entries of `evaluations` up to this stage; other stages: all


def describe(plan: Plan, until: str = "report") -> str:
    """The plan up to the stage `until`: prompts, shards, candidates, evaluations, parameters, memory, time and cost."""
    config, resources = plan.config, plan.config.resources
    take_cpus(resources.cpus_per_actor)
    by_dtype = sweep_dtypes(config.model)
    denoiser = load_denoiser(config.model.path, config.model.dtype, size=config.model.size)
    trials = next(iter(by_dtype.values()))
    trial = best(trials) if resources.batch_size == "auto" else try_fitting(denoiser, resources.batch_size)
    each = trial.seconds_per_evaluation
    prompts, held_out = len(plan.train), len(plan.held_out)
    skipped = sum(map(plan.skipped_count, plan.skipped))
    rounds = 1 if until == "generate" else config.rounds
    counts = evaluations(config.model_copy(update={"rounds": rounds}), prompts, held_out)
    counts = dict(list(counts.items())[: STAGES.get(until)])
    machines = _machines(plan)
    minutes = {stage: count * each / machines[stage].at_once / 60 for stage, count in counts.items()}
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    arms = ", ".join([config.select.by, *config.evaluation.controls])
    batch, less = batch_at_size(denoiser, trial.batch_size), ""
    if trial.batch_size != resources.batch_size != "auto":
        less = f" (the configured {batch_at_size(denoiser, resources.batch_size)} do not fit)"
    lines = [
        f"run folder    {config.run_dir} (config {plan.hash})",
        f"model         {config.model.path}: denoiser of {parameters / 1e6:.1f} M parameters, {denoiser.dtype}",
        f"images        {size_text(denoiser)}",
        f"prompts       {prompts} to train on, {held_out} held out, {skipped} skipped",
        f"shards        {len(plan.shards)} of up to {config.generate.prompts_per_shard} prompts,"
        f" {len(plan.evaluation_shards)} for evaluation",
        _candidates(config, prompts, rounds, arms),
        f"actors        {machines['generate'].processes}, batches of {batch} candidates{less},"
        f" about {trial.memory_gib:.1f} GiB each",
        f"speed         {1e3 * each:.2f} ms per denoiser evaluation, measured here; by precision and batch size:",
        *(f"  {dtype:<12}{_swept(of_dtype)}" for dtype, of_dtype in by_dtype.items()),
        "denoiser evaluations and minutes (estimated; the start of actors and workers is not included):",
        *(f"  {stage:<12}{count:>14,}{minutes[stage]:>10.1f} min" for stage, count in counts.items()),
        f"  {'total':<12}{sum(counts.values()):>14,}{sum(minutes.values()):>10.1f} min",
    ]
    if (price := resources.price_per_gpu_hour) is not None:
        hours = sum(machines[stage].gpus * of_stage for stage, of_stage in minutes.items()) / 60
        lines.append(f"cost          {hours:,.2f} GPU-hours at {price:g} each: {hours * price:,.2f}")
        if hours and denoiser.device.type == "cpu":
            lines.append("              for the CPU of this machine; repeat the dry run on a machine with the GPU")
    return "\n".join(lines)


def _candidates(config: RunConfig, prompts: int, rounds: int, arms: str) -> str:
    each, online = config.generate.candidates_per_prompt, config.online
    if online.updates:
        update = f"{online.prompts_per_update} prompts x {each} candidates, {online.inner_steps} optimiser steps"
        return f"updates       {online.updates} online, each with {update}, method {config.finetune.method}"
    return f"candidates    {prompts * each} per round, {rounds} rounds, {config.select.top_k} kept per prompt by {arms}"


@dataclass(frozen=True)
class _Machines:
    """The largest resources of a stage."""

    processes: int  # number of actors or workers
    gpus: int  # number of GPUs that they use
    at_once: int  # compared with one process; processes on the same GPU share its speed


def _machines(plan: Plan) -> dict[str, _Machines]:
    """The largest resources of each stage."""
    resources = plan.config.resources
    share = 1 if resources.gpus_per_actor == "auto" else resources.gpus_per_actor

    def of(processes: int, share: float) -> _Machines:
        gpus = math.ceil(processes * share - 1e-9)
        return _Machines(processes, gpus, min(processes, gpus) if share else processes)

    generate, evaluate = (
        of(min(resources.num_actors[1], len(shards)), share) for shards in (plan.shards, plan.evaluation_shards)
    )
    finetune = of(resources.train_workers[1], resources.train_gpus)
    return {"generate": generate, "score": generate, "finetune": finetune, "evaluate": evaluate}


def _swept(trials: list[Trial]) -> str:
    """The speed for each batch size, and the memory of the largest."""
    if not trials:
        return "the smallest batch does not fit"
    speeds = ", ".join(f"{trial.batch_size}: {1e3 * trial.seconds_per_evaluation:.2f}" for trial in trials)
    return f"{speeds} ms; up to {trials[-1].memory_gib:.1f} GiB"


def run_or_describe(config: RunConfig, dry_run: bool, until: str = "report"):
    """Run a job: print the plan in a dry run, otherwise run the pipeline up to a stage."""
    if dry_run:
        print(describe(Plan(config), until))
    else:
        run_pipeline(config, until)
