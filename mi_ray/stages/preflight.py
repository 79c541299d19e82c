"""The plan that a dry run prints: counts of the run, time and cost from a measured batch, and estimates for GPUs."""

from mi_ray.config import RunConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.runs.cost import evaluations, machines
from mi_ray.scoring.estimate import estimate, model_sizes, why_not_measured
from mi_ray.scoring.machine import take_cpus
from mi_ray.scoring.sampler import batch_at_size
from mi_ray.scoring.trial import best, size_text, sweep_dtypes, swept_text, try_fitting
from mi_ray.stages.pipeline import Plan, run_pipeline

STAGES = {"generate": 2, "finetune": 3}  # number of entries of `evaluations` up to this stage; other stages: all


def describe(plan: Plan, until: str = "report") -> str:
    """The plan up to the stage `until`: prompts, shards, candidates, evaluations, parameters, memory, time and cost."""
    config = plan.config
    prompts, held_out = len(plan.train), len(plan.held_out)
    skipped = sum(map(plan.skipped_count, plan.skipped))
    rounds = 1 if until == "generate" else config.rounds
    counts = evaluations(config.model_copy(update={"rounds": rounds}), prompts, held_out)
    counts = dict(list(counts.items())[: STAGES.get(until)])
    arms, sizes = ", ".join([config.select.by, *config.evaluation.controls]), model_sizes(config.model, config.finetune)
    network, encoders, autoencoder = (f"{n / 1e6:,.1f} M" for n in (sizes.network, sizes.encoders, sizes.autoencoder))
    lines = [
        f"run folder    {config.run_dir} (config {plan.hash})",
        f"model         {config.model.path}: denoiser of {network} parameters, text encoders of {encoders},"
        f" autoencoder of {autoencoder}",
        f"images        {size_text(sizes)}",
        f"prompts       {prompts} to train on, {held_out} held out, {skipped} skipped",
        f"shards        {len(plan.shards)} of up to {config.generate.prompts_per_shard} prompts,"
        f" {len(plan.evaluation_shards)} for evaluation",
        _candidates(config, prompts, rounds, arms),
    ]
    if reason := why_not_measured(config.model, sizes):
        lines += [f"speed         not measured: {reason}; denoiser evaluations:"]
        lines += [f"  {stage:<12}{count:>14,}" for stage, count in (counts | {"total": sum(counts.values())}).items()]
    else:
        lines += _measured(plan, counts)
    return "\n".join(lines + estimate(config, counts))


def _measured(plan: Plan, counts: dict[str, int]) -> list[str]:
    """Speed and memory of batches on this machine, and with them the time and cost of each stage."""
    config, resources = plan.config, plan.config.resources
    take_cpus(resources.cpus_per_actor)
    by_dtype = sweep_dtypes(config.model)
    denoiser = load_denoiser(config.model.path, config.model.dtype, size=config.model.size)
    trials = next(iter(by_dtype.values()))
    trial = best(trials) if resources.batch_size == "auto" else try_fitting(denoiser, resources.batch_size)
    each, of = trial.seconds_per_evaluation, machines(config, len(plan.shards), len(plan.evaluation_shards))
    minutes = {stage: count * each / of[stage].at_once / 60 for stage, count in counts.items()}
    batch, less = batch_at_size(denoiser, trial.batch_size), ""
    if trial.batch_size != resources.batch_size != "auto":
        less = f" (the configured {batch_at_size(denoiser, resources.batch_size)} do not fit)"
    lines = [
        f"actors        {of['generate'].processes}, batches of {batch} candidates{less},"
        f" about {trial.memory_gib:.1f} GiB each",
        f"speed         {1e3 * each:.2f} ms per denoiser evaluation, measured here; by precision and batch size:",
        *(f"  {dtype:<12}{swept_text(of_dtype)}" for dtype, of_dtype in by_dtype.items()),
        "denoiser evaluations and minutes (estimated; the start of actors and workers is not included):",
        *(f"  {stage:<12}{count:>14,}{minutes[stage]:>10.1f} min" for stage, count in counts.items()),
        f"  {'total':<12}{sum(counts.values()):>14,}{sum(minutes.values()):>10.1f} min",
    ]
    if (price := resources.price_per_gpu_hour) is not None:
        hours = sum(of[stage].gpus * of_stage for stage, of_stage in minutes.items()) / 60
        lines.append(f"cost          {hours:,.2f} GPU-hours at {price:g} each: {hours * price:,.2f}")
        if hours and denoiser.device.type == "cpu":
            lines.append("              for the CPU of this machine; for GPUs see the estimates")
    return lines


def _candidates(config: RunConfig, prompts: int, rounds: int, arms: str) -> str:
    each, online = config.generate.candidates_per_prompt, config.online
    if online.updates:
        update = f"{config.update_prompts} prompts x {each} candidates, {online.inner_steps} optimiser steps"
        return f"updates       {online.updates} online, each with {update}, method {config.finetune.method}"
    return f"candidates    {prompts * each} per round, {rounds} rounds, {config.select.top_k} kept per prompt by {arms}"


def run_or_describe(config: RunConfig, dry_run: bool, until: str = "report"):
    """Run a job: print the plan in a dry run, otherwise run the pipeline up to a stage."""
    if dry_run:
        print(describe(Plan(config, dry_run), until))
    else:
        run_pipeline(config, until)
