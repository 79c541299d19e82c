"""Image-conditioned estimators: the point-wise mutual information of any latent and prompt, in nats.

With alpha = log SNR and x_alpha = sqrt(sigmoid(alpha)) x + sqrt(sigmoid(-alpha)) eps (Kong et al., ICLR 2024,
arXiv 2310.07972, eq. 5-7):

    log p(x|y) = const - 1/2 int E_eps ||eps - eps_hat(x_alpha | y)||^2 d alpha

so that differences between prompts y, or to the null prompt, are differences of log-densities. The integral may be
restricted to a band: the noise levels at which layout and binding are decided carry the signal.

The denoiser predicts epsilon at x_alpha, whatever its own parameterisation. A rectified flow's path is the same one
at another scale: (1 - t) x + t eps = x_alpha / (sqrt(sigmoid(alpha)) + sqrt(sigmoid(-alpha))) with t = sigmoid(-alpha
/ 2), and there eps_hat = x_t + (1 - t) u.

Estimates are sums over K probes (a log SNR and a noise each) of weight times integrand. All candidates and branches of
a prompt meet the same probes, so that differences between them are far tighter than the values: `integrate` the
difference of two integrands to know how much.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information.probes import Probes

PredictEpsilon = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x_t, timesteps, conditioning) -> epsilon


# ---------------------------------------------------------------------------------------------- probing
def beside(conditioning: Conditioning, reference: Conditioning) -> tuple[Conditioning, Tensor]:
    """Two branches of each of P prompts, itself and a reference, as `denoising_errors` takes them.

    Args:
        conditioning: of the prompts, P rows.
        reference: P rows, or one for all: the null prompt's.

    Returns:
        The conditioning of all texts, and branches (P, 2).
    """
    count = len(conditioning)
    other = torch.arange(count, count + len(reference)).expand(count)
    return Conditioning.cat([conditioning, reference]), torch.stack([torch.arange(count), other], 1)


class Chunk(NamedTuple):
    """Some pairs: candidate (u,), probe (u,), noise (u, *latent_shape), predicted (u, B, *latent_shape)."""

    candidate: Tensor
    probe: Tensor
    noise: Tensor
    predicted: Tensor


@torch.inference_mode()
def predictions(
    predict_epsilon: PredictEpsilon,
    schedule: NoiseSchedule,
    latents: Tensor,
    prompt_index: Tensor,
    conditioning: Conditioning,
    branches: Tensor,
    probes: Probes,
    batch_size: int,
) -> Iterator[Chunk]:
    """The denoiser's answers for every candidate, branch and probe, a chunk at a time. The arguments are
    `denoising_errors`'; memory depends on batch_size alone."""
    device, count, width = latents.device, len(latents), branches.shape[1]
    conditioning, branches, owner = conditioning.to(device), branches.to(device), prompt_index.cpu()
    signal = torch.sigmoid(probes.log_snr).sqrt().to(device)
    sigma = torch.sigmoid(-probes.log_snr).sqrt().to(device)
    timesteps = schedule.timestep_at(probes.log_snr).float().to(device)
    tail = (1,) * (latents.dim() - 1)
    for rows in torch.arange(count * len(probes.log_snr)).split(max(1, batch_size // width)):
        candidate, probe = rows % count, rows // count
        prompt = owner[candidate]
        needed, which = (prompt * len(timesteps) + probe).unique(return_inverse=True)
        noise = torch.stack([probes.draw(*divmod(key, len(timesteps))) for key in needed.tolist()])
        noise = noise.to(device)[which.to(device)]
        candidate, probe, prompt = candidate.to(device), probe.to(device), prompt.to(device)
        x_t = signal[probe].view(-1, *tail) * latents[candidate] + sigma[probe].view(-1, *tail) * noise
        inputs = x_t.repeat_interleave(width, 0), timesteps[probe].repeat_interleave(width), branches[prompt].flatten()
        parts = zip(*(part.split(batch_size) for part in inputs), strict=True)
        predicted = torch.cat([predict_epsilon(x, t, conditioning.rows(texts)) for x, t, texts in parts])
        yield Chunk(candidate, probe, noise, predicted.unflatten(0, (-1, width)))


def denoising_errors(
    predict_epsilon: PredictEpsilon,
    schedule: NoiseSchedule,
    latents: Tensor,
    prompt_index: Tensor,
    conditioning: Conditioning,
    branches: Tensor,
    probes: Probes,
    batch_size: int,
) -> Tensor:
    """||eps - eps_hat||^2 of every candidate under every branch at every probe: (N, B, K) fp32 on the latents' device.

    Args:
        predict_epsilon: (x_t, timesteps, conditioning) -> epsilon, each with a leading batch dimension.
        latents: (N, *latent_shape) clean latents.
        prompt_index: (N,) the prompt of each, an index into branches and the probes' noise.
        conditioning: of all texts that occur, one row each.
        branches: (P, B) the rows of `conditioning` under which the candidates of each prompt are probed: the prompt
            itself, the null prompt, others to contrast with.
        batch_size: denoiser evaluations at a time; memory does not depend on N, B or K but for the result.
    """
    return denoising_statistics(
        predict_epsilon, schedule, latents, prompt_index, conditioning, branches, probes, batch_size, reference=None
    )[0]


def denoising_statistics(
    predict_epsilon: PredictEpsilon,
    schedule: NoiseSchedule,
    latents: Tensor,
    prompt_index: Tensor,
    conditioning: Conditioning,
    branches: Tensor,
    probes: Probes,
    batch_size: int,
    reference: int | None,
) -> tuple[Tensor, Tensor | None]:
    """`denoising_errors`, and ||eps_hat - eps_hat of the branch `reference`||^2 from the same evaluations.

    Returns:
        (N, B, K) fp32 each; the second is None where reference is.
    """
    shape = len(latents), branches.shape[1], len(probes.log_snr)
    errors = torch.empty(shape, device=latents.device)
    distances = None if reference is None else torch.empty_like(errors)
    arguments = (predict_epsilon, schedule, latents, prompt_index, conditioning, branches, probes, batch_size)
    for chunk in predictions(*arguments):
        predicted = chunk.predicted.flatten(2)
        errors[chunk.candidate, :, chunk.probe] = (chunk.noise.flatten(1)[:, None] - predicted).square().sum(2)
        if distances is not None:
            apart = predicted - predicted[:, reference, None]
            distances[chunk.candidate, :, chunk.probe] = apart.square().sum(2)
    return errors, distances


# ---------------------------------------------------------------------------------------------- estimates
class Estimate(NamedTuple):
    """A value in nats and its standard error over draws of the probes; tensors of one shape."""

    value: Tensor
    standard_error: Tensor


def integrate(integrand: Tensor, probes: Probes) -> Estimate:
    """The band's integral of an integrand known at the probes: (..., K) -> (...).

    The standard error takes the design into account. An antithetic pair is one draw: its halves are added first. Of
    independent draws it is the usual one. A stratum holds a single draw, so neighbouring strata are taken together
    (Cochran 1977, Sampling Techniques, section 5A.12), four or a few more at a time, and what a straight line through
    them leaves is their variance. It is exact on average where the integrand is straight and its variance constant
    across a group, and too large where the integrand bends. With fewer than four strata, or than two draws, there is
    no line to draw: the usual one, too large, or nan.
    """
    terms = integrand * probes.weight.to(integrand.device)
    value = terms.sum(-1)
    if probes.design.antithetic:
        terms = terms.unflatten(-1, (-1, 2)).sum(-1)
    draws = terms.shape[-1]
    if draws == 1:
        return Estimate(value, torch.full_like(value, torch.nan))
    if not _grouped(probes):
        return Estimate(value, (draws * terms.var(-1)).sqrt())
    last = 4 + draws % 4  # strata in the last group
    variance = _about_a_line(terms[..., -last:])
    if draws > last:
        variance = variance + _about_a_line(terms[..., :-last].unflatten(-1, (-1, 4))).sum(-1)
    return Estimate(value, variance.sqrt())


def degrees_of_freedom(probes: Probes) -> int:
    """On which the standard errors of `integrate` rest."""
    draws = _draws(probes)
    return draws - 2 * (draws // 4) if _grouped(probes) else draws - 1


def _draws(probes: Probes) -> int:
    return len(probes.log_snr) // (2 if probes.design.antithetic else 1)


def _grouped(probes: Probes) -> bool:
    return probes.design.levels != "random" and _draws(probes) >= 4


def _about_a_line(terms: Tensor) -> Tensor:
    """The variance of the sum of m neighbours, from how they scatter about the straight line through them: (..., m)."""
    count = terms.shape[-1]
    place = torch.arange(count, device=terms.device, dtype=terms.dtype)
    place = place - place.mean()
    slope = (terms * place).sum(-1, keepdim=True) / place.square().sum()
    scatter = terms - terms.mean(-1, keepdim=True) - slope * place
    return count / (count - 2) * scatter.square().sum(-1)


def log_density(errors: Tensor, probes: Probes) -> Tensor:
    """The band's part of log p(x|branch), up to a constant of x: (..., K) -> (...)."""
    return (-0.5 * errors * probes.weight.to(errors.device)).sum(-1)


def pmi(errors: Tensor, null_errors: Tensor, probes: Probes) -> Estimate:
    """The signed i_s(x; y) = log p(x|y) - log p(x): (N, K) each -> (N,).

    The difference between two candidates of one prompt, with its standard error under the noise they share, is
    `pmi(errors[i] - errors[j], null_errors[i] - null_errors[j], probes)`.
    """
    return integrate(0.5 * (null_errors - errors), probes)


def pmi_orthogonal(distances: Tensor, probes: Probes) -> Estimate:
    """i_o(x; y) = 1/2 int E ||eps_hat(y) - eps_hat(null)||^2 d alpha >= 0: (N, K) -> (N,). ITD, eq. 8.

    On average over p(x, y) it equals i_s; of one image it says how much the prompt matters, not whether it is right.
    """
    return integrate(0.5 * distances, probes)


def log_odds(errors: Tensor, other_errors: Tensor, probes: Probes) -> Estimate:
    """log p(x|y) - log sum_j p(x|y_j): (N, K), (N, J, K) -> (N,).

    The standard error is that of the first-order expansion, the integral of the paired difference between the prompt's
    error and those of the others weighted by their posteriors among themselves (the delta method).
    """
    densities = log_density(other_errors, probes)
    shares = densities.softmax(-1)[..., None]
    _, standard_error = integrate(0.5 * ((shares * other_errors).sum(-2) - errors), probes)
    return Estimate(log_density(errors, probes) - densities.logsumexp(-1), standard_error)


def pmi_contrastive(errors: Tensor, other_errors: Tensor, probes: Probes, total: int | None = None) -> Estimate:
    """log p(x|y) - log mean_j p(x|y_j), the PMI with the prompts y_j as marginal: (N, K), (N, J, K) -> (N,).

    The form of InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4) with the model's own likelihoods.

    Args:
        total: how many prompts the mean is over, where only the J likeliest are here; the others count as impossible.
    """
    odds = log_odds(errors, other_errors, probes)
    return Estimate(odds.value + math.log(total or other_errors.shape[1]), odds.standard_error)
