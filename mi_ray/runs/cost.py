"""The cost of a run in denoiser evaluations and GPUs, from its config and the number of prompts."""

import math
from dataclasses import dataclass

from mi_ray.config import POINTWISE_SCORES, RunConfig, SamplerConfig, ScoreConfig
from mi_ray.runs.layout import baselines

TRAINING_COST = 3  # denoiser evaluations of a training pass: forward (1) and backward (2)
ONLINE_TRAINING_COST = TRAINING_COST + 2  # plus forward passes of the sampling policy and of the base model


def evaluations(config: RunConfig, prompts: int, held_out: int) -> dict[str, int]:
    """Number of denoiser evaluations of each stage. A training pass in `finetune` counts as `TRAINING_COST`.

    Steps outside sampler.guidance_interval cost half of what is counted here. Repeated gradient steps of
    attend-and-excite are not counted.
    """
    arms = 1 + len(config.evaluation.controls)
    images = held_out * config.evaluation.images_per_prompt * (1 + arms)
    judged = 2 * config.score.num_samples * config.evaluation.pmi
    # For one prompt and seed: the sum over its images at all guidance scales.
    per_image = sum(_per_candidate(s, config.score) + judged for s in config.evaluation.samplers.values())
    if config.online.updates:
        return _online(config, arms) | {"evaluate": images * per_image}
    pools = 1 + (config.rounds - 1) * arms  # all arms share the candidates of the first round
    each, steps = config.generate.candidates_per_prompt, config.sampler.num_inference_steps
    cuts = config.prune.cuts(steps, each)
    left = [each, *cuts.values()]
    at_cuts = sum(left[:-1]) * score_evaluations(config.score, {config.prune.by}, config.prune.num_samples)
    at_the_end = left[-1] * score_evaluations(config.score, set(config.score.names), config.score.num_samples)
    generate = round(config.sampler.evaluations * config.prune.candidate_steps(steps, each))
    if config.sampler.best_of.candidates:
        generate = each * _per_candidate(config.sampler, config.score)
    finetune = config.finetune
    samples = finetune.steps * finetune.batch_size * finetune.gradient_accumulation
    return {
        "generate": prompts * pools * generate,
        "score": prompts * pools * (at_cuts + at_the_end),
        "finetune": samples * TRAINING_COST * (config.rounds * arms + len(baselines(config))),
        "evaluate": images * per_image,
    }


def _online(config: RunConfig, arms: int) -> dict[str, int]:
    """Number of denoiser evaluations of all arms of an online run, without the evaluation."""
    online = config.online
    each, prompts = config.generate.candidates_per_prompt, online.updates * config.update_prompts
    trained = prompts * min(each, online.trained_candidates or each)
    checkpoints = -(-online.updates // online.validate_every) + 1
    drawn = prompts * each + checkpoints * online.validation_prompts * online.validation_candidates
    score = score_evaluations(config.score, set(config.score.names), config.score.num_samples)
    return {
        "generate": drawn * _per_candidate(config.sampler, config.score) * arms,
        "score": drawn * score * arms,
        "finetune": trained * online.inner_steps * online.noise_levels * ONLINE_TRAINING_COST * arms,
    }


def _per_candidate(sampler: SamplerConfig, score: ScoreConfig) -> int:
    """Number of denoiser evaluations for one sampled candidate. With best-of-N: for all N, with their scores."""
    steps, best_of = sampler.num_inference_steps, sampler.best_of
    spent = round(sampler.evaluations * best_of.candidate_steps(steps))
    if best_of.candidates:
        cuts = best_of.prune.cuts(steps, best_of.candidates)
        left = [best_of.candidates, *cuts.values()]
        spent += sum(left[:-1]) * score_evaluations(score, {best_of.prune.by}, best_of.prune.num_samples)
        spent += left[-1] * score_evaluations(score, {best_of.by}, score.num_samples)
    return spent


def score_evaluations(score: ScoreConfig, names: set[str], samples: int) -> int:
    """Number of denoiser evaluations per candidate for these scores."""
    if not names & set(POINTWISE_SCORES):
        return 0
    spent = samples * (1 + bool(names & {"pmi", "pmi_orthogonal"}))
    for name, others in (("pmi_contrastive", score.neighbours), ("pmi_negatives", score.max_negatives)):
        if name in names:
            kept = min(others, score.shortlist or others)
            first = min(samples, score.shortlist_samples)
            spent += first * others + (samples - first) * kept
    return spent


@dataclass(frozen=True)
class Machines:
    """The largest resources of a stage."""

    processes: int  # number of actors or workers
    gpus: int  # number of GPUs that they use
    at_once: int  # compared with one process; processes on the same GPU share its speed


def machines(config: RunConfig, shards: int, evaluation_shards: int) -> dict[str, Machines]:
    """The largest resources of each stage, for these numbers of shards."""
    resources = config.resources
    share = 1 if resources.gpus_per_actor == "auto" else resources.gpus_per_actor

    def of(processes: int, share: float) -> Machines:
        gpus = math.ceil(processes * share - 1e-9)
        return Machines(processes, gpus, min(processes, gpus) if share else processes)

    generate, evaluate = (of(min(resources.num_actors[1], count), share) for count in (shards, evaluation_shards))
    finetune = of(resources.train_workers[1], resources.train_gpus)
    return {"generate": generate, "score": generate, "finetune": finetune, "evaluate": evaluate}
