"""The schedule of rectified flows: against diffusers' schedulers and the definition of log SNR."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mi_ray.diffusion.flows import FlowSchedule, FlowTimes, evenly, linear_mu
from mi_ray.diffusion.sampling import SOLVERS, solver_plan

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SHIFTS = {
    "static": ({"shift": 3.0}, FlowTimes()),
    "by size": ({"use_dynamic_shifting": True}, FlowTimes(sigmas=evenly, mu=linear_mu)),
    "unshifted time": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        FlowTimes(sigmas=evenly, mu=lambda *_: 1.7, unshifted=True),
    ),
}


@pytest.fixture(params=SHIFTS)
def schedule(request) -> FlowSchedule:
    config, times = SHIFTS[request.param]
    return FlowSchedule.from_config(EULER | config, times, (4, 64, 64))


def test_levels_have_the_log_snr_that_was_asked_for(schedule):
    log_snr = torch.linspace(-9, 9, 37)
    timesteps, alpha, sigma = schedule.levels_at(log_snr)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha))
    torch.testing.assert_close(2 * (alpha / sigma).log(), log_snr, atol=2e-4, rtol=1e-4)
    for found, expected in zip(schedule.alpha_sigma(timesteps), (alpha, sigma), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(schedule.log_snr_at(timesteps).float(), log_snr, atol=2e-4, rtol=1e-4)
    low, high = schedule.log_snr_range
    assert low < -11
    assert high > 11


def test_the_table_is_that_of_whole_timesteps(schedule):
    alpha, sigma = schedule.table
    found = schedule.alpha_sigma(torch.arange(1000))
    torch.testing.assert_close((alpha.float(), sigma.float()), found)
    assert (sigma[0], alpha[0]) == (0, 1)


def test_a_level_of_a_solver_is_that_of_its_timestep(schedule):
    """What the network is told and how noisy its input is agree."""
    steps = schedule.steps(7, None, False)
    torch.testing.assert_close(schedule.alpha_sigma(steps.timesteps)[1].double(), steps.sigma, atol=1e-6, rtol=1e-6)
    assert steps.next_sigma[-1] == 0


def test_euler_steps_are_diffusers(schedule):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(schedule.config))
    steps = schedule.steps(5, None, False)
    mu = schedule.times.mu and schedule.times.mu(schedule.config, schedule.tokens, 5)
    scheduler.set_timesteps(5, sigmas=None if schedule.times.sigmas is None else evenly(5), mu=mu)
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), steps.sigma)
    table = solver_plan(schedule, "ddim", 5).table("flow_prediction")
    x, velocity = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, timestep in enumerate(scheduler.timesteps):
        keep, clean, _, _, kx, kp, p, q = table[i]
        assert (p, q) == (1, 0)  # the statistics are of the velocity
        expected = scheduler.step(velocity.float(), timestep, x.float(), return_dict=False)[0]
        x = keep * x + clean * (kx * x + kp * velocity)
        torch.testing.assert_close(x.float(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_ends_at_x0_if_the_network_knows_it(schedule, solver):
    """From pure noise on, with the exact velocity to one point."""
    plan = solver_plan(schedule, solver, 6)
    x0, x_t = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    previous = torch.zeros_like(x0)
    for row, drawn in zip(plan.table("flow_prediction"), noise, strict=True):
        keep, clean, momentum, spread, kx, kp, _, _ = row
        velocity = (x_t - x0) / -kp  # s = -kp, and x_s = x0 + s u
        found = kx * x_t + kp * velocity
        torch.testing.assert_close(found, x0)
        x_t = keep * x_t + clean * found + momentum * previous + spread * drawn
        previous = found
    torch.testing.assert_close(x_t, x0)


def test_ancestral_noise_keeps_the_variance_of_the_level():
    """From x_t of a known x0 a DDPM step gives x_s = (1 - s) x0 + s epsilon in distribution."""
    schedule = FlowSchedule.from_config(EULER, FlowTimes(), (4, 8, 8))
    plan = solver_plan(schedule, "ddpm", 8)
    keep, clean, _, spread, alpha, sigma = plan.coefficients.unbind(1)
    next_sigma = torch.cat([sigma[1:], sigma.new_zeros(1)])
    torch.testing.assert_close(keep * alpha + clean, 1 - next_sigma)
    torch.testing.assert_close((keep * sigma).square() + spread.square(), next_sigma.square())


def test_noise_is_mixed_at_the_time_that_a_half_precision_network_is_told():
    log_snr = torch.linspace(-5, 5, 11)
    config = EULER | {"shift": 1.0}
    rounded = FlowSchedule.from_config(config, FlowTimes(rounds=True), (4, 8, 8)).rounded_to(torch.bfloat16)
    timesteps, alpha, sigma = rounded.levels_at(log_snr)
    told = (timesteps / 1000).bfloat16()
    assert torch.equal(told.float(), sigma)
    torch.testing.assert_close(alpha, 1 - told.float())
    assert (2 * (alpha / sigma).log() - log_snr).abs().max() > 1e-3  # another level than the one asked for
    exact = FlowSchedule.from_config(config, FlowTimes(), (4, 8, 8)).rounded_to(torch.bfloat16)
    torch.testing.assert_close(2 * (exact.levels_at(log_snr)[1] / exact.levels_at(log_snr)[2]).log(), log_snr)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "epsilon"}, "prediction_type"),
        (EULER | {"invert_sigmas": True}, "invert_sigmas"),
        (EULER | {"stochastic_sampling": True}, "stochastic_sampling"),
    ],
)
def test_what_is_not_supported_is_named(config, named):
    with pytest.raises(ValueError, match=named):
        FlowSchedule.from_config(config, FlowTimes(), (4, 8, 8))


def test_a_spacing_of_timesteps_is_refused(schedule):
    with pytest.raises(ValueError, match=r"timestep_spacing is 'leading'.*none"):
        solver_plan(schedule, "ddim", 5, "leading")
