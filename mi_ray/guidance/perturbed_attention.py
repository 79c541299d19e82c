"""Perturbed-attention guidance, PAG (Ahn et al. 2024, arXiv 2403.17377)."""

from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.pixart import PIXART_SIGMA
from mi_ray.guidance.attention import identity_attention, self_attention_layers
from mi_ray.guidance.guide import Guide


class PerturbedAttention(Guide):
    """Classifier-free guidance + s (c - p), where p is the conditional prediction with identity matrices as
    self-attention maps in some layers (eq. 16 and 18), as in diffusers' pipelines for it."""

    def predictions(self, step: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        denoiser, config = self.setting.denoiser, self.setting.config
        # diffusers' defaults
        parts = config.perturbed_layers or (("blocks.1.",) if denoiser.family is PIXART_SIGMA else ("mid",))
        layers = self_attention_layers(denoiser.network, parts)
        with identity_attention(layers, len(x_t)):
            prediction = self.predict(step, x_t, Conditioning.cat([self.both, self.conditioning]))
        self.evaluations += len(x_t)
        conditional, unconditional, self.perturbed = prediction.chunk(3)
        return conditional, unconditional

    def combined(self, step: int, guided: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return guided + self.setting.config.perturbed_scale * (conditional.float() - self.perturbed.float())
