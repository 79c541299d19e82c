"""Pointwise estimators: the pointwise mutual information of any latent and prompt, in nats.

Let alpha = log SNR and x_alpha = sqrt(sigmoid(alpha)) x + sqrt(sigmoid(-alpha)) eps (Kong et al., ICLR 2024,
arXiv 2310.07972, eq. 5-7). Then

    log p(x|y) = const - 1/2 int E_eps ||eps - eps_hat(x_alpha | y)||^2 d alpha

so the difference of this integral between two prompts, or between a prompt and the null prompt, is a difference of
log-densities. The integral can be restricted to a band of log SNR: the noise levels that decide layout and attribute
binding carry the signal.

The denoiser predicts epsilon at x_alpha, for any prediction_type. The path of a rectified flow is the same up to scale:
(1 - t) x + t eps = x_alpha / (sqrt(sigmoid(alpha)) + sqrt(sigmoid(-alpha))) with t = sigmoid(-alpha / 2). There,
eps_hat = x_t + (1 - t) u. The schedule says on which scale the model takes its input.

An estimate is a sum over K probes of weight times integrand. A probe is a log SNR and a noise sample. All candidates
and branches of a prompt use the same probes. Differences between them therefore have a much smaller standard error than
the values: pass the difference of two integrands to `integrate` to get it.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import Schedule
from mi_ray.information.probes import Probes

PredictEpsilon = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x_t, timesteps, conditioning) -> epsilon


# ---------------------------------------------------------------------------------------------- probing
def beside(conditioning: Conditioning, reference: Conditioning) -> tuple[Conditioning, Tensor]:
    """Two branches for each of P prompts, the prompt and a reference, as input of `denoising_errors`.

    Args:
        conditioning: of the prompts, P rows.
        reference: P rows, or one row for all prompts: the null prompt.

    Returns:
        The conditioning of all texts, and branches (P, 2).
    """
    count = len(conditioning)
    other = torch.arange(count, count + len(reference)).expand(count)
    return Conditioning.cat([conditioning, reference]), torch.stack([torch.arange(count), other], 1)


class Chunk(NamedTuple):
    """u pairs of candidate and probe: candidate (u,) and probe (u,) are indices, noise (u, *latent_shape),
    predicted (u, B, *latent_shape)."""

    candidate: Tensor
    probe: Tensor
    noise: Tensor
    predicted: Tensor


@torch.inference_mode()
def predictions(
    predict_epsilon: PredictEpsilon,
    schedule: Schedule,
    latents: Tensor,
    prompt_index: Tensor,
    conditioning: Conditioning,
    branches: Tensor,
    probes: Probes,
    batch_size: int,
) -> Iterator[Chunk]:
    """Yield the denoiser's predictions for every candidate, branch and probe in chunks.

    The arguments are those of `denoising_errors`. Memory depends only on batch_size.
    """
    device, count, width = latents.device, len(latents), branches.shape[1]
    conditioning, branches, owner = conditioning.to(device), branches.to(device), prompt_index.cpu()
    timesteps, signal, sigma = (values.to(device) for values in schedule.levels_at(probes.log_snr))
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
    schedule: Schedule,
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
        prompt_index: (N,) prompt of each latent, an index into branches and the probes' noise.
        conditioning: of all texts, one row per text.
        branches: (P, B) rows of `conditioning` to evaluate for the candidates of each prompt: the prompt itself, the
            null prompt, or other prompts for contrast.
        batch_size: denoiser evaluations per batch; apart from the result, memory does not depend on N, B or K.
    """
    return denoising_statistics(
        predict_epsilon, schedule, latents, prompt_index, conditioning, branches, probes, batch_size, reference=None
    )[0]


