"""The self-reward of SOLACE (arXiv 2603.00918): how well a model restores the noise that it adds to its own image.

It needs no other prompt and no second model. It is not a mutual information: an image that is easy to denoise under any
prompt has a high reward. The scores of `pointwise` subtract this.
"""

import torch
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import Schedule
from mi_ray.information.pointwise import PredictEpsilon, denoising_errors
from mi_ray.information.probes import Design, Probes

SAMPLES = 8  # noise samples at a noise level, in antithetic pairs
LAST = 0.5  # share of the sampling steps, the last ones, that are used: released code (the paper: 0.6)
FLOOR = 1e-6  # added to the error before the logarithm


def self_reward_levels(timesteps: Tensor) -> Tensor:
    """The timesteps of the reward: the last half of the sampling steps without the very last one.

    Args:
        timesteps: (S,) of the sampling, in its order.
    """
    used = max(len(timesteps) - 1, 1)
    return timesteps[int(used * LAST) : used]


def self_reward(
    predict_epsilon: PredictEpsilon,
    schedule: Schedule,
    latents: Tensor,
    prompt_index: Tensor,
    conditioning: Conditioning,
    timesteps: Tensor,
    seeds: list[int],
    batch_size: int,
) -> Tensor:
    """R = mean_t -log(mean_k ||eps_hat - eps_k||^2 / d + 1e-6), without guidance, (N,) fp32.

    The released code also normalises each step over its batch and weights it by t (1 - t). The candidates of a prompt
    have the same noise samples.

    Args:
        latents: (N, *latent_shape) clean latents with d elements each.
        prompt_index: (N,) prompt of each candidate.
        conditioning: of the prompts, P rows.
        timesteps: (T,) noise levels, from `self_reward_levels`.
        seeds: P seeds of the noise samples.
    """
    levels = schedule.log_snr_at(timesteps.cpu()).float()
    count = len(levels) * SAMPLES // 2
    draws = [
        torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed)).repeat_interleave(2)
        for seed in seeds
    ]
    probes = Probes(
        log_snr=levels.repeat_interleave(SAMPLES),
        weight=torch.ones(2 * count),
        noise_seeds=torch.stack(draws),
        latent_shape=tuple(latents.shape[1:]),
        design=Design(antithetic=True),
    )
    own = torch.arange(len(seeds))[:, None]
    errors = denoising_errors(predict_epsilon, schedule, latents, prompt_index, conditioning, own, probes, batch_size)[
        :, 0
    ]
    mean = errors.unflatten(1, (len(levels), SAMPLES)).mean(2) / latents[0].numel()
    return -(mean + FLOOR).log().mean(1)
