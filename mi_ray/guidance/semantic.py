"""Semantic-aware classifier-free guidance, S-CFG (Shen et al. 2024, arXiv 2404.05384)."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mi_ray.guidance.attention import captured, smoothed, unet_layers
from mi_ray.guidance.guide import Guide

_TINY = 1e-8  # of the released code


class Semantic(Guide):
    """u + w rate (c - u): the rate equalises the norm of c - u over the regions of the tokens.

    As in the released code (4e5c9a7). The maps are those of the two coarsest resolutions of the UNet: of Stable
    Diffusion, 4 and 8 latent pixels per map pixel.
    """

    def predictions(self, step: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        unet = self.setting.denoiser.network
        cross, own = (unet_layers(unet, cross=kind) for kind in (True, False))
        factors = sorted(cross)[-2:]
        layers = [layer for factor in factors for layer in (*cross[factor], *own[factor])]
        with captured(layers) as maps:
            conditional, unconditional = self.predict(step, x_t, self.both).chunk(2)
        pairs = {
            factor: [(maps[a].mean(1), maps[b].mean(1)) for a, b in zip(own[factor], cross[factor], strict=True)]
            for factor in factors
        }
        self.regions = token_regions(pairs, x_t.shape[-2:])
        return conditional, unconditional

    def combined(self, step: int, guided: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
        config, scale = self.setting.config, self.setting.guidance_scale
        delta = conditional.float() - unconditional.float()
        limits = config.rate_min, config.rate_max, config.scale_max / scale
        return unconditional.float() + scale * guidance_rate(delta, *self.regions, *limits) * delta


def token_regions(pairs: dict[int, list[tuple[Tensor, Tensor]]], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The region of each token, and the foreground, as masks of the latents.

    Cross-attention maps are propagated by self-attention, smoothed, and divided by their spatial mean. A pixel belongs
    to the token with the largest mean over all layers, in the conditional half of the batch; start, end and padding are
    tokens too. The foreground is where the start token does not exceed the sum of the other tokens, in the
    unconditional half.

    Args:
        pairs: by factor, rising, the maps of each layer: self-attention (2n, pixels, pixels) and cross-attention (2n,
            pixels, tokens), means over heads, the conditional half first.
        size: height and width of the latents.

    Returns:
        (n, tokens, *size) and (n, 1, *size), with values 0 and 1.
    """
    finest, count = min(pairs), sum(map(len, pairs.values()))
    height, width = (side // finest for side in size)
    tokens, ground = 0.0, 0.0
    for factor, layers in pairs.items():
        for own, cross in layers:
            own, cross = own.float(), cross.float()
            maps = ((own + 3 * own @ own) / 4 @ cross).mT  # the released loop adds A^2 three times
            maps = maps.unflatten(2, (height * finest // factor, width * finest // factor))
            if factor > finest:
                maps = interpolate(maps, scale_factor=factor // finest, mode="bilinear")
            maps = smoothed(maps.flatten(0, 1)).view_as(maps)
            tokens = tokens + maps / (maps.mean((2, 3), keepdim=True) + _TINY) / count
            start_and_rest = torch.stack([maps[:, 0], maps[:, 1:].sum(1)], 1)
            ground = ground + start_and_rest / start_and_rest.mean((2, 3), keepdim=True) / count
    of_prompt, of_null = tokens.chunk(2)[0], ground.chunk(2)[1]
    regions = (of_prompt == of_prompt.amax(1, keepdim=True)).float()
    foreground = (of_null[:, :1] < of_null.amax(1, keepdim=True)).float()
    return tuple(interpolate(mask, scale_factor=finest, mode="nearest") for mask in (regions, foreground))


def guidance_rate(
    delta: Tensor, regions: Tensor, foreground: Tensor, low: float, high: float, highest: float
) -> Tensor:
    """The factor of the guidance scale at each pixel, (n, 1, h, w): the mean norm of delta in the foreground divided by
    its mean norm in the region, between `low` and `high`, at most `highest`, smoothed.

    Args:
        delta: (n, channels, h, w), conditional minus unconditional prediction.
        regions, foreground: masks from `token_regions`.
    """
    norm = delta.norm(dim=1, keepdim=True)

    def mean_in(masks: Tensor) -> Tensor:
        return (norm * masks).sum((2, 3)) / (masks.sum((2, 3)) + _TINY)

    rate = mean_in(foreground) / (mean_in(regions) + _TINY)  # (n, tokens)
    rate = (rate[..., None, None] * regions).sum(1)
    return smoothed(rate.clamp(low, high).clamp(max=highest))[:, None]
