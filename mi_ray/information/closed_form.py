"""Distributions with a known likelihood and a known optimal denoiser: the exact values that test the estimators.

No network is needed. A prompt is a row of numbers, `embeds` (n, dim) of its conditioning. The null prompt is a row of
zeros.
"""

import math

import torch
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import NoiseSchedule, alpha_sigma_at

SCHEDULE = NoiseSchedule(alphas_cumprod=torch.linspace(14, -14, 1000, dtype=torch.float64).sigmoid())
_LOG_SNR = SCHEDULE.log_snr.float()


class JointGaussian:
    """x, y standard normal in d dimensions, x_i and y_i with correlation rho: x | y ~ N(rho y, (1 - rho^2) I)."""

    def __init__(self, dim: int, correlation: float):
        self.dim, self.correlation = dim, correlation
        self.information = -dim / 2 * math.log(1 - correlation**2)  # I(x; y), nats
        self.null = Conditioning({"embeds": torch.zeros(1, dim + 1)})

    def draw(self, count: int, seed: int = 0) -> tuple[Tensor, Conditioning]:
        """Draw x (count, d) and the conditioning of its y, (count, d + 1). The last column is 1: y is known."""
        y, rest = torch.randn(2, count, self.dim, generator=torch.Generator().manual_seed(seed))
        x = self.correlation * y + (1 - self.correlation**2) ** 0.5 * rest
        return x, Conditioning({"embeds": torch.cat([y, torch.ones(count, 1)], 1)})

    def pmi(self, x: Tensor, conditioning: Conditioning, low: float = -40.0, high: float = 40.0) -> Tensor:
        """log p(x|y) - log p(x), or the contribution of a band of log SNR to it: (count,)."""
        mean, variance = self._given(conditioning)
        distance = (x - mean).double().square().sum(1), x.double().square().sum(1)
        conditional, marginal = self._error(variance[0], low, high), self._error(1.0, low, high)
        error = [c * self.dim + s * r for (c, s), r in zip((conditional, marginal), distance, strict=True)]
        return (error[1] - error[0]) / 2

    @staticmethod
    def _error(variance, low: float, high: float) -> tuple[float, float]:
        """The pair (a, b) with int E ||eps - eps_hat||^2 d alpha = a dim + b ||x - m||^2 for x ~ N(m, v I).

        With V = signal^2 v + sigma^2, eps - eps_hat = eps signal^2 v / V - signal sigma (x - m) / V.
        """
        alpha = torch.linspace(low, high, 8001, dtype=torch.float64)
        signal_sq, sigma_sq = alpha.sigmoid(), (-alpha).sigmoid()
        total = signal_sq * float(variance) + sigma_sq
        noise = torch.trapezoid((signal_sq * float(variance) / total).square(), alpha)
        return noise.item(), torch.trapezoid(signal_sq * sigma_sq / total.square(), alpha).item()

    def _given(self, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Mean (n, d) and variance (n, 1) of x given each prompt."""
        y, known = conditioning["embeds"][:, :-1], conditioning["embeds"][:, -1:]
        return self.correlation * y * known, 1 - known * self.correlation**2

    def predict_epsilon(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """E[eps | x_t, y], or E[eps | x_t] for the null prompt."""
        signal, sigma = (a[:, None] for a in alpha_sigma_at(_LOG_SNR, timesteps))
        mean, variance = self._given(conditioning)
        return sigma * (x_t - signal * mean) / (signal.square() * variance + sigma.square())


class LabelledMixture:
    """x | label k ~ N(means[k], spread^2 I), all labels equally likely. The row of a prompt holds 1 + label."""

    def __init__(self, labels: int, dim: int, distance: float, spread: float = 0.5):
        self.dim, self.spread = dim, spread
        self.means = distance * torch.randn(labels, dim, generator=torch.Generator().manual_seed(1))
        self.null = Conditioning({"embeds": torch.zeros(1, 1)})

    def draw(self, label: int, count: int, seed: int = 0) -> Tensor:
        noise = torch.randn(count, self.dim, generator=torch.Generator().manual_seed(seed))
        return self.means[label] + self.spread * noise

    @staticmethod
    def embed(*labels: int) -> Conditioning:
        """The conditioning, one row per label."""
        return Conditioning({"embeds": torch.tensor(labels, dtype=torch.float32)[:, None] + 1})

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x|label), up to a constant: (count, labels)."""
        return -(x[:, None] - self.means).square().sum(-1) / (2 * self.spread**2)

    def pmi(self, x: Tensor, label: int) -> Tensor:
        """log p(x|label) - log p(x): (count,)."""
        logits = self.log_likelihood(x)
        return logits[:, label] - logits.logsumexp(1) + math.log(len(self.means))

    def predict_epsilon(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """E[eps | x_t, label], or E[eps | x_t] for the null prompt."""
        signal, sigma = (a[:, None] for a in alpha_sigma_at(_LOG_SNR, timesteps))
        total = signal.square() * self.spread**2 + sigma.square()
        residual = x_t[:, None] - signal[..., None] * self.means
        posterior = (-residual.square().sum(-1) / (2 * total)).softmax(1)
        label = conditioning["embeds"][:, 0].long()
        known = torch.nn.functional.one_hot((label - 1).clamp(min=0), len(self.means)).float()
        weights = torch.where(label[:, None] > 0, known, posterior)
        return sigma / total * (weights[..., None] * residual).sum(1)
