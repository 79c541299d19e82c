"""One fused solver step: guidance, the linear update of the latents, and the statistics of the step.

Let c and u be the model's predictions with and without the prompt, x = x_t, and w the guidance scale
(Ho & Salimans 2022, arXiv 2207.12598, eq. 6). A step is linear in its inputs:

    x0   = kx x + kp (u + w (c - u))
    next = A x + B x0 + C previous_x0 + D noise          see `sampling.SolverPlan`

The scores use g = p c + q x, the prediction as epsilon (or as the velocity of a flow), and Delta = p (c - u), the
difference of g with and without the prompt. The statistics are ||Delta||^2 and <g, Delta>, summed in fp32.

`guided_step` has two implementations that agree up to rounding: one in PyTorch, and one Triton program
(`triton_step`) that reads and writes each number once.
"""

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["eager", "triton"]

logger = logging.getLogger(__name__)


class Coefficients(NamedTuple):
    """The coefficients of a step, in the order of the table's columns; each broadcasts against the latents."""

    keep: Tensor  # A
    clean: Tensor  # B
    momentum: Tensor  # C
    spread: Tensor  # D
    from_latents: Tensor  # kx
    from_prediction: Tensor  # kp
    scale: Tensor  # p
    shift: Tensor  # q


def choose_kernel(wanted: Literal["auto", "eager", "triton"], device: torch.device) -> Kernel:
    """The implementation to use on a device. "auto" selects Triton on a CUDA GPU, otherwise PyTorch, and logs it.

    Raises:
        ValueError: "triton" is requested but cannot run.
    """
    installed = find_spec("triton") is not None
    if wanted == "triton":
        if not installed:
            raise ValueError("kernel 'triton' cannot run: Triton is not installed; install it, or use eager")
        if device.type != "cuda" and not _interpreting():
            raise ValueError(f"kernel 'triton' cannot run: the device is {device.type}, not a CUDA GPU; use eager")
        return "triton"
    if wanted == "eager":
        return "eager"
    kernel = "triton" if installed and device.type == "cuda" and torch.version.cuda else "eager"
    logger.info("solver step: kernel %s on %s", kernel, device)
    return kernel


def _interpreting() -> bool:
    """Whether Triton runs in interpreter mode, which works on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def statistics_parts(latent_shape: tuple[int, ...], kernel: Kernel, with_map: bool = False) -> int:
    """Number of partial sums that a kernel writes for each statistic of one sample; depends only on the shape."""
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
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Advance the latents by one step and record the statistics of the prompt's effect. Does not wait for the device.

    Args:
        conditional, unconditional: (n, *shape) fp32, fp16 or bf16, the model's predictions. unconditional is None
            without guidance; the statistics are then NaN.
        latents: (n, *shape) x_t in fp32, fp16 or bf16; sampling uses fp32.
        previous_x0: (n, *shape), x0 of the previous step; None if C is 0.
        noise: (n, *shape); None if D is 0.
        coefficients: (1, 8) or (n, 8) fp32 on the same device, the columns of `Coefficients`.
        guidance_scale: w; or (n,) fp32 on the same device, one value per sample.
        statistics: (2, n, parts) fp32, output: partial sums of ||Delta||^2 and <g, Delta>, see `statistics_parts`.
        converted: whether (p, q) differs from (1, 0), so that g is not the model's own prediction.
        with_x0: whether x0 is returned.
        delta_map: (n, *shape[1:]) fp32, output: Delta^2 summed over the channels, the first dimension of shape.
        rescale: (guided prediction, conditional prediction) -> the prediction of the step; the statistics do not see
            it. Only the eager kernel has it.

    Returns:
        The next latents, and x0 or None: (n, *shape), in the dtype and memory layout of the latents.
    """
    arguments = (conditional, unconditional, latents, previous_x0, noise, coefficients, guidance_scale, statistics)
    if kernel == "triton":
        from mi_ray.diffusion.triton_step import triton_step

        return triton_step(*arguments, with_x0=with_x0, delta_map=delta_map)
    return _eager_step(*arguments, converted=converted, with_x0=with_x0, delta_map=delta_map, rescale=rescale)


def _eager_step(
    conditional, unconditional, latents, previous_x0, noise, coefficients, guidance_scale, statistics, *,
    converted, with_x0, delta_map, rescale,
):  # fmt: skip
    """Each operation on (n, *shape) is one pass over memory. This is the smallest number of PyTorch operations."""
    column = (-1, *[1] * (latents.ndim - 1))
    c = Coefficients(*(values.view(column) for values in coefficients.unbind(1)))
    conditional, x_t = conditional.float(), latents.float()  # no copy if they are fp32
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
        if rescale is not None:
            guided = rescale(guided.float(), conditional)
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
    """Write ||p delta||^2 and <p c + q x, p delta> into statistics (2, n), without forming p delta or p c + q x."""
    delta_sq, cross = statistics
    flat = _flat(delta)
    torch.linalg.vector_norm(flat, dim=1, out=delta_sq).square_()
    torch.linalg.vecdot(_flat(conditional), flat, out=cross)  # faster on a CPU than a matrix product
    if delta_map is not None:
        torch.sum(delta.square(), 1, out=delta_map)
    if converted:
        scale, shift = c.scale.flatten(), c.shift.flatten()
        delta_sq.mul_(scale.square())
        cross.mul_(scale.square()).addcmul_(scale * shift, torch.linalg.vecdot(_flat(x_t), flat))
        if delta_map is not None:
            delta_map.mul_(c.scale.square().flatten(1, -1).view(-1, *[1] * (delta_map.ndim - 1)))


def _flat(values: Tensor) -> Tensor:
    """(n, *shape) -> (n, -1), without a copy of channels-last memory. The order of the elements then changes."""
    if values.ndim == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)
