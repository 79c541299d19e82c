import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from mi_ray.diffusion.schedules import (
    PREDICTION_TYPES,
    NoiseSchedule,
    alpha_sigma_at,
    epsilon_from,
    epsilon_from_x0,
    prediction_from,
    x0_from_epsilon,
)

CONFIGS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": torch.linspace(0.001, 0.05, 100).tolist()},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_betas_and_abar_equal_diffusers(config):
    scheduler = DDPMScheduler(**config, clip_sample=False)
    schedule = NoiseSchedule.from_config(scheduler.config)
    # diffusers computes in fp32; the relative error of 1 - abar is largest at the clean end
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=2e-4, atol=0)
    torch.testing.assert_close(schedule.betas.float(), scheduler.betas, rtol=2e-4, atol=0)
    assert schedule.num_train_timesteps == len(scheduler.betas)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_log_snr_and_timestep_are_inverse(config):
    schedule = NoiseSchedule.from_config(config)
    whole = torch.arange(schedule.num_train_timesteps, dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep_at(schedule.log_snr), whole)

    fractional = torch.tensor([0.25, 17.5, 98.75], dtype=torch.float64)
    alpha, sigma = alpha_sigma_at(schedule.log_snr, fractional)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close(schedule.timestep_at(2 * (alpha / sigma).log()), fractional)


def test_alpha_and_sigma_at_integer_timesteps_equal_the_table():
    schedule = NoiseSchedule.from_config(CONFIGS["scaled_linear"])
    t = torch.tensor([0, 1, 500, 998, 999])
    alpha, sigma = alpha_sigma_at(schedule.log_snr.float(), t)
    torch.testing.assert_close(alpha, schedule.alphas_cumprod[t].sqrt().float())
    torch.testing.assert_close(sigma, (1 - schedule.alphas_cumprod[t]).sqrt().float())


def test_timestep_outside_the_schedule_is_clamped():
    schedule = NoiseSchedule.from_config(CONFIGS["scaled_linear"])
    assert schedule.timestep_at(torch.tensor([50.0, -50.0])).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conversions_round_trip(prediction_type):
    torch.manual_seed(0)
    x0, epsilon = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    angle = torch.linspace(0.05, 1.5, 5, dtype=torch.float64).view(-1, 1, 1, 1)
    alpha, sigma = angle.cos(), angle.sin()
    x_t = alpha * x0 + sigma * epsilon
    prediction = prediction_from(prediction_type, x0, epsilon, alpha, sigma)
    torch.testing.assert_close(epsilon_from(prediction_type, prediction, x_t, alpha, sigma), epsilon)
    torch.testing.assert_close(x0_from_epsilon(epsilon, x_t, alpha, sigma), x0)
    torch.testing.assert_close(epsilon_from_x0(x0, x_t, alpha, sigma), epsilon)


def test_velocity_equals_diffusers():
    torch.manual_seed(0)
    scheduler = DDPMScheduler(clip_sample=False)
    x0, epsilon = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([10, 400, 990])
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in alpha_sigma_at(NoiseSchedule.from_config({}).log_snr.float(), t))
    ours = prediction_from("v_prediction", x0, epsilon, alpha, sigma)
    torch.testing.assert_close(ours, scheduler.get_velocity(x0, epsilon, t), rtol=1e-4, atol=1e-4)


def test_config_of_stable_diffusion():
    sd = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    schedule = NoiseSchedule.from_config(PNDMScheduler(**sd, set_alpha_to_one=False).config)
    assert (schedule.prediction_type, schedule.timestep_spacing, schedule.steps_offset) == ("epsilon", "leading", 1)
    assert schedule.final_alpha_cumprod == schedule.alphas_cumprod[0]
    assert NoiseSchedule.from_config(DDIMScheduler(**sd, clip_sample=False).config).final_alpha_cumprod == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rescale_betas_zero_snr", True),
        ("clip_sample", True),
        ("thresholding", True),
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "sigmoid"),
        ("timestep_spacing", "karras"),
        ("variance_type", "learned_range"),
        ("beta_end", 2.0),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_unsupported_schedules_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        NoiseSchedule.from_config({key: value})


def test_all_faults_of_a_schedule_are_listed():
    with pytest.raises(ValueError, match="thresholding") as error:
        NoiseSchedule.from_config({"thresholding": True, "prediction_type": "x", "_class_name": "DDIMScheduler"})
    assert len(str(error.value).split("\n")) == 3  # clip_sample is true by default in DDIMScheduler


def test_a_zero_terminal_snr_is_that_of_diffusers():
    scheduler = DDIMScheduler(
        **CONFIGS["scaled_linear"], prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False
    )
    schedule = NoiseSchedule.from_config(scheduler.config)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=2e-4, atol=1e-7)
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.log_snr_range == (schedule.log_snr[-2].item(), schedule.log_snr[0].item())  # where epsilon is known
    alpha, sigma = schedule.alpha_sigma(torch.tensor([997, 998, 999]))
    torch.testing.assert_close(alpha.double(), schedule.table[0][-3:], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(sigma.double(), schedule.table[1][-3:])
