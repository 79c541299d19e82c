"""`kernels.guided_step` as one Triton program: it reads and writes every number once and computes the sums as it goes.

A program processes BLOCK neighbouring numbers of one sample and writes its own partial sums. This needs no atomics and
no second kernel, and the result depends only on the sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers per program: eight per thread, which is 16 bytes in fp16
NUM_WARPS = 4


@triton.jit
def step_program(
    conditional,
    unconditional,
    latents,
    previous_x0,
    noise,
    coefficients,
    guidance,
    following,
    x0_out,
    statistics,
    delta_map,
    pixels,  # numbers per channel
    coefficients_stride,  # 0 if all samples share one row
    guidance_stride,
    cross_offset,  # from ||Delta||^2 of a sample to its <g, Delta>
    CHANNELS: tl.constexpr,  # more than one only if the map needs a sum over channels
    GUIDED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NOISY: tl.constexpr,
    WITH_X0: tl.constexpr,
    WITH_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = coefficients + sample * coefficients_stride
    keep, clean, momentum, spread = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    from_latents, from_prediction = tl.load(row + 4), tl.load(row + 5)
    scale, shift = tl.load(row + 6), tl.load(row + 7)
    weight = tl.load(guidance + sample * guidance_stride)

    position = part * BLOCK + tl.arange(0, BLOCK)
    inside = position < pixels
    delta_sq = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    for channel in range(CHANNELS):
        where = (sample * CHANNELS + channel) * pixels + position
        guided = tl.load(conditional + where, inside, 0.0).to(tl.float32)
        x_t = tl.load(latents + where, inside, 0.0).to(tl.float32)
        if GUIDED:
            without = tl.load(unconditional + where, inside, 0.0).to(tl.float32)
            difference = guided - without
            delta = scale * difference
            delta_sq += delta * delta
            cross += (scale * guided + shift * x_t) * delta
            guided = without + weight * difference
        x0 = from_latents * x_t + from_prediction * guided
        result = keep * x_t + clean * x0
        if MOMENTUM:
            result += momentum * tl.load(previous_x0 + where, inside, 0.0).to(tl.float32)
        if NOISY:
            result += spread * tl.load(noise + where, inside, 0.0).to(tl.float32)
        tl.store(following + where, result, inside)
        if WITH_X0:
            tl.store(x0_out + where, x0, inside)
    if WITH_MAP:
        tl.store(delta_map + sample * pixels + position, delta_sq, inside)
    if GUIDED:
        partial = statistics + sample * tl.num_programs(0) + part
        tl.store(partial, tl.sum(delta_sq))
        tl.store(partial + cross_offset, tl.sum(cross))


def parts(latent_shape: tuple[int, ...], with_map: bool = False) -> int:
    """Number of programs per sample."""
    return triton.cdiv(torch.Size(latent_shape[1:] if with_map else latent_shape).numel(), BLOCK)


def triton_step(
    conditional: Tensor,
    unconditional: Tensor | None,
    latents: Tensor,
    previous_x0: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float | Tensor,
    statistics: Tensor,
    *,
    with_x0: bool = True,
    delta_map: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The Triton implementation of `kernels.guided_step`, with the same arguments and results.

    All tensors are read in the memory layout of `latents`. A tensor with another layout is copied first.
    """
    channels = latents.shape[1] if delta_map is not None else 1
    if delta_map is not None or not _dense(latents):
        latents = latents.contiguous()
    given = (conditional, unconditional, previous_x0, noise)
    conditional, unconditional, previous_x0, noise = (_laid_out(values, latents) for values in given)
    if not isinstance(guidance_scale, Tensor):
        guidance_scale = torch.full((1,), guidance_scale, dtype=torch.float32, device=latents.device)
    following = torch.empty_like(latents)
    x0 = torch.empty_like(latents) if with_x0 else None
    nothing = latents  # placeholder for a pointer that is not read
    if unconditional is None:
        statistics.fill_(torch.nan)
        if delta_map is not None:
            delta_map.fill_(torch.nan)
    count, pixels = len(latents), latents[0].numel() // channels
    step_program[(triton.cdiv(pixels, BLOCK), count)](
        conditional,
        nothing if unconditional is None else unconditional,
        latents,
        nothing if previous_x0 is None else previous_x0,
        nothing if noise is None else noise,
        coefficients,
        guidance_scale,
        following,
        nothing if x0 is None else x0,
        statistics,
        statistics if delta_map is None else delta_map,
        pixels,
        coefficients.stride(0) if len(coefficients) > 1 else 0,
        guidance_scale.stride(0) if len(guidance_scale) > 1 else 0,
        statistics.stride(0),
        CHANNELS=channels,
        GUIDED=unconditional is not None,
        MOMENTUM=previous_x0 is not None,
        NOISY=noise is not None,
        WITH_X0=with_x0,
        WITH_MAP=delta_map is not None and unconditional is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return following, x0


def _dense(values: Tensor) -> bool:
    return values.is_contiguous() or (values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last))


def _laid_out(values: Tensor | None, like: Tensor) -> Tensor | None:
    """`values` in the memory layout of `like`."""
    if values is None or values.stride() == like.stride():
        return values
    return torch.empty_like(like, dtype=values.dtype).copy_(values)


_NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def compile_step(
    capability: int,
    dtype: torch.dtype,
    latent_shape: tuple[int, ...],
    *,
    momentum: bool = False,
    noisy: bool = False,
    with_x0: bool = False,
    with_map: bool = False,
):
    """Compile the program that a launch would use for predictions of this dtype and fp32 latents; needs no GPU.

    Args:
        capability: compute capability of the GPU, such as 80 or 90.

    Returns:
        Triton's CompiledKernel: `asm["ptx"]` and `metadata`.
    """
    channels = latent_shape[0] if with_map else 1
    pixels = torch.Size(latent_shape).numel() // channels
    flags = {
        "CHANNELS": channels,
        "GUIDED": True,
        "MOMENTUM": momentum,
        "NOISY": noisy,
        "WITH_X0": with_x0,
        "WITH_MAP": with_map,
        "BLOCK": BLOCK,
    }
    numbers = {"pixels": pixels, "coefficients_stride": 0, "guidance_stride": 0, "cross_offset": 0}
    names = step_program.arg_names
    signature = dict.fromkeys(names, "*fp32") | dict.fromkeys(numbers, "i32") | dict.fromkeys(flags, "constexpr")
    signature |= dict.fromkeys(("conditional", "unconditional"), _NAMES[dtype])
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or numbers.get(name, 1) % 16 == 0]
    source = triton.compiler.ASTSource(
        step_program,
        signature,
        {(names.index(name),): value for name, value in flags.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": NUM_WARPS})
