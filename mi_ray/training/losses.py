"""The losses of fine-tuning, one function a method."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import unet_arguments
from mi_ray.diffusion.schedules import NoiseSchedule, prediction_from


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Loss weights min(SNR, gamma) of the x0-loss (Hang et al. 2023, eq. 5) as weights of the model's own loss.

    The squared error of x0 is 1/SNR times that of epsilon and 1/(SNR + 1) times that of v (ibid., section 3.4).

    Args:
        snr: alpha^2 / sigma^2, any shape.

    Returns:
        The weights, of the same shape.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # stays finite at SNR 0
    return snr.clamp(max=gamma) / (snr + 1) if prediction_type == "v_prediction" else snr.clamp(max=gamma)


class DenoisingLoss(nn.Module):
    """The weighted squared error of the model's own prediction target (Ho et al. 2020, eq. 14; Salimans & Ho 2022).

    A module, so that data-parallel training sees one forward pass. Corruption and error are fp32; the model alone
    runs in `autocast_dtype`.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        min_snr_gamma: float | None = None,
        autocast_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.model, self.autocast_dtype = model, autocast_dtype
        self.prediction_type = schedule.prediction_type
        alpha_sq = schedule.alphas_cumprod
        snr = alpha_sq / (1 - alpha_sq)
        weights = min_snr_weights(snr, min_snr_gamma, self.prediction_type) if min_snr_gamma else torch.ones_like(snr)
        # Plain tensors, since buffers would be sent to every worker again before each forward pass.
        device = next(model.parameters(), weights).device
        self.alpha, self.sigma, self.snr_weights = (
            values.float().to(device) for values in (alpha_sq.sqrt(), (1 - alpha_sq).sqrt(), weights)
        )

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)

    def predict(self, x0: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's fp32 output at alpha x0 + sigma noise; x0 and noise (n, *latent_shape), timesteps (n,)."""
        alpha, sigma = self._coefficients(timesteps, x0)
        dtype = self.autocast_dtype
        with torch.autocast(x0.device.type, dtype) if dtype else nullcontext():
            prediction = self.model(alpha * x0 + sigma * noise, timesteps, **unet_arguments(conditioning)).sample
        return prediction.float()

    def forward(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning, weights: Tensor
    ) -> Tensor:
        """Mean over the batch of weights (n,) times min-SNR weight times squared error: a scalar."""
        alpha, sigma = self._coefficients(timesteps, x0)
        target = prediction_from(self.prediction_type, x0, noise, alpha, sigma)
        error = (self.predict(x0, noise, timesteps, conditioning) - target).square().flatten(1).mean(1)
        return (weights * self.snr_weights[timesteps] * error).mean()
