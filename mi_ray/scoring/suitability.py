"""Whether the scores and the sampler of a run suit its model, from the model's configuration files alone."""

import logging

from mi_ray.config import FLOW_SCORES, ON_TRAJECTORY, RunConfig, ScoreConfig
from mi_ray.diffusion.folders import distilled_reason, load_schedule
from mi_ray.diffusion.sampling import solver_plan
from mi_ray.diffusion.schedules import FLOW, Schedule
from mi_ray.scoring.scorer import probed_band

DIFFUSION_SCORES = ("mitune", "mitune_eq2")  # of variance-preserving models; FLOW_SCORES are of flows
_AGAINST_NULL = (*ON_TRAJECTORY, "pmi", "pmi_orthogonal")  # compare with the unconditional prediction
log = logging.getLogger(__name__)


def check_suitability(config: RunConfig):
    """Check the noise levels, the solver and the scores of a run against its model. Warn of a distilled model.

    Raises:
        ValueError: one line for each score, band or step count that the model does not allow.
    """
    schedule = load_schedule(config.model.path, config.model.size)
    faults = score_faults(config, schedule)
    if config.finetune.timestep_density != "uniform" and schedule.prediction_type != FLOW:
        faults.append("finetune.timestep_density is for flow models only; set uniform")
    for check in (
        lambda: probed_band(config.score, schedule),
        lambda: solver_plan(
            schedule,
            config.sampler.solver,
            config.sampler.num_inference_steps,
            timestep_spacing=config.sampler.timestep_spacing,
        ),
    ):
        try:
            check()
        except ValueError as error:
            faults += str(error).split("\n")
    if faults:
        raise ValueError("\n".join(faults))
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


def score_faults(config: RunConfig, schedule: Schedule) -> list[str]:
    """One error message for each on-trajectory score that is not defined for a model with this schedule."""
    asked = {*config.score.names, config.prune.by}
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


def distillation_warning(config: RunConfig) -> str | None:
    """What a distilled model means for this run; None: nothing, or the model is not distilled.

    The unconditional prediction of such a model is what it gives for the empty prompt. It was not trained to be the
    mean over all prompts, so a difference from it is no estimate of mutual information.
    """
    asked = {*config.score.names, config.prune.by, config.select.by}
    affected = [f"score {name}" for name in sorted(asked & set(_AGAINST_NULL))]
    affected += ["sampler.guidance_scale above 1"] if config.sampler.branches == 2 else []
    reason = distilled_reason(config.model.path) if affected else None
    if reason is None:
        return None
    return (
        f"model.path: {reason}, but {', '.join(affected)} compares with one: the values are not mutual information; use"
        " pmi_contrastive or pmi_negatives, and guidance_scale 1"
    )
