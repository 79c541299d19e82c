"""What all guidance methods have in common."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mi_ray.config import GuidanceConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import PipelineDenoiser
from mi_ray.diffusion.sampling import SolverPlan


@dataclass(frozen=True, eq=False)
class Setting:
    """Model, steps and settings of the sampling that a method changes."""

    denoiser: PipelineDenoiser
    plan: SolverPlan
    null: Conditioning  # of the empty prompt, one row
    guidance_scale: float
    config: GuidanceConfig


class Guide:
    """A guidance method for n candidates of one batch: a `sampling.StepGuide`. This class is classifier-free guidance.

    A method overrides what differs from it. Both predictions stay the model's own, because the scores of the sampling
    are computed from them; a method changes their combination, `combined`, or the latents, `moved`. A method that
    changes the conditional prediction itself says so in `raw`.

    Args:
        conditioning: of the candidates' prompts, n rows.
    """

    raw = True  # whether both predictions are the model's own

    def __init__(self, setting: Setting, conditioning: Conditioning):
        self.setting, self.conditioning = setting, conditioning.to(setting.denoiser.device)
        self.evaluations = 0  # of the denoiser so far, besides one per branch and step

    @classmethod
    def of_prompts(cls, setting: Setting, prompts: list[str], conditioning: Conditioning) -> "Guide":
        """The guide of P prompts, with their conditioning; its `rows` are the guides of batches."""
        return cls(setting, conditioning)

    def rows(self, index: Tensor) -> "Guide":
        """The guide of candidates with the prompts `index`, (n,) long."""
        return type(self)(self.setting, self.conditioning.rows(index))

    # ------------------------------------------------------------------------------------------ a step
    def moved(self, step: int, x_t: Tensor) -> Tensor:
        """The latents that the step starts from, (n, *latent_shape) fp32."""
        return x_t

    def predictions(self, step: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional prediction, each (n, *latent_shape)."""
        conditional, unconditional = self.predict(step, x_t, self.both).chunk(2)
        return conditional, unconditional

    def combined(self, step: int, guided: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The prediction that the solver follows, (n, *latent_shape) fp32.

        Args:
            guided: prediction of classifier-free guidance, fp32.
        """
        return guided

    # ------------------------------------------------------------------------------------------ for methods
    @cached_property
    def both(self) -> Conditioning:
        """2n rows: with and without the prompt."""
        null = self.setting.null.to(self.setting.denoiser.device)
        return Conditioning.cat([self.conditioning, null.expand(len(self.conditioning))])

    def predict(self, step: int, x_t: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's prediction at the noise level of a step. The n latents are repeated for every n rows."""
        times = len(conditioning) // len(x_t)
        timesteps = self.setting.plan.timesteps[step].to(x_t.device).expand(len(conditioning))
        return self.setting.denoiser.predict(torch.cat([x_t] * times), timesteps, conditioning)
