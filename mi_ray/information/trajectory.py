"""On-trajectory scores: pure functions of the statistics that sampling records, so stored candidates can be rescored.

Guidance evaluates the denoiser with and without the prompt at every step; these scores weigh what that already tells,
||Delta||^2 with Delta = epsilon(x_t, prompt) - epsilon(x_t, null). Guidance itself never enters.

Shapes throughout: delta_sq (n, S) fp32; timesteps (S,) of the sampler's steps; result (n,) in nats.
"""

from torch import Tensor

from mi_ray.diffusion.schedules import NoiseSchedule

DROPPED_SHARE = 0.05  # steps with t <= 50 of 1000: the weight is unbounded as t -> 0 (MI-TUNE's released code)


def kappa(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """kappa_t = beta_t T / (2 (1 - alphabar_t)), MI-TUNE (arXiv 2405.20759) algorithm 2: shape (S,).

    It is half of |d log SNR| per step for a variance-preserving schedule, times T.
    """
    t = timesteps.long().cpu()
    weights = schedule.betas[t] * schedule.num_train_timesteps / (2 * (1 - schedule.alphas_cumprod[t]))
    return weights.float().to(timesteps.device)


def mitune(delta_sq: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The released code's score: mean over steps t > T/20 of kappa_t ||Delta||^2."""
    retained = timesteps > DROPPED_SHARE * schedule.num_train_timesteps
    return (delta_sq * kappa(schedule, timesteps))[:, retained].mean(1)


def mitune_eq2(delta_sq: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The paper's eq. 2: `mitune` with a further factor alpha_t = 1 - beta_t in the weight."""
    alpha = schedule.alphas[timesteps.long().cpu()].float().to(delta_sq.device)
    return mitune(delta_sq * alpha, timesteps, schedule)


def trajectory_banded(
    delta_sq: Tensor, timesteps: Tensor, schedule: NoiseSchedule, log_snr_min: float, log_snr_max: float
) -> Tensor:
    """The part of the mean of kappa_t ||Delta||^2 over all steps that falls into a band of log SNR."""
    log_snr = schedule.log_snr[timesteps.long().cpu()].to(delta_sq.device)
    inside = (log_snr >= log_snr_min) & (log_snr <= log_snr_max)
    return (delta_sq * kappa(schedule, timesteps) * inside).mean(1)
