"""On-trajectory scores against the papers' formulas written out step by step."""

import torch

from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information import trajectory

SCHEDULE = NoiseSchedule.from_config(
    {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)
TIMESTEPS = torch.tensor([951, 701, 451, 201, 51, 50, 1])
DELTA_SQ = torch.rand(3, len(TIMESTEPS), generator=torch.Generator().manual_seed(0))


def by_hand(extra):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    values = []
    for row in DELTA_SQ.tolist():
        terms = []
        for t, delta_sq in zip(TIMESTEPS.tolist(), row, strict=True):
            if t > 50:
                weight = betas[t] * 1000 / (2 * (1 - alphas_cumprod[t]))
                terms.append(weight * extra(betas[t]) * delta_sq)
        values.append(sum(terms) / len(terms))
    return torch.stack(values).float()


def test_mitune_is_the_released_codes_mean_over_retained_steps():
    torch.testing.assert_close(trajectory.mitune(DELTA_SQ, TIMESTEPS, SCHEDULE), by_hand(lambda beta: 1))


def test_mitune_eq2_has_the_factor_alpha():
    torch.testing.assert_close(trajectory.mitune_eq2(DELTA_SQ, TIMESTEPS, SCHEDULE), by_hand(lambda beta: 1 - beta))


def test_kappa_is_half_the_log_snr_that_a_step_spans():
    timesteps = torch.arange(100, 900)
    spanned = -(SCHEDULE.log_snr[101:901] - SCHEDULE.log_snr[99:899]) / 2
    kappa = trajectory.kappa(SCHEDULE, timesteps) / SCHEDULE.num_train_timesteps
    torch.testing.assert_close(kappa, (spanned / 2).float(), rtol=0.02, atol=0)


def test_bands_add_up_to_the_whole():
    all_steps = trajectory.trajectory_banded(DELTA_SQ, TIMESTEPS, SCHEDULE, -20, 20)
    low = trajectory.trajectory_banded(DELTA_SQ, TIMESTEPS, SCHEDULE, -20, -1)
    high = trajectory.trajectory_banded(DELTA_SQ, TIMESTEPS, SCHEDULE, -1, 20)
    torch.testing.assert_close(all_steps, low + high)
    assert (low > 0).all()
    assert (high > 0).all()
