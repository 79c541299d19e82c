"""The plan of a run before it starts: how much of everything, from one measured batch how long and how big."""

from mi_ray.config import POINTWISE_SCORES, RunConfig, ScoreConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.stages.machine import take_cpus
from mi_ray.stages.pipeline import Plan, baselines, run_pipeline
from mi_ray.stages.trial import Trial, best, sweep_dtypes, try_batch

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
    at_cuts = sum(left[:-1]) * score_evaluations(config.score, {config.prune.by}, config.prune.num_samples)
    at_the_end = left[-1] * score_evaluations(config.score, set(config.score.names), config.score.num_samples)
    finetune = config.finetune
    samples = finetune.steps * finetune.batch_size * finetune.gradient_accumulation
    images = held_out * config.evaluation.images_per_prompt * (1 + arms)
    per_image = 2 * config.evaluation.sampler.num_inference_steps + 2 * config.score.num_samples * config.evaluation.pmi
    return {
        "generate": prompts * pools * 2 * config.prune.candidate_steps(steps, each),
        "score": prompts * pools * (at_cuts + at_the_end),
        "finetune": samples * TRAINING_COST * (config.rounds * arms + len(baselines(config))),
        "evaluate": images * per_image,
    }


def score_evaluations(score: ScoreConfig, names: set[str], samples: int) -> int:
    """Evaluations of a candidate for these scores."""
    if not names & set(POINTWISE_SCORES):
        return 0
    spent = samples * (1 + bool(names & {"pmi", "pmi_orthogonal"}))
    for name, others in (("pmi_contrastive", score.neighbours), ("pmi_negatives", score.max_negatives)):
        if name in names:
            kept = min(others, score.shortlist or others)
            first = min(samples, score.shortlist_samples)
            spent += first * others + (samples - first) * kept
    return spent


def describe(plan: Plan) -> str:
    """The plan as text: prompts, shards, candidates, denoiser evaluations, parameters, estimated memory, time, cost."""
    config, resources = plan.config, plan.config.resources
    take_cpus(resources.cpus_per_actor)
    by_dtype = sweep_dtypes(config.model.path, config.model.dtype)
    denoiser = load_denoiser(config.model.path, config.model.dtype)
    trials = next(iter(by_dtype.values()))
    mine = best(trials) if resources.batch_size == "auto" else try_batch(denoiser, resources.batch_size)
    each = mine.seconds_per_evaluation
    prompts, held_out = len(plan.train), len(plan.held_out)
    skipped = sum(map(plan.skipped_count, plan.skipped))
    counts = evaluations(config, prompts, held_out)
    actors = min(resources.num_actors[1], len(plan.shards))
    workers = {"finetune": resources.train_workers[1]}
    minutes = {stage: count * each / workers.get(stage, actors) / 60 for stage, count in counts.items()}
    parameters = sum(p.numel() for p in denoiser.unet.parameters())
    arms = ", ".join([config.select.by, *config.evaluation.controls])
    lines = [
        f"run folder    {config.run_dir} (config {config.hash()})",
        f"model         {config.model.path}: denoiser of {parameters / 1e6:.1f} M parameters, {denoiser.dtype}",
        f"prompts       {prompts} to train on, {held_out} held out, {skipped} skipped",
        f"shards        {len(plan.shards)} of up to {config.generate.prompts_per_shard} prompts,"
        f" {len(plan.evaluation_shards)} for evaluation",
        f"candidates    {prompts * config.generate.candidates_per_prompt} a round, {config.rounds} round(s),"
        f" {config.select.top_k} kept per prompt by {arms}",
        f"actors        {actors}, batches of {mine.batch_size} candidates, about {mine.memory_gib:.1f} GiB each",
        f"speed         {1e3 * each:.2f} ms a denoiser evaluation, measured here; by precision and batch size:",
        *(f"  {dtype:<12}{_swept(of_dtype)}" for dtype, of_dtype in by_dtype.items()),
        "denoiser evaluations and minutes (estimated; start-up of actors and workers comes on top):",
        *(f"  {stage:<12}{count:>14,}{minutes[stage]:>10.1f} min" for stage, count in counts.items()),
        f"  {'total':<12}{sum(counts.values()):>14,}{sum(minutes.values()):>10.1f} min",
    ]
    if resources.price_per_gpu_hour is not None:
        lines.append(_cost(plan, minutes, actors))
    return "\n".join(lines)


def _swept(trials: list[Trial]) -> str:
    """Batch sizes with their speed, and the memory of the largest."""
    if not trials:
        return "not even the smallest batch fits"
    speeds = ", ".join(f"{trial.batch_size}: {1e3 * trial.seconds_per_evaluation:.2f}" for trial in trials)
    return f"{speeds} ms; up to {trials[-1].memory_gib:.1f} GiB"


def _cost(plan: Plan, minutes: dict[str, float], actors: int) -> str:
    """GPU-hours of all stages, and what they cost."""
    resources = plan.config.resources
    share = 1 if resources.gpus_per_actor == "auto" else resources.gpus_per_actor
    training = minutes["finetune"] * resources.train_workers[1] * resources.train_gpus
    hours = (training + sum(m for stage, m in minutes.items() if stage != "finetune") * actors * share) / 60
    price = resources.price_per_gpu_hour
    return f"cost          {hours:,.2f} GPU-hours at {price:g} each: {hours * price:,.2f}"


def run_or_describe(config: RunConfig, dry_run: bool, until: str = "report"):
    """What the jobs do: print the plan on a dry run, otherwise run the pipeline up to a stage."""
    if dry_run:
        print(describe(Plan(config)))
    else:
        run_pipeline(config, until)
