"""The plan of a run before it starts: how much of everything, from one measured batch how long and how big."""

import resource
import time

import torch

from mi_ray.config import POINTWISE_SCORES, RunConfig
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.stages.pipeline import Plan, run_pipeline
from mi_ray.stages.shards import take_cpus

TRAINING_COST = 3  # a training pass in denoiser evaluations: forward, and backward at twice that


def evaluations(config: RunConfig, prompts: int, held_out: int) -> dict[str, int]:
    """Denoiser evaluations by stage; `finetune` counts forward and backward as `TRAINING_COST`.

    Steps outside sampler.guidance_interval cost half of what is counted here.
    """
    arms = 1 + len(config.evaluation.controls)
    pools = 1 + (config.rounds - 1) * arms  # the first round's pool serves all arms
    each, steps = config.generate.candidates_per_prompt, config.sampler.num_inference_steps
    cuts = config.prune.cuts(steps, each)
    left = [each, *cuts.values()]
    at_cuts = sum(left[:-1]) * config.prune.num_samples * _branches(config, {config.prune.by})
    at_the_end = left[-1] * config.score.num_samples * _branches(config, set(config.score.names))
    finetune = config.finetune
    samples = finetune.steps * finetune.batch_size * finetune.gradient_accumulation
    images = held_out * config.evaluation.images_per_prompt * (1 + arms)
    per_image = 2 * config.evaluation.sampler.num_inference_steps + 2 * config.score.num_samples * config.evaluation.pmi
    return {
        "generate": prompts * pools * 2 * config.prune.candidate_steps(steps, each),
        "score": prompts * pools * (at_cuts + at_the_end),
        "finetune": samples * TRAINING_COST * config.rounds * arms,
        "evaluate": images * per_image,
    }


def _branches(config: RunConfig, names: set[str]) -> int:
    """Evaluations of one noise draw for these scores."""
    if not names & set(POINTWISE_SCORES):
        return 0
    branches = 1 + bool(names & {"pmi", "pmi_orthogonal"})
    branches += config.score.neighbours * ("pmi_contrastive" in names)
    return branches + config.score.max_negatives * ("pmi_negatives" in names)


def seconds_per_evaluation(denoiser: Denoiser, batch_size: int) -> float:
    """Measured on one denoiser batch of both branches, after one to warm up."""
    embeddings = denoiser.encode_prompts([""]).expand(2 * batch_size, -1, -1)
    latents = torch.randn(2 * batch_size, *denoiser.latent_shape, device=denoiser.device)
    timesteps = torch.full((2 * batch_size,), 500, device=denoiser.device)
    for _ in range(2):
        began = time.perf_counter()
        with torch.inference_mode():
            denoiser.predict_epsilon(latents, timesteps, embeddings)
        if denoiser.device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / (2 * batch_size)


def describe(plan: Plan) -> str:
    """The plan as text: prompts, shards, candidates, denoiser evaluations, parameters, estimated memory and time."""
    config = plan.config
    take_cpus(config.resources.cpus_per_actor)
    denoiser = load_denoiser(config.model.path, config.model.dtype)
    each = seconds_per_evaluation(denoiser, config.resources.batch_size)
    if denoiser.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    prompts, held_out = len(plan.train), len(plan.held_out)
    counts = evaluations(config, prompts, held_out)
    actors = min(config.resources.num_actors[1], len(plan.shards))
    workers = {"finetune": config.resources.train_workers}
    minutes = {stage: count * each / workers.get(stage, actors) / 60 for stage, count in counts.items()}
    parameters = sum(p.numel() for p in denoiser.unet.parameters())
    arms = ", ".join([config.select.by, *config.evaluation.controls])
    lines = [
        f"run folder    {config.run_dir} (config {config.hash()})",
        f"model         {config.model.path}: denoiser of {parameters / 1e6:.1f} M parameters, {denoiser.dtype}",
        f"prompts       {prompts} to train on, {held_out} held out, {len(plan.skipped)} skipped",
        f"shards        {len(plan.shards)} of up to {config.generate.prompts_per_shard} prompts,"
        f" {len(plan.evaluation_shards)} for evaluation",
        f"candidates    {prompts * config.generate.candidates_per_prompt} a round, {config.rounds} round(s),"
        f" {config.select.top_k} kept per prompt by {arms}",
        f"actors        {actors}, batches of {config.resources.batch_size} candidates, about {memory:.1f} GiB each",
        f"speed         {1e3 * each:.2f} ms a denoiser evaluation, measured on one batch here",
        "denoiser evaluations and minutes (estimated; start-up of actors and workers comes on top):",
        *(f"  {stage:<12}{count:>14,}{minutes[stage]:>10.1f} min" for stage, count in counts.items()),
        f"  {'total':<12}{sum(counts.values()):>14,}{sum(minutes.values()):>10.1f} min",
    ]
    return "\n".join(lines)


def run_or_describe(config: RunConfig, dry_run: bool, until: str = "report"):
    """What the jobs do: print the plan on a dry run, otherwise run the pipeline up to a stage."""
    if dry_run:
        print(describe(Plan(config)))
    else:
        run_pipeline(config, until)
