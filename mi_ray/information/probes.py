"""Probes: the noise levels and noise draws at which the estimators of `pointwise` ask the denoiser.

An estimate is a sum over K probes (a log SNR and a noise each) of weight times integrand. How probes are spread over a
band of log SNR changes the variance of the estimate, not its expectation.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Design:
    """How probes are spread over a band of log SNR. The estimand is the band's integral, whatever the design.

    loc, scale: log SNRs follow this logistic density, cut to the band (ITD, arXiv 2310.07972, appendix B); loc None:
        the uniform one.
    levels: the density's probability is cut into equal strata, one a draw. "midpoints": their centres, a quadrature
        rule without a random part; "jittered": a random place in each, unbiased however few they are; "random": no
        strata, independent draws.
    antithetic: each noise serves twice, as +eps and -eps at one log SNR, which cancels all that is odd in eps.
    """

    loc: float | None = None
    scale: float = 1.0
    levels: Literal["midpoints", "jittered", "random"] = "midpoints"
    antithetic: bool = False


@dataclass(frozen=True)
class Probes:
    """Noise levels and draws at which candidates are probed; the same for all candidates and branches of a prompt.

    log_snr (K,); weight (K,): the width of log SNR each stands for; noise_seeds (P, K): noise is made when needed, so
    that memory does not grow with K. Under an antithetic design probes 2i and 2i + 1 are a pair.
    """

    log_snr: Tensor
    weight: Tensor
    noise_seeds: Tensor
    latent_shape: tuple[int, ...]
    design: Design

    def draw(self, prompt: int, probe: int) -> Tensor:
        """One noise, standard normal (*latent_shape,) fp32 on the CPU."""
        generator = torch.Generator().manual_seed(int(self.noise_seeds[prompt, probe]))
        draw = torch.randn(self.latent_shape, generator=generator)
        return -draw if self.design.antithetic and probe % 2 else draw

    def of(self, prompts: Tensor) -> "Probes":
        """Those of some prompts, an index (Q,) into the P, in that order."""
        return replace(self, noise_seeds=self.noise_seeds[prompts])

    def at(self, which: Tensor) -> "Probes":
        """Some of the K probes; a pair stays together."""
        return replace(
            self, log_snr=self.log_snr[which], weight=self.weight[which], noise_seeds=self.noise_seeds[:, which]
        )

    def spread(self, count: int) -> tuple[Tensor, Tensor]:
        """Which probes make `count` that are spread over all K, and which are the others: indices, ascending."""
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
        """All of it at once, (P, K, *latent_shape), where there is little."""
        prompts, probes = self.noise_seeds.shape
        return torch.stack([torch.stack([self.draw(p, k) for k in range(probes)]) for p in range(prompts)])


def logistic_band(loc: float, scale: float, clip: float) -> tuple[float, float]:
    """The band loc -+ clip scale that ITD's importance sampling covers; published for SD2.1: 1, 2, 3."""
    return loc - clip * scale, loc + clip * scale


def draw_probes(
    seeds: list[int],
    num_samples: int,
    log_snr_min: float,
    log_snr_max: float,
    latent_shape: tuple[int, ...],
    design: Design = Design(),
    level_seed: int = 0,
) -> Probes:
    """Draw K = num_samples probes of a band for each of P = len(seeds) prompts.

    The weight of a log SNR is 1 / (K density), ITD's importance weight: scale tanh(c/2) / (sigmoid(z) sigmoid(-z)) / K
    with z = (log_snr - loc) / scale, where the band is loc -+ c scale.

    Args:
        seeds: of each prompt's noise.
        level_seed: of the places of jittered and random levels, which all prompts share.

    Raises:
        ValueError: if an antithetic design is to have an odd number of samples.
    """
    if design.antithetic and num_samples % 2:
        raise ValueError(f"num_samples is {num_samples}, and antithetic samples come in pairs: make it even")
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
    """Log SNRs, ascending, and their weights: (count,) float64 each."""
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

    For a Gaussian the conditional MMSE of epsilon is d sigmoid((alpha - loc) / scale) with scale 1: it crosses d/2 at
    loc and d/4 at loc - scale log 3. A curve that does not reach a level within the pilot counts as reaching it at
    the pilot's end; the scale is at least the distance of the pilot's levels.

    Args:
        errors: (N, K) of candidates under their own prompts, from `denoising_errors`.
        log_snr: (K,) ascending, of the pilot's probes.
        dim: d, the number of a latent's elements.
    """
    share = (errors.double().mean(0) / dim).cummax(0).values.cpu()
    alpha = log_snr.double().cpu()
    half, quarter = (_crossing(alpha, share, level) for level in (0.5, 0.25))
    spacing = ((alpha[-1] - alpha[0]) / max(len(alpha) - 1, 1)).item()
    return half, max((half - quarter) / torch.tensor(3.0).log().item(), spacing)


def _crossing(alpha: Tensor, rising: Tensor, level: float) -> float:
    """Where a rising curve crosses a level, linear between its points; beyond its ends, the ends."""
    above = int(torch.searchsorted(rising, level))
    if above in (0, len(alpha)):
        return alpha[min(above, len(alpha) - 1)].item()
    fraction = (level - rising[above - 1]) / (rising[above] - rising[above - 1])
    return torch.lerp(alpha[above - 1], alpha[above], fraction).item()


def effective_sample_size(weight: Tensor) -> float:
    """Kish's (sum w)^2 / sum w^2: how many equally weighted probes these (K,) are worth."""
    return (weight.sum().square() / weight.square().sum()).item()
