"""One solver step, fused: guidance, the linear update of the latents and the step's statistics."""

import torch
from torch import Tensor


def guided_step(
    conditional: Tensor,
    unconditional: Tensor,
    latents: Tensor,
    previous_x0: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    delta_sq: Tensor,
    cross: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance the latents by one step and record how much the prompt had to say.

    With delta = conditional - unconditional:

        epsilon = unconditional + guidance_scale * delta           Ho & Salimans 2022, arXiv 2207.12598, eq. 6
        x0      = (x_t - sigma * epsilon) / alpha
        next    = A * x_t + B * x0 + C * previous_x0 + D * noise    see `sampling.SolverPlan`

    Args:
        conditional, unconditional: (n, *shape) fp32 predictions of epsilon.
        latents: (n, *shape) fp32 x_t.
        previous_x0: (n, *shape) fp32, x0 of the step before; None where C is 0.
        noise: (n, *shape) fp32; None where D is 0.
        coefficients: (6,) fp32 on the same device: A, B, C, D, alpha, sigma.
        delta_sq: (n,) fp32, written: ||delta||^2.
        cross: (n,) fp32, written: <conditional, delta>.

    Returns:
        The next latents and x0, both (n, *shape) fp32. Nothing waits for the device.
    """
    keep, clean, momentum, spread, alpha, sigma = coefficients.unbind()
    delta = conditional - unconditional
    flat = delta.flatten(1)
    torch.linalg.vecdot(flat, flat, out=delta_sq)
    torch.linalg.vecdot(conditional.flatten(1), flat, out=cross)
    epsilon = torch.add(unconditional, delta, alpha=guidance_scale)
    x0 = torch.addcmul(latents, sigma, epsilon, value=-1).div_(alpha)
    following = torch.addcmul(keep * latents, clean, x0)
    if previous_x0 is not None:
        following.addcmul_(momentum, previous_x0)
    if noise is not None:
        following.addcmul_(spread, noise)
    return following, x0
