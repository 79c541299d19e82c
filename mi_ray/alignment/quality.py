"""Image features that show whether a tuned model has collapsed: statistics of the autoencoder's latents.

Every model has an autoencoder, and it is never tuned, so no feature network must be downloaded. Real and generated
images are treated in the same way: decoded to uint8 pixels and encoded again.
"""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

GRID = 4


def latent_features(latents: Tensor) -> Tensor:
    """Mean and standard deviation of each channel of latents (n, c, h, w) on a 4x4 grid: (n, 2 * 16 * c) fp32."""
    mean = adaptive_avg_pool2d(latents.float(), GRID)
    variance = adaptive_avg_pool2d(latents.float().square(), GRID) - mean.square()
    return torch.cat([mean, variance.clamp_min(0).sqrt()], 1).flatten(1)
