"""On-trajectory scores: pure functions of the statistics recorded during sampling. Stored candidates can be rescored.

Guidance evaluates the denoiser with and without the prompt at every step. The scores are weighted sums of

    delta_sq = ||Delta||^2,  cross = <g, Delta>,  Delta = g - g_null

where g is the model's conditional prediction and g_null the unconditional one: epsilon of a variance-preserving model,
or the velocity u = epsilon - x0 of a rectified flow. Only `rfmi_guided` depends on the guidance scale.

Shapes: delta_sq, cross (n, S) fp32; timesteps, times (S,) of the sampler's steps; result (n,) in nats.
Every score is linear in its curves. A score of `banded` curves is therefore the contribution of that band.
"""

import torch
from torch import Tensor

from mi_ray.diffusion.schedules import NoiseSchedule

DROPPED_SHARE = 0.05  # drop steps with t <= 50 of 1000: the weight diverges as t -> 0 (released code of both papers)


def banded(curve: Tensor, log_snr: Tensor, log_snr_min: float, log_snr_max: float) -> Tensor:
    """The curve (n, S) with zeros at the steps outside a band of log SNR. Its score is the contribution of the band.

    Args:
        log_snr: (S,) at the steps, `schedule.log_snr_at(timesteps)`.
    """
    inside = (log_snr >= log_snr_min) & (log_snr <= log_snr_max)
    return torch.where(inside.to(curve.device), curve, 0.0)  # NaN outside the band if guidance was off


def asd(delta_sq: Tensor) -> Tensor:
    """Unweighted sum of ||Delta||^2 over the steps, the signal of ASD / CFG-rejection. Not in nats."""
    return delta_sq.sum(1)


# ---------------------------------------------------------------------------------------------- diffusion
def kappa(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """kappa_t = beta_t T / (2 (1 - alphabar_t)), MI-TUNE (arXiv 2405.20759) algorithm 2: shape (S,).

    For a variance-preserving schedule this is T times half of |d log SNR| per step.
    """
    t = timesteps.long().cpu()
    weights = schedule.betas[t] * schedule.num_train_timesteps / (2 * (1 - schedule.alphas_cumprod[t]))
    return weights.float().to(timesteps.device)


def retained(timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Which steps count for `mitune`, (S,) bool."""
    return timesteps > DROPPED_SHARE * schedule.num_train_timesteps


def mitune(delta_sq: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The score of the released code: mean over steps t > T/20 of kappa_t ||Delta||^2."""
    return (delta_sq * kappa(schedule, timesteps).to(delta_sq.device))[:, retained(timesteps, schedule)].mean(1)


def mitune_eq2(delta_sq: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The paper's eq. 2: `mitune` with the additional factor alpha_t = 1 - beta_t in the weight."""
    alpha = schedule.alphas[timesteps.long().cpu()].float().to(delta_sq.device)
    return mitune(delta_sq * alpha, timesteps, schedule)


# ---------------------------------------------------------------------------------------------- rectified flow
def rfmi(cross: Tensor, times: Tensor) -> Tensor:
    """RFMI (arXiv 2503.14358): mean over steps of (1 - t) / t <u, u - u_null>, without steps t <= 0.05 and t = 1.

    Args:
        times: (S,) in (0, 1], where 1 is pure noise: diffusers' timesteps / 1000.
    """
    return (cross * _flow_weight(times, cross))[:, flow_retained(times)].mean(1)


def rfmi_guided(cross: Tensor, delta_sq: Tensor, times: Tensor, guidance_scale: float) -> Tensor:
    """RFMI's released code: `rfmi` with the guided velocity u_cfg = u_null + w Delta instead of u.

    <u_cfg, u_cfg - u_null> = w <u_null + w Delta, Delta> = w (cross + (w - 1) delta_sq).
    """
    return rfmi(guidance_scale * (cross + (guidance_scale - 1) * delta_sq), times)


def flow_difference(delta_sq: Tensor, times: Tensor) -> Tensor:
    """The integral of (1 - t) / t ||u - u_null||^2 dt over the retained steps: i_o of a flow on its sampling path.

    It follows from i_o's 1/2 ||epsilon difference||^2 d log SNR with epsilon_hat = x_t + (1 - t) u and
    d log SNR = 2 dt / (t (1 - t)). Each step represents the interval up to half the distance to its neighbours, limited
    to t = 0.05 and 1.
    """
    inside = flow_retained(times)
    kept = times[inside].double()
    middles = (kept[1:] + kept[:-1]) / 2
    edges = torch.cat([kept.new_ones(1), middles, kept.new_full((1,), DROPPED_SHARE)])
    widths = (edges[:-1] - edges[1:]).to(delta_sq.device, delta_sq.dtype)
    return (delta_sq * _flow_weight(times, delta_sq))[:, inside] @ widths


def _flow_weight(times: Tensor, like: Tensor) -> Tensor:
    return ((1 - times) / times).to(like.device, like.dtype)


def flow_retained(times: Tensor) -> Tensor:
    """Which steps count for the scores of a flow, (S,) bool."""
    return (times > DROPPED_SHARE) & (times < 1)