def denoising_statistics(
    predict_epsilon: PredictEpsilon,
    schedule: Schedule,
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
        Two tensors (N, B, K) fp32; the second is None if `reference` is None.
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
    """A value in nats and its standard error over the random probes; tensors of the same shape."""

    value: Tensor
    standard_error: Tensor


def integrate(integrand: Tensor, probes: Probes) -> Estimate:
    """Integrate over the band an integrand that is known at the probes: (..., K) -> (...).

    The standard error takes the design into account:

    - An antithetic pair counts as one sample: its two terms are added first.
    - For independent samples it is the usual standard error.
    - For stratified levels each stratum holds one sample. Groups of four or a few more neighbouring strata are formed
      (Cochran 1977, Sampling Techniques, section 5A.12). A straight line is fitted to each group, and the residuals
      give the variance. Its expectation is exact if the integrand is linear and its variance constant within a group,
      and too large if the integrand is curved.
    - With fewer than four strata no line is fitted: the usual standard error is returned, which is too large.
    - With one sample it is NaN.
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
    """Degrees of freedom of the standard errors of `integrate`."""
    draws = _draws(probes)
    return draws - 2 * (draws // 4) if _grouped(probes) else draws - 1


def _draws(probes: Probes) -> int:
    return len(probes.log_snr) // (2 if probes.design.antithetic else 1)


def _grouped(probes: Probes) -> bool:
    return probes.design.levels != "random" and _draws(probes) >= 4


def _about_a_line(terms: Tensor) -> Tensor:
    """Variance of the sum of m neighbouring terms, (..., m), from the residuals of a straight line fitted to them."""
    count = terms.shape[-1]
    place = torch.arange(count, device=terms.device, dtype=terms.dtype)
    place = place - place.mean()
    slope = (terms * place).sum(-1, keepdim=True) / place.square().sum()
    scatter = terms - terms.mean(-1, keepdim=True) - slope * place
    return count / (count - 2) * scatter.square().sum(-1)


def log_density(errors: Tensor, probes: Probes) -> Tensor:
    """Contribution of the band to log p(x|branch), up to a constant of x: (..., K) -> (...)."""
    return (-0.5 * errors * probes.weight.to(errors.device)).sum(-1)


def pmi(errors: Tensor, null_errors: Tensor, probes: Probes) -> Estimate:
    """The signed i_s(x; y) = log p(x|y) - log p(x): (N, K), (N, K) -> (N,).

    For the difference between two candidates of one prompt, with its standard error under the shared noise samples, use
    `pmi(errors[i] - errors[j], null_errors[i] - null_errors[j], probes)`.
    """
    return integrate(0.5 * (null_errors - errors), probes)


def pmi_orthogonal(distances: Tensor, probes: Probes) -> Estimate:
    """i_o(x; y) = 1/2 int E ||eps_hat(y) - eps_hat(null)||^2 d alpha >= 0: (N, K) -> (N,). ITD, eq. 8.

    Its expectation over p(x, y) equals that of i_s. For a single image it measures how much the prompt changes the
    prediction, not whether the prompt is right.
    """
    return integrate(0.5 * distances, probes)


def log_odds(errors: Tensor, other_errors: Tensor, probes: Probes) -> Estimate:
    """log p(x|y) - log sum_j p(x|y_j): (N, K), (N, J, K) -> (N,).

    The standard error is a first-order approximation (the delta method): that of the integral of the paired difference
    between the prompt's error and the mean error of the other prompts, weighted by their posteriors.
    """
    densities = log_density(other_errors, probes)
    shares = densities.softmax(-1)[..., None]
    _, standard_error = integrate(0.5 * ((shares * other_errors).sum(-2) - errors), probes)
    return Estimate(log_density(errors, probes) - densities.logsumexp(-1), standard_error)


def pmi_contrastive(errors: Tensor, other_errors: Tensor, probes: Probes, total: int | None = None) -> Estimate:
    """log p(x|y) - log mean_j p(x|y_j), the PMI with the mixture of the prompts y_j as marginal.

    This is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4) with the model's own likelihoods.
    Shapes: (N, K), (N, J, K) -> (N,).

    Args:
        total: number of prompts in the mean, if only the J most likely are given; the likelihood of the others is
            taken as 0.
    """
    odds = log_odds(errors, other_errors, probes)
    return Estimate(odds.value + math.log(total or other_errors.shape[1]), odds.standard_error)
