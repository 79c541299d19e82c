"""Independent Gaussian pixels around the mean of a label, with closed-form denoiser, likelihoods and maps."""

import torch

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import NoiseSchedule, alpha_sigma_at

BAND = (-11.0, 11.0)
SPREAD = 0.5  # standard deviation of each value

SCHEDULE = NoiseSchedule(alphas_cumprod=torch.linspace(12, -12, 1000, dtype=torch.float64).sigmoid())


class PixelGaussians:
    """x | label k ~ N(means[k], SPREAD^2 I) on (channels, h, w). The row of a prompt contains the label."""

    def __init__(self, means: torch.Tensor):
        self.means = means
        self._log_snr = SCHEDULE.log_snr.float()

    def draw(self, label: int, count: int, seed: int = 0) -> torch.Tensor:
        noise = torch.randn(count, *self.means.shape[1:], generator=torch.Generator().manual_seed(seed))
        return self.means[label] + SPREAD * noise

    def log_ratio(self, x: torch.Tensor, label: int, other: int) -> torch.Tensor:
        """log p(x|label) - log p(x|other) of each pixel: (n, h, w)."""
        distance = (x[:, None] - self.means).square().sum(2) / (2 * SPREAD**2)
        return distance[:, other] - distance[:, label]

    def predict_epsilon(self, x_t, timesteps, conditioning):
        """E[eps | x_t, label], Gaussian conditioning."""
        signal, sigma = (a.view(-1, 1, 1, 1) for a in alpha_sigma_at(self._log_snr, timesteps))
        mean = self.means[conditioning["embeds"].long()]
        gain = signal * SPREAD**2 / (signal.square() * SPREAD**2 + sigma.square())
        return (x_t - signal * (mean + gain * (x_t - signal * mean))) / sigma


def embedded(*labels: int) -> Conditioning:
    """One row per label."""
    return Conditioning({"embeds": torch.tensor(labels, dtype=torch.float32)})
