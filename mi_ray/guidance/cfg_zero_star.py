"""CFG-Zero* (Fan et al. 2025, arXiv 2503.18886)."""

import torch
from torch import Tensor

from mi_ray.diffusion.schedules import FLOW
from mi_ray.guidance.guide import Guide

_TINY = 1e-8  # of the released code, added to the squared norm


class CfgZeroStar(Guide):
    """s u + w (c - s u) with s = <c, u> / ||u||^2, the projection of the conditional prediction c on the unconditional
    prediction u (eq. 12). The first steps of a flow have velocity zero (section 4.2).

    The paper is about flows. A variance-preserving model gets the scale s of its predictions only: a prediction of zero
    would not leave its latents as they are.
    """

    def combined(self, step: int, guided: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
        if self.setting.denoiser.schedule.prediction_type == FLOW and step < self.setting.config.zero_init_steps:
            return torch.zeros_like(guided)
        c, u = (prediction.float().flatten(1) for prediction in (conditional, unconditional))
        scale = (c * u).sum(1) / (u.square().sum(1) + _TINY)
        scaled = unconditional.float() * scale.view(-1, *[1] * (guided.ndim - 1))
        return scaled + self.setting.guidance_scale * (conditional.float() - scaled)
