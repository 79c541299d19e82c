"""One solver step, fused: guidance, the linear update of the latents and the step's statistics.

With c and u the model's own predictions with and without the prompt, x = x_t and w the guidance scale
(Ho & Salimans 2022, arXiv 2207.12598, eq. 6), a step is linear in what it reads:

    x0   = kx x + kp (u + w (c - u))
    next = A x + B x0 + C previous_x0 + D noise          see `sampling.SolverPlan`

and what the prompt had to say is told by g = p c + q x, the prediction that the scores speak of (epsilon, or the
velocity of a flow), and Delta = p (c - u), its difference: ||Delta||^2 and <g, Delta>, sums in fp32.

`guided_step` has two implementations that agree up to rounding: in PyTorch, and as one Triton program
(`triton_step`), which reads and writes each number once.
"""

import logging
import os
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["eager", "triton"]

logger = logging.getLogger(__name__)


class Coefficients(NamedTuple):
    """The columns of a step's table, in this order; each broadcasts against the latents."""

    keep: Tensor  # A
    clean: Tensor  # B
    momentum: Tensor  # C
    spread: Tensor  # D
    from_latents: Tensor  # kx
    from_prediction: Tensor  # kp
    scale: Tensor  # p
    shift: Tensor  # q


def choose_kernel(wanted: Literal["auto", "eager", "triton"], device: torch.device) -> Kernel:
    """Which implementation runs on a device. "auto" takes Triton on a CUDA GPU, else PyTorch, and logs what it took.

    Raises:
        ValueError: "triton" is wanted where it cannot run.
    """
    installed = find_spec("triton") is not None
    if wanted == "triton":
        if not installed:
            raise ValueError("kernel 'triton' will not do: Triton is not installed; install it, or take eager")
        if device.type != "cuda" and not _interpreting():
            raise ValueError(f"kernel 'triton' will not do: the device is {device.type}, not a CUDA GPU; take eager")
        return "triton"
    if wanted == "eager":
        return "eager"
    kernel = "triton" if installed and device.type == "cuda" and torch.version.cuda else "eager"
    logger.info("solver step: kernel %s on %s", kernel, device)
    return kernel


def _interpreting() -> bool:
    """Whether Triton's interpreter runs its programs, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def statistics_parts(latent_shape: tuple[int, ...], kernel: Kernel, with_map: bool = False) -> int:
    """In how many partial sums a kernel leaves each statistic of one sample; depends on nothing but its shape."""
    if kernel == "eager":
        return 1
    from mi_ray.diffusion.triton_step import parts

    return parts(latent_shape, with_map)


def guided_step(
    conditional: Tensor,
    unconditional: Tensor | None,
    latents: Tensor,
    previous_x0: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float | Tensor,
    statistics: Tensor,
    *,
    converted: bool = False,
    with_x0: bool = True,
    delta_map: Tensor | None = None,
    kernel: Kernel = "eager",
) -> tuple[Tensor, Tensor | None]:
    """Advance the latents by one step and record how much the prompt had to say. Nothing waits for the device.

    Args:
        conditional, unconditional: (n, *shape) fp32, fp16 or bf16, the model's predictions; unconditional None where
            there is no guidance: then the statistics are NaN.
        latents: (n, *shape) x_t; fp32 in sampling, any of the three here.
        previous_x0: (n, *shape), x0 of the step before; None where C is 0.
        noise: (n, *shape); None where D is 0.
        coefficients: (1, 8) or (n, 8) fp32 on the same device, the columns of `Coefficients`.
        guidance_scale: w; or (n,) fp32 on the same device, each sample's own.
        statistics: (2, n, parts) fp32, written: summed over `statistics_parts`, ||Delta||^2 and <g, Delta>.
        converted: whether p, q differ from 1, 0: whether g is another thing than the model's prediction.
        with_x0: whether x0 is wanted.
        delta_map: (n, *shape[1:]) fp32, written: Delta^2 summed over the first dimension of shape, the channels.

    Returns:
        The next latents, and x0 or None: (n, *shape), in the dtype and layout of the latents.
    """
    arguments = (conditional, unconditional, latents, previous_x0, noise, coefficients, guidance_scale, statistics)
    if kernel == "triton":
        from mi_ray.diffusion.triton_step import triton_step

        return triton_step(*arguments, with_x0=with_x0, delta_map=delta_map)
    return _eager_step(*arguments, converted=converted, with_x0=with_x0, delta_map=delta_map)


def _eager_step(
    conditional, unconditional, latents, previous_x0, noise, coefficients, guidance_scale, statistics, *,
    converted, with_x0, delta_map,
):  # fmt: skip
    """Each operation on (n, *shape) is one pass over memory; the fewest that PyTorch's operations allow."""
    column = (-1, *[1] * (latents.ndim - 1))
    c = Coefficients(*(values.view(column) for values in coefficients.unbind(1)))
    conditional, x_t = conditional.float(), latents.float()  # no pass where they are fp32
    if unconditional is None:
        guided = conditional
        statistics.fill_(torch.nan)
        if delta_map is not None:
            delta_map.fill_(torch.nan)
    else:
        delta = torch.sub(conditional, unconditional)
        _record(conditional, delta, x_t, c, statistics[..., 0], converted, delta_map)
        if isinstance(guidance_scale, Tensor):
            guided = torch.addcmul(unconditional.float(), delta, guidance_scale.view(column))
        else:
            guided = torch.add(unconditional, delta, alpha=guidance_scale)
    x0 = None
    if with_x0:
        x0 = torch.mul(x_t, c.from_latents).addcmul_(c.from_prediction, guided)
        following = torch.mul(x_t, c.keep).addcmul_(c.clean, x0)
    else:
        following = torch.mul(x_t, torch.addcmul(c.keep, c.clean, c.from_latents))
        following.addcmul_(c.clean * c.from_prediction, guided)
    if previous_x0 is not None:
        following.addcmul_(c.momentum, previous_x0)
    if noise is not None:
        following.addcmul_(c.spread, noise)
    return following.to(latents.dtype), None if x0 is None else x0.to(latents.dtype)


def _record(conditional, delta, x_t, c: Coefficients, statistics, converted: bool, delta_map):
    """Write ||p delta||^2 and <p c + q x, p delta> into statistics (2, n), without forming either."""
    delta_sq, cross = statistics
    flat = _flat(delta)
    torch.linalg.vector_norm(flat, dim=1, out=delta_sq).square_()
    torch.linalg.vecdot(_flat(conditional), flat, out=cross)  # product and sum; a matrix product is slower on a CPU
    if delta_map is not None:
        torch.sum(delta.square(), 1, out=delta_map)
    if converted:
        scale, shift = c.scale.flatten(), c.shift.flatten()
        delta_sq.mul_(scale.square())
        cross.mul_(scale.square()).addcmul_(scale * shift, torch.linalg.vecdot(_flat(x_t), flat))
        if delta_map is not None:
            delta_map.mul_(c.scale.square().flatten(1, -1).view(-1, *[1] * (delta_map.ndim - 1)))


def _flat(values: Tensor) -> Tensor:
    """(n, *shape) -> (n, -1) without a copy, channels-last memory included: the order does not matter to a sum."""
    if values.ndim == 4 and not values.is_contiguous():
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)
