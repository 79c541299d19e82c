"""Probes: the noise levels and noise samples at which the estimators of `pointwise` evaluate the denoiser.

An estimate is a sum over K probes of weight times integrand. A probe is a log SNR and a noise sample. The distribution
of the probes over a band of log SNR changes the variance of the estimate, not its expectation.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Design:
    """How probes are distributed over a band of log SNR. Every design estimates the same integral over the band.

    loc, scale: log SNRs follow this logistic density, truncated to the band (ITD, arXiv 2310.07972, appendix B). loc
        None: uniform density.
    levels: how log SNRs are drawn from the density. The first two divide it into strata of equal probability, one
        sample per stratum. "midpoints": the centre of each stratum, a quadrature rule without randomness. "jittered": a
        random point in each stratum, unbiased for any number of samples. "random": independent samples, no strata.
    antithetic: use each noise sample twice, as +eps and -eps at the same log SNR. Terms that are odd in eps cancel.
    """

    loc: float | None = None
    scale: float = 1.0
    levels: Literal["midpoints", "jittered", "random"] = "midpoints"
    antithetic: bool = False


@dataclass(frozen=True)
class Probes:
    """Noise levels and noise samples, the same for all candidates and branches of a prompt.

    log_snr: (K,).
    weight: (K,) the width of log SNR that each probe represents.
    noise_seeds: (P, K). The noise is generated when it is needed, so memory does not grow with K.

    In an antithetic design probes 2i and 2i + 1 are a pair.
    """

    log_snr: Tensor
    weight: Tensor
    noise_seeds: Tensor
    latent_shape: tuple[int, ...]
    design: Design

    def draw(self, prompt: int, probe: int) -> Tensor:
        """One standard normal noise sample, (*latent_shape,) fp32 on the CPU."""
        generator = torch.Generator().manual_seed(int(self.noise_seeds[prompt, probe]))
        draw = torch.randn(self.latent_shape, generator=generator)
        return -draw if self.design.antithetic and probe % 2 else draw

    def of(self, prompts: Tensor) -> "Probes":
        """The probes of the prompts with these indices (Q,), in this order."""
        return replace(self, noise_seeds=self.noise_seeds[prompts])

    def at(self, which: Tensor) -> "Probes":
        """The probes with these indices; both probes of an antithetic pair must be selected."""
        return replace(
            self, log_snr=self.log_snr[which], weight=self.weight[which], noise_seeds=self.noise_seeds[:, which]
        )

    def spread(self, count: int) -> tuple[Tensor, Tensor]:
        """Indices of `count` probes spread evenly over all K, and indices of the others; both ascending."""
        each = 2 if self.design.antithetic else 1
        draws, some = len(self.log_snr) // each, count // each
        if some >= draws:
            return torch.arange(len(self.log_snr)), torch.empty(0, dtype=torch.long)
        chosen = torch.zeros(draws, dtype=torch.bool)
        chosen[(torch.arange(some) + 1) * draws // (some + 1)] = True
        chosen = chosen.repeat_interleave(each)
        return chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]

    @property
    def noise(self) -> Tensor:
        """All noise samples at once, (P, K, *latent_shape). Only for small P and K."""
        prompts, probes = self.noise_seeds.shape
        return torch.stack([torch.stack([self.draw(p, k) for k in range(probes)]) for p in range(prompts)])


def draw_probes(
    seeds: list[int],
    num_samples: int,
    log_snr_min: float,
    log_snr_max: float,
    latent_shape: tuple[int, ...],
    design: Design = Design(),
    level_seed: int = 0,
) -> Probes:
    """Draw K = num_samples probes in a band of log SNR for each of P = len(seeds) prompts.

    The weight of a probe is 1 / (K density), ITD's importance weight: scale tanh(c/2) / (sigmoid(z) sigmoid(-z)) / K
    with z = (log_snr - loc) / scale, for the band [loc - c scale, loc + c scale].

    Args:
        seeds: seed of each prompt's noise samples.
        level_seed: seed of jittered and random noise levels, which are the same for all prompts.

    Raises:
        ValueError: the design is antithetic and num_samples is odd.
    """
    if design.antithetic and num_samples % 2:
        raise ValueError(f"num_samples is {num_samples}: antithetic samples come in pairs; set an even number")
    each = 2 if design.antithetic else 1
    log_snr, weight = _levels(design, num_samples // each, log_snr_min, log_snr_max, level_seed)
    noise_seeds = [
        torch.randint(2**63 - 1, (num_samples // each,), generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return Probes(
        log_snr=log_snr.float().repeat_interleave(each),
        weight=(weight / each).float().repeat_interleave(each),
        noise_seeds=torch.stack(noise_seeds).repeat_interleave(each, 1),
        latent_shape=tuple(latent_shape),
        design=design,
    )


def _levels(design: Design, count: int, low: float, high: float, seed: int) -> tuple[Tensor, Tensor]:
    """Log SNRs in ascending order, and their weights: (count,) float64 each."""
    random = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    match design.levels:
        case "midpoints":
            quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        case "jittered":
            quantile = (torch.arange(count, dtype=torch.float64) + random) / count
        case _:
            quantile = random.sort().values
    if design.loc is None:
        return low + (high - low) * quantile, torch.full_like(quantile, (high - low) / count)
    ends = torch.sigmoid((torch.tensor([low, high], dtype=torch.float64) - design.loc) / design.scale)
    z = torch.logit(ends[0] + (ends[1] - ends[0]) * quantile)
    density = torch.sigmoid(z) * torch.sigmoid(-z) / (design.scale * (ends[1] - ends[0]))
    return design.loc + design.scale * z, 1 / (count * density)


def adaptive_logistic(errors: Tensor, log_snr: Tensor, dim: int) -> tuple[float, float]:
    """MMG's location and scale of the logistic density (arXiv 2509.20609), from the errors of a pilot: (loc, scale).

    For a Gaussian, the conditional MMSE of epsilon is d sigmoid((alpha - loc) / scale) with scale 1. It crosses d/2 at
    loc and d/4 at loc - scale log 3. If the curve does not reach one of these values within the pilot, the end of the
    pilot's band is used. The scale is at least the distance between the pilot's noise levels.

    Args:
        errors: (N, K) errors of candidates under their own prompts, from `denoising_errors`.
        log_snr: (K,) ascending, of the pilot's probes.
        dim: d, the number of elements of a latent.
    """
    share = (errors.double().mean(0) / dim).cummax(0).values.cpu()
    alpha = log_snr.double().cpu()
    half, quarter = (_crossing(alpha, share, level) for level in (0.5, 0.25))
    spacing = ((alpha[-1] - alpha[0]) / max(len(alpha) - 1, 1)).item()
    return half, max((half - quarter) / torch.tensor(3.0).log().item(), spacing)


def _crossing(alpha: Tensor, rising: Tensor, level: float) -> float:
    """Where a rising curve crosses a level, with linear interpolation; outside the curve, its first or last point."""
    above = int(torch.searchsorted(rising, level))
    if above in (0, len(alpha)):
        return alpha[min(above, len(alpha) - 1)].item()
    fraction = (level - rising[above - 1]) / (rising[above] - rising[above - 1])
    return torch.lerp(alpha[above - 1], alpha[above], fraction).item()


def effective_sample_size(weight: Tensor) -> float:
    """Kish's (sum w)^2 / sum w^2: the number of equally weighted probes that are equivalent to these weights (K,)."""
    return (weight.sum().square() / weight.square().sum()).item()
