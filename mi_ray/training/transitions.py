"""The sampling steps that DPOK trains on, as rows of a `losses.Batch`.

A step from x_t to x_s of a stochastic solver is x_s = A x_t + B x0 + C previous_x0 + D z (`diffusion.sampling`). x0 is
the policy's, and z is normal. With y = x0 + (D / B) z, the log-probability of the step under any policy is
-(B / D)^2 ||y - x0||^2 / 2 and a constant. This is a squared error: that of a row whose clean latents are y and whose
noised latents are x_t.
"""

from typing import NamedTuple

from torch import Tensor

from mi_ray.config import SamplerConfig
from mi_ray.diffusion.sampling import solver_plan
from mi_ray.diffusion.schedules import Schedule


class Rows(NamedTuple):
    """The rows of m candidates at one noise level. The defaults are those of rows that are no sampling step."""

    x0: Tensor  # (m, *latent_shape) fp32, y of a step
    noise: Tensor  # (m, *latent_shape) fp32: alpha x0 + sigma noise = x_t
    timestep: Tensor  # () long
    guidance: float = 1.0  # guidance_scale of the step
    precision: float = 0.0  # see `SolverPlan.precision`


class Transitions:
    """Makes rows of the stored steps of an update.

    Args:
        schedule: of a variance-preserving model. Its timesteps are whole numbers.
        sampler: with a stochastic solver.
    """

    def __init__(self, schedule: Schedule, sampler: SamplerConfig):
        self.plan = solver_plan(schedule, sampler.solver, sampler.num_inference_steps, sampler.timestep_spacing)
        self.precision = self.plan.precision(schedule.prediction_type)
        self.table = [values.float() for values in schedule.table]
        guided = self.plan.guided(sampler.guidance_interval)
        self.guidance = [sampler.guidance_scale if of_step else 1.0 for of_step in guided]

    def rows(self, steps: Tensor, stored: Tensor, place: float) -> Rows:
        """The rows of one of the stored steps.

        Args:
            steps: (K,) long, the indices of the stored steps.
            stored: (m, K, 2, *latent_shape) fp32, see `Trajectory.transitions`.
            place: in [0, 1): the step, as a share of the stored ones.
        """
        k = min(int(place * len(steps)), len(steps) - 1)
        step = int(steps[k])
        timestep = self.plan.timesteps[step]
        alpha, sigma = (values[timestep] for values in self.table)
        x_t, y = stored[:, k].unbind(1)
        return Rows(y, (x_t - alpha * y) / sigma, timestep, self.guidance[step], float(self.precision[step]))
