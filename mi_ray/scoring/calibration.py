"""The pool of a calibration: sampled candidates and their denoising errors at every noise level."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mi_ray.alignment.metric import load_metrics, measure
from mi_ray.config import ScoreConfig
from mi_ray.config.calibration import CalibrationConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.information.pointwise import denoising_errors
from mi_ray.information.probes import draw_probes
from mi_ray.scoring.machine import take_cpus
from mi_ray.scoring.sampler import Sampler, batch_at_size, derived_seed
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work

PROMPTS_AT_A_TIME = 8


Keep = Callable[[np.ndarray, list[str], list[tuple[str, int]]], None]  # images, prompts, (prompt_id, candidate_index)


@torch.no_grad()  # not inference mode: some guidance methods need gradients
def probed_pool(
    config: CalibrationConfig, prompts: list[str], ids: list[str], keep: Keep | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Errors (N, 1 + J, levels, 2), prompt_index (N,), and labels (N,) from the metric, higher is better, or None.

    Args:
        keep: is called with the images of each group of candidates; None: images are not stored.
    """
    take_cpus(config.threads)
    denoiser = load_denoiser(config.model.path, config.model.dtype, size=config.model.size)
    batch_size = batch_at_size(denoiser, config.batch_size)
    sampler = Sampler(denoiser, config.sampler, batch_size)
    score = ScoreConfig(names=("pmi_contrastive",), neighbours=config.neighbours)
    scorer = Scorer(denoiser, score, batch_size, config.seed, prompts)
    each = config.candidates_per_prompt
    errors, labels = [], []
    metrics = load_metrics([config.alignment] if config.alignment else [])
    for start in tqdm(range(0, len(prompts), PROMPTS_AT_A_TIME), unit=" prompts", unit_scale=PROMPTS_AT_A_TIME):
        some = slice(start, start + PROMPTS_AT_A_TIME)
        conditioning = denoiser.encode_prompts(prompts[some])
        seeds = [[derived_seed(config.seed, "calibration", i, c) for c in range(each)] for i in ids[some]]
        latents = sampler(conditioning, seeds, Work(), prompts=prompts[some]).latents
        nearest = scorer.neighbours(prompts[some], conditioning)
        texts = Conditioning.cat([conditioning, scorer.pool_conditioning.rows(nearest.flatten())])
        own, others = torch.arange(len(texts)).split([len(conditioning), nearest.numel()])
        branches = torch.cat([own[:, None], others.view_as(nearest)], 1)
        errors.append(_two_sample_errors(config, denoiser, latents, texts, branches, ids[some]))
        repeated = [prompt for prompt in prompts[some] for _ in range(each)]
        images = denoiser.decode(latents) if config.alignment or keep else None
        for metric in metrics.values():
            truth = metric.columns[0]
            found = measure(metrics, images, repeated)[truth.name]
            labels += [math.nan if value is None else truth.sign * value for value in found]
        if keep:
            keep(images, repeated, [(prompt_id, c) for prompt_id in ids[some] for c in range(each)])
    index = torch.arange(len(prompts)).repeat_interleave(each)
    return torch.cat(errors), index, torch.tensor(labels) if labels else None


def _two_sample_errors(
    config: CalibrationConfig,
    denoiser: Denoiser,
    latents: Tensor,
    conditioning: Conditioning,
    branches: Tensor,
    ids: list[str],
) -> Tensor:
    """Errors at the middle of every level, from two independent noise samples: (n, 1 + J, levels, 2) on the CPU.

    Args:
        conditioning, branches: arguments of `denoising_errors`; branches is (P, 1 + J), with the prompt itself first.
    """
    index = torch.arange(len(ids)).repeat_interleave(len(latents) // len(ids))
    halves = []
    for half in range(2):
        seeds = [derived_seed(config.seed, f"calibration-half-{half}", i) for i in ids]
        probes = draw_probes(seeds, config.levels, config.log_snr_min, config.log_snr_max, denoiser.latent_shape)
        errors = denoising_errors(
            denoiser.predict_epsilon,
            denoiser.schedule,
            latents,
            index,
            conditioning,
            branches,
            probes,
            2 * batch_at_size(denoiser, config.batch_size),
        )
        halves.append(errors.cpu())
    return torch.stack(halves, -1)
