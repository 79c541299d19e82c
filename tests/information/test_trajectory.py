"""On-trajectory scores, compared with the formulas of the papers, step by step."""

import math

import pytest
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


def test_mitune_equals_the_released_code():
    torch.testing.assert_close(trajectory.mitune(DELTA_SQ, TIMESTEPS, SCHEDULE), by_hand(lambda beta: 1))


def test_mitune_eq2_has_the_factor_alpha():
    torch.testing.assert_close(trajectory.mitune_eq2(DELTA_SQ, TIMESTEPS, SCHEDULE), by_hand(lambda beta: 1 - beta))


def test_kappa_is_half_the_log_snr_of_a_step():
    timesteps = torch.arange(100, 900)
    spanned = -(SCHEDULE.log_snr[101:901] - SCHEDULE.log_snr[99:899]) / 2
    kappa = trajectory.kappa(SCHEDULE, timesteps) / SCHEDULE.num_train_timesteps
    torch.testing.assert_close(kappa, (spanned / 2).float(), rtol=0.02, atol=0)


# ------------------------------------------------------------------------------------------ rectified flow
TIMES = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.06, 0.05, 0.01])
GUIDANCE = 4.0


def velocities():
    """(conditional, unconditional) velocities (n, S, dim), and their recorded curves."""
    generator = torch.Generator().manual_seed(1)
    conditional, unconditional = (torch.randn(3, len(TIMES), 20, generator=generator) for _ in range(2))
    delta = conditional - unconditional
    return conditional, unconditional, delta.square().sum(-1), (conditional * delta).sum(-1)


def test_rfmi_equals_the_paper():
    conditional, unconditional, _, cross = velocities()
    terms = [
        (1 - t) / t * (conditional[:, i] * (conditional[:, i] - unconditional[:, i])).sum(-1)
        for i, t in enumerate(TIMES.tolist())
        if 0.05 < round(t, 6) < 1
    ]
    assert len(terms) == 4
    torch.testing.assert_close(trajectory.rfmi(cross, TIMES), torch.stack(terms).mean(0))


def test_rfmi_guided_equals_the_released_code():
    conditional, unconditional, delta_sq, cross = velocities()
    guided = unconditional + GUIDANCE * (conditional - unconditional)
    terms = [
        (1 - t) / t * (guided[:, i] * (guided[:, i] - unconditional[:, i])).sum(-1)
        for i, t in enumerate(TIMES.tolist())
        if 0.05 < round(t, 6) < 1
    ]
    computed = trajectory.rfmi_guided(cross, delta_sq, TIMES, GUIDANCE)
    torch.testing.assert_close(computed, torch.stack(terms).mean(0))
    torch.testing.assert_close(trajectory.rfmi_guided(cross, delta_sq, TIMES, 1.0), trajectory.rfmi(cross, TIMES))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_difference_does_not_depend_on_the_spacing(shift):
    """||epsilon difference||^2 = (1 - t)^2 ||velocity difference||^2, integrated on both axes."""
    uniform = torch.linspace(1, 0, 2001, dtype=torch.float64)[:-1]
    times = shift * uniform / (1 + (shift - 1) * uniform)  # SD3's (arXiv 2403.03206, eq. 23)
    delta_sq = (30 * times.square() * (1 + times.sin()))[None]
    alpha = torch.linspace(-12, 2 * math.log(0.95 / 0.05), 20001, dtype=torch.float64)
    t = torch.sigmoid(-alpha / 2)
    truth = torch.trapezoid(0.5 * (1 - t).square() * 30 * t.square() * (1 + t.sin()), alpha)
    torch.testing.assert_close(trajectory.flow_difference(delta_sq, times)[0], truth, rtol=2e-3, atol=0)


# ------------------------------------------------------------------------------------------ all of them
def test_asd_has_no_weights():
    torch.testing.assert_close(trajectory.asd(DELTA_SQ), torch.stack([row.sum() for row in DELTA_SQ]))


@pytest.mark.parametrize("name", ["mitune", "mitune_eq2", "asd", "rfmi", "rfmi_guided", "flow_difference"])
def test_bands_sum_to_the_whole_score(name):
    _, _, delta_sq, cross = velocities()
    flow = name in ("rfmi", "rfmi_guided", "flow_difference")
    log_snr = 2 * torch.logit(1 - TIMES.clamp(max=1 - 1e-6)) if flow else SCHEDULE.log_snr[TIMESTEPS]

    def score(low, high):
        curves = [trajectory.banded(curve, log_snr, low, high) for curve in (delta_sq, cross)]
        match name:
            case "mitune" | "mitune_eq2":
                return getattr(trajectory, name)(curves[0], TIMESTEPS, SCHEDULE)
            case "rfmi_guided":
                return trajectory.rfmi_guided(curves[1], curves[0], TIMES, GUIDANCE)
            case "rfmi":
                return trajectory.rfmi(curves[1], TIMES)
            case "flow_difference":
                return trajectory.flow_difference(curves[0], TIMES)
        return trajectory.asd(curves[0])

    low, high = score(-40, -1), score(-1, 40)
    torch.testing.assert_close(score(-40, 40), low + high)
    assert (low != 0).all()
    assert (high != 0).all()
