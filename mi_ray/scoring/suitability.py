"""Whether the scores and the sampler of a run suit its model, from the model's configuration files alone."""

import logging
from contextlib import suppress

from torch import Tensor

from mi_ray.config import FLOW_SCORES, ON_TRAJECTORY, RunConfig, ScoreConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.folders import distilled_reason, load_schedule, model_family
from mi_ray.diffusion.sampling import solver_plan
from mi_ray.diffusion.schedules import FLOW, Schedule
from mi_ray.guidance.methods import family_fault
from mi_ray.information.trajectory import flow_retained, retained
from mi_ray.scoring.rewards import reward_faults
from mi_ray.scoring.scorer import probed_band

DIFFUSION_SCORES = ("mitune", "mitune_eq2")  # of variance-preserving models; FLOW_SCORES are of flows
_AGAINST_NULL = (*ON_TRAJECTORY, "pmi", "pmi_orthogonal")  # compare with the unconditional prediction
log = logging.getLogger(__name__)


def check_suitability(config: RunConfig):
    """Check the noise levels, the solver and the scores of a run against its model, and its rewards against its scores.
    Warn of a distilled model.

    Raises:
        ConfigError: the model does not allow a score, a band, a number of steps or a guidance method; or a reward has
            no value.
        ValueError: the model lacks a configuration, or the hub cannot be asked.
    """
    schedule = load_schedule(config.model.path, config.model.size)
    faults, sampler, tuning, others = score_faults(config, schedule), config.sampler, config.finetune, []
    if tuning.timestep_density != "uniform" and schedule.prediction_type != FLOW:
        others.append("finetune.timestep_density: it is for flow models only; set uniform")
    try:
        probed_band(config.score, schedule)
    except ValueError as error:
        faults += str(error).split("\n")
    try:
        plan = solver_plan(schedule, sampler.solver, sampler.num_inference_steps, sampler.timestep_spacing)
        faults += _step_faults(config, schedule, plan.timesteps)
        if tuning.method == "dpok" and schedule.prediction_type == FLOW:
            others.append("finetune.method: dpok is not available for a flow model; use nft, awm, dgpo or crd")
        elif tuning.method == "dpok" and not len(plan.noisy(tuning.log_snr_max)):
            lowest = f"no sampling step that adds noise has a log SNR of at most {tuning.log_snr_max}"
            others.append(f"finetune.log_snr_max: {lowest}, so finetune.method dpok has nothing to train: raise it")
    except ValueError as error:
        faults += str(error).split("\n")
    with suppress(ValueError):  # the check of the metrics reports names that are no metric
        others += reward_faults(config)
    faults = [f"score: {fault}" for fault in faults] + others + method_faults(config)
    if faults:
        raise ConfigError(faults)
    if warning := distillation_warning(config):
        log.warning(warning)


def check_pairs(model: str, size: tuple[int | None, int | None], score: ScoreConfig):
    """Check the band of the scores of pairs against their model. Warn of a distilled model.

    Raises:
        ValueError: the model has no noise level in the band.
    """
    probed_band(score, load_schedule(model, size))
    if reason := distilled_reason(model):
        log.warning("model: %s, but pmi compares with one; the log odds against hard negatives do not", reason)


def method_faults(config: RunConfig) -> list[str]:
    """One error message for each guidance method that does not work with the model's family."""
    faults = []
    for field, sampler in (("sampler", config.sampler), ("evaluation.sampler", config.evaluation.sampler)):
        if sampler.guidance_method:
            fault = family_fault(sampler.guidance_method, model_family(config.model.path))
            faults += [f"{field}: {fault}"] if fault else []
    return faults


def score_faults(config: RunConfig, schedule: Schedule) -> list[str]:
    """One error message for each on-trajectory score that is not defined for a model with this schedule."""
    asked = config.candidate_scores | config.evaluation.sampler.best_of.scores
    if "trajectory_banded" in asked:
        asked.add(config.score.banded)
    flow = schedule.prediction_type == FLOW
    kind, wrong, right = (
        ("a flow model", DIFFUSION_SCORES, FLOW_SCORES)
        if flow
        else ("a variance-preserving model", FLOW_SCORES, DIFFUSION_SCORES)
    )
    return [
        f"{name} is not defined for {kind}; use {', '.join(right)}, asd or a pmi score"
        for name in sorted(asked & set(wrong))
    ]


def _step_faults(config: RunConfig, schedule: Schedule, timesteps: Tensor) -> list[str]:
    """One error message for each on-trajectory score that drops all steps of the sampler."""
    if schedule.prediction_type == FLOW:
        names, counted = FLOW_SCORES, flow_retained(schedule.alpha_sigma(timesteps)[1])
    else:
        names, counted = DIFFUSION_SCORES, retained(timesteps, schedule)
    asked = config.candidate_scores
    of_banded = {"trajectory_banded"} if config.score.banded in names else set()
    return [
        f"{name} does not count the least noisy steps and steps of pure noise, and sampler.num_inference_steps"
        f" {len(timesteps)} leaves no other step; raise it"
        for name in sorted(asked & {*names, *of_banded})
        if not counted.any()
    ]


def distillation_warning(config: RunConfig) -> str | None:
    """What a distilled model means for this run; None: nothing, or the model is not distilled.

    The unconditional prediction of such a model is what it gives for the empty prompt. It was not trained to be the
    mean over all prompts, so a difference from it is no estimate of mutual information.
    """
    asked = config.candidate_scores | config.evaluation.sampler.best_of.scores | {config.select.by}
    affected = [f"score {name}" for name in sorted(asked & set(_AGAINST_NULL))]
    affected += ["sampler.guidance_scale above 1"] if config.sampler.branches == 2 else []
    reason = distilled_reason(config.model.path) if affected else None
    if reason is None:
        return None
    return (
        f"model.path: {reason}, but {', '.join(affected)} compares with one: the values are not mutual information; use"
        " pmi_contrastive or pmi_negatives, and guidance_scale 1"
    )
