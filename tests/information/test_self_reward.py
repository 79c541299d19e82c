"""SOLACE's self-reward, with denoisers whose errors are known."""

import math

import pytest
import torch

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information.self_reward import SAMPLES, self_reward, self_reward_levels

SCHEDULE = NoiseSchedule(torch.linspace(0.9999, 0.001, 1000, dtype=torch.float64))
SHAPE = (2, 4, 4)


def reward(predict, latents: torch.Tensor, timesteps: torch.Tensor, index: list[int]) -> torch.Tensor:
    count = max(index) + 1
    conditioning = Conditioning({"embeds": torch.arange(float(count))[:, None]})
    return self_reward(predict, SCHEDULE, latents, torch.tensor(index), conditioning, timesteps, list(range(count)), 16)


def test_the_last_half_of_the_steps_without_the_last_one():
    assert self_reward_levels(torch.arange(10, 0, -1)).tolist() == [6, 5, 4, 3, 2]  # steps 4 to 8 of 0 to 9
    assert self_reward_levels(torch.tensor([7])).tolist() == [7]


def test_reward_is_the_mean_logarithm_over_levels():
    """A prediction that is the noise plus a constant has the same error for every noise of a level."""
    timesteps = torch.tensor([600, 200])
    wrong = {600: 2.0, 200: 0.1}
    signal, sigma = SCHEDULE.alpha_sigma(timesteps)
    calls = []

    def predict(x, t, conditioning):
        calls.append(len(x))
        near = (t[:, None].float() - timesteps.float()).abs().argmin(1)
        noise = (x - signal[near].view(-1, 1, 1, 1).float() * 3) / sigma[near].view(-1, 1, 1, 1).float()
        extra = torch.tensor([wrong[int(timesteps[n])] for n in near]) * (1 + conditioning["embeds"][:, 0])
        return noise + extra.view(-1, 1, 1, 1)

    latents = torch.full((3, *SHAPE), 3.0)
    found = reward(predict, latents, timesteps, [0, 1, 1])
    for value, factor in zip(found.tolist(), (1, 2, 2), strict=True):
        expected = -sum(math.log((factor * w) ** 2 + 1e-6) for w in wrong.values()) / 2
        assert value == pytest.approx(expected, rel=2e-3)
    assert sum(calls) == 3 * 2 * SAMPLES  # only the conditional branch


def test_noise_samples_are_antithetic_pairs():
    """A prediction of zero: the error is the noise's own mean square, the same for both signs."""
    seen = []

    def predict(x, t, conditioning):
        seen.append(x)
        return torch.zeros_like(x)

    reward(predict, torch.zeros((1, *SHAPE)), torch.tensor([500]), [0])
    noise = torch.cat(seen)
    assert len(noise) == SAMPLES
    torch.testing.assert_close(noise[0::2], -noise[1::2])
    assert len({float(x.sum()) for x in noise[0::2]}) == SAMPLES // 2
