"""Image-conditioned estimators: the point-wise mutual information of any latent and prompt, in nats.

With alpha = log SNR and x_alpha = sqrt(sigmoid(alpha)) x + sqrt(sigmoid(-alpha)) eps (Kong et al., ICLR 2024,
arXiv 2310.07972, eq. 5-7):

    log p(x|y) = const - 1/2 int E_eps ||eps - eps_hat(x_alpha | y)||^2 d alpha

so that differences between prompts y, or to the null prompt, are differences of log-densities. The integral may be
restricted to a band: the noise levels at which layout and binding are decided carry the signal.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_ray.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class Probes:
    """Noise levels and draws at which candidates are probed; the same for all candidates and branches of a prompt.

    log_snr (K,), weight: the width of log SNR each stands for; noise (P, K, *latent_shape), one set a prompt.
    """

    log_snr: Tensor
    weight: float
    noise: Tensor


def draw_probes(seeds: list[int], num_samples: int, log_snr_min: float, log_snr_max: float, latent_shape) -> Probes:
    """Draw noise for P = len(seeds) prompts at K = num_samples log SNRs: the midpoints of equal strata of the band."""
    width = (log_snr_max - log_snr_min) / num_samples
    log_snr = log_snr_min + width * (torch.arange(num_samples) + 0.5)
    noise = [torch.randn(num_samples, *latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return Probes(log_snr, width, torch.stack(noise))


@torch.inference_mode()
def denoising_errors(
    predict_epsilon: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    latents: Tensor,
    prompt_index: Tensor,
    embeddings: Tensor,
    probes: Probes,
    batch_size: int,
) -> Tensor:
    """||eps - eps_hat||^2 of every candidate under every branch at every probe: (N, B, K) fp32 on the latents' device.

    Args:
        predict_epsilon: (x_t, timesteps, embeddings) -> epsilon, each with a leading batch dimension.
        latents: (N, *latent_shape) clean latents.
        prompt_index: (N,) the prompt of each, an index into embeddings and probes.noise.
        embeddings: (P, B, tokens, dim) the branches of each prompt: itself, null, others to contrast with.
        batch_size: denoiser evaluations at a time; memory does not depend on N, B or K.
    """
    device = latents.device
    noise, embeddings = probes.noise.to(device), embeddings.to(device)
    prompt_index = prompt_index.to(device)
    signal = torch.sigmoid(probes.log_snr).sqrt().to(device)
    sigma = torch.sigmoid(-probes.log_snr).sqrt().to(device)
    timesteps = schedule.timestep_at(probes.log_snr).float().to(device)
    count, branches, levels = len(latents), embeddings.shape[1], len(probes.log_snr)
    errors = torch.empty(count * branches * levels, device=device)
    tail = (1,) * (latents.dim() - 1)
    for rows in torch.arange(len(errors), device=device).split(batch_size):
        candidate, branch, level = rows // (branches * levels), rows // levels % branches, rows % levels
        prompt = prompt_index[candidate]
        eps = noise[prompt, level]
        x_t = signal[level].view(-1, *tail) * latents[candidate] + sigma[level].view(-1, *tail) * eps
        predicted = predict_epsilon(x_t, timesteps[level], embeddings[prompt, branch])
        errors[rows] = (eps - predicted).flatten(1).square().sum(1)
    return errors.view(count, branches, levels)


def log_density(errors: Tensor, probes: Probes) -> Tensor:
    """The band's part of log p(x|branch), up to a constant of x: (..., K) -> (...)."""
    return -0.5 * probes.weight * errors.sum(-1)


def pmi(errors: Tensor, null_errors: Tensor, probes: Probes) -> tuple[Tensor, Tensor]:
    """The signed i_s(x; y) = log p(x|y) - log p(x) and its standard error: (N, K) each -> (N,) each.

    The standard error takes the K probes as independent draws; stratification makes the true one smaller.
    """
    integrand = 0.5 * (null_errors - errors)
    value = probes.weight * integrand.sum(-1)
    count = integrand.shape[-1]
    spread = integrand.std(-1) if count > 1 else torch.full_like(value, torch.nan)
    return value, probes.weight * count**0.5 * spread


def pmi_contrastive(errors: Tensor, other_errors: Tensor, probes: Probes) -> Tensor:
    """log p(x|y) - log mean_j p(x|y_j), the PMI with the prompts y_j as marginal: (N, K), (N, J, K) -> (N,).

    The form of InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4) with the model's own likelihoods.
    """
    others = torch.logsumexp(log_density(other_errors, probes), -1) - torch.tensor(float(other_errors.shape[1])).log()
    return log_density(errors, probes) - others
