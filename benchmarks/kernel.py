"""Memory traffic and launches of a solver step: python benchmarks/kernel.py [--out FILE.json] [--check] [--smoke]"""

import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from unittest.mock import MagicMock, patch

import torch
from gates import Benchmark, Findings, Gate, main
from pydantic import Field, PositiveInt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mi_ray.diffusion.kernels import guided_step, statistics_parts

CAPABILITIES = (80, 90)  # A100, H100
GUIDANCE = 7.5
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
ACCESS = re.compile(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)?)*?(?:\.v(\d))?\.b(\d+)\b")


@dataclass(frozen=True)
class Case:
    """The inputs and outputs of a solver step besides both predictions, x_t and the next x_t."""

    solver: str
    momentum: bool = False
    noisy: bool = False
    with_x0: bool = False

    def minimum_bytes(self, prediction_bytes: int) -> int:
        """Bytes per latent element if every value is read once and written once; the solver state is fp32."""
        return 2 * prediction_bytes + 4 * (2 + self.momentum + self.noisy + self.with_x0)


CASES = (Case("ddim"), Case("ddpm", noisy=True), Case("dpm++2m", momentum=True, with_x0=True))


class KernelBenchmark(Benchmark):
    """How many bytes does one solver step with its statistics read and write, and how many kernels does it launch?
    Compared: naive, in PyTorch, compiled, fused."""

    batch: PositiveInt = Field(64, description="number of candidates")
    size: PositiveInt = Field(64, description="latents have 4 x size x size; 64: Stable Diffusion at 512 pixels")
    repeats: PositiveInt = Field(100, description="number of timed steps; the median is reported")

    def answer(self) -> Findings:
        shape = (4, self.size, self.size)
        rows, compiled = [], []
        for case in CASES[-1:] if self.smoke else CASES:
            for dtype in (torch.float16, torch.float32):
                rows += measure(case, dtype, self.batch, shape, 5 if self.smoke else self.repeats, not self.smoke)
            for capability in CAPABILITIES if find_spec("triton") else ():
                dtypes = torch.float16, torch.bfloat16, torch.float32
                compiled += [resources(case, dtype, shape, capability) for dtype in dtypes]
        by_way = {way: [row for row in rows if row["way"] == way] for way in ("naive", "eager")}
        gates = {
            "eager_bytes_of_naive": Gate(
                max(
                    e["bytes_per_number"] / n["bytes_per_number"]
                    for e, n in zip(by_way["eager"], by_way["naive"], strict=True)
                ),
                maximum=0.8,
            )
        }
        if compiled:
            gates |= {
                "fused_launches": Gate(max(row["launches"] for row in compiled), maximum=1),
                "fused_bytes_over_minimum": Gate(max(row["bytes_over_minimum"] for row in compiled), maximum=1.0),
                "fused_share_of_16_byte_accesses": Gate(min(row["wide_share"] for row in compiled), minimum=1.0),
                "fused_spilled_bytes": Gate(max(row["spilled_bytes"] for row in compiled), maximum=0),
            }
        return Findings(rows + compiled, gates)


# ---------------------------------------------------------------------------------------------- what runs
def draw(case: Case, dtype: torch.dtype, batch: int, shape: tuple[int, ...], device: str) -> tuple:
    """The positional arguments of `guided_step` up to the statistics."""
    conditional, unconditional = torch.randn(2, batch, *shape, device=device, dtype=torch.float32).to(dtype)
    latents, previous_x0, noise = torch.randn(3, batch, *shape, device=device)
    coefficients = torch.tensor([[0.7, 0.4, -0.2, 0.3, 1.6, -1.3, 1.0, 0.0]], device=device)
    given = previous_x0 if case.momentum else None, noise if case.noisy else None
    guidance = torch.full((1,), GUIDANCE, device=device)
    return conditional, unconditional, latents, *given, coefficients, guidance


def naive_step(conditional, unconditional, latents, previous_x0, noise, coefficients, guidance, statistics):
    """A naive implementation, formula by formula, as in usual pipelines and schedulers."""
    keep, clean, momentum, spread, from_latents, from_prediction, _, _ = coefficients[0]
    conditional, unconditional = conditional.float(), unconditional.float()
    guided = unconditional + guidance * (conditional - unconditional)
    x0 = from_latents * latents + from_prediction * guided
    following = keep * latents + clean * x0
    if previous_x0 is not None:
        following = following + momentum * previous_x0
    if noise is not None:
        following = following + spread * noise
    delta = conditional - unconditional
    statistics[0] = (delta**2).flatten(1).sum(1, keepdim=True)
    statistics[1] = (conditional * delta).flatten(1).sum(1, keepdim=True)
    return following, x0


def measure(
    case: Case, dtype: torch.dtype, batch: int, shape: tuple[int, ...], repeats: int, with_compile: bool
) -> list[dict]:
    """One row per implementation: bytes and launches, and times on the available device, measured in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = draw(case, dtype, batch, shape, device)
    statistics = torch.empty(2, batch, 1, device=device)

    def eager(*given):
        return guided_step(*given, with_x0=case.with_x0)

    ways: dict[str, Callable] = {"naive": naive_step, "eager": eager}
    counts = {way: counted(step, *arguments, statistics) for way, step in ways.items()}
    if with_compile:
        counts["torch.compile"] = inductor_counts(naive_step, *arguments, statistics)
        ways["torch.compile"] = torch.compile(naive_step, dynamic=False)
    buffers = dict.fromkeys(ways, statistics)
    if device == "cuda" and find_spec("triton"):
        ways["fused"] = lambda *given: guided_step(*given, with_x0=case.with_x0, kernel="triton")
        buffers["fused"] = torch.empty(2, batch, statistics_parts(shape, "triton"), device=device)
        counts["fused"] = (1, case.minimum_bytes(dtype.itemsize) * arguments[2].numel())
    seconds = timed({way: lambda way=way: ways[way](*arguments, buffers[way]) for way in ways}, repeats)
    numbers = arguments[2].numel()
    bandwidth = copy_bandwidth() if device == "cuda" else None  # on a CPU all data is in the caches
    return [
        {
            "solver": case.solver,
            "predictions": str(dtype).removeprefix("torch."),
            "way": way,
            "launches": counts[way][0],
            "bytes_per_number": counts[way][1] / numbers,
            "minimum": case.minimum_bytes(dtype.itemsize),
            "microseconds": 1e6 * seconds[way],
            "roofline_share": bandwidth and case.minimum_bytes(dtype.itemsize) * numbers / seconds[way] / bandwidth,
        }
        for way in ways
    ]


class Counter(TorchDispatchMode):
    """Counts launches and the bytes that they read and write. Views and empty tensors cost nothing."""

    FREE = ("empty", "empty_like", "new_empty", "empty_strided")

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function.overloadpacket.__name__ not in (*self.FREE, "_unsafe_view", "resize_"):
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            written = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            # A tensor that is changed in place is both read and written.
            self.launches += 1
            self.bytes += sum(t.numel() * t.itemsize for t in read) + sum(t.numel() * t.itemsize for t in written)
            if "out" in (kwargs or {}):  # it was also counted as read
                self.bytes -= sum(t.numel() * t.itemsize for t in written)
        return result


def counted(step: Callable, *arguments) -> tuple[int, int]:
    """Launches and bytes of one call."""
    with Counter() as counter:
        step(*arguments)
    return counter.launches, counter.bytes


def inductor_counts(step: Callable, *arguments) -> tuple[int, int]:
    """Number of kernels that torch.compile generates, and the bytes that they access according to it."""
    from torch._inductor import metrics

    torch.compiler.reset()
    metrics.reset()
    # Inductor counts bytes only if its metrics log is on. The mock replaces this log.
    with (
        warnings.catch_warnings(action="ignore"),  # about disabled caches
        torch._inductor.config.patch(force_disable_caches=True),
        patch("torch._inductor.compile_fx.inductor_metrics_log", MagicMock()),
    ):
        torch.compile(step, dynamic=False)(*arguments)
    return metrics.generated_kernel_count, metrics.num_bytes_accessed


def timed(steps: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each step; the steps run in turn."""
    cuda = torch.cuda.is_available()
    times = {way: [] for way in steps}
    for turn in range(repeats + 3):
        for way, step in steps.items():
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            if turn >= 3:  # the first three turns are warm-up
                times[way].append(time.perf_counter() - began)
    return {way: median(values) for way, values in times.items()}


def copy_bandwidth() -> float:
    """Bytes per second that a copy of a large tensor on the GPU reads and writes: the roofline."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / timed({"copy": lambda: target.copy_(source)}, 5)["copy"]


# ---------------------------------------------------------------------------------------------- what is compiled
def resources(case: Case, dtype: torch.dtype, shape: tuple[int, ...], capability: int) -> dict:
    """Memory accesses in the PTX of the fused program, and the report of ptxas. Needs no GPU."""
    import triton

    from mi_ray.diffusion import triton_step

    kernel = triton_step.compile_step(
        capability, dtype, shape, momentum=case.momentum, noisy=case.noisy, with_x0=case.with_x0
    )
    ptx = kernel.asm["ptx"]
    widths = [int(vector or 1) * int(bits) // 8 for _, vector, bits in ACCESS.findall(ptx)]
    scalars = 7 + case.momentum + case.noisy + 2  # coefficients, guidance, partial sums: once per program
    moved = sum(widths) - 4 * scalars
    report = assembled(ptx, Path(triton.knobs.nvidia.ptxas.path))
    per_number = moved * 32 * triton_step.NUM_WARPS / triton_step.BLOCK
    return {
        "solver": case.solver,
        "predictions": str(dtype).removeprefix("torch."),
        "way": f"fused, sm_{capability}",
        "launches": launches(case, dtype, shape),
        "bytes_per_number": per_number,
        "minimum": case.minimum_bytes(dtype.itemsize),
        "bytes_over_minimum": per_number / case.minimum_bytes(dtype.itemsize),
        "scalar_bytes_a_program": 4 * scalars,
        "wide_share": widths.count(16) / (len(widths) - scalars),
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": sum(map(int, SPILLS.search(report).groups())),
        "shared_bytes": kernel.metadata.shared,
    }


def assembled(ptx: str, ptxas: Path) -> str:
    """The report of NVIDIA's assembler ptxas, which is part of Triton."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "step.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"-arch={target}", source, "-o", Path(folder) / "step.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def launches(case: Case, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Number of launches of one fused step: the Triton program plus all PyTorch operations."""
    arguments = draw(case, dtype, 2, shape, "cpu")
    statistics = torch.empty(2, 2, statistics_parts(shape, "triton"))
    program = MagicMock()
    with patch("mi_ray.diffusion.triton_step.step_program", program):
        beside, _ = counted(lambda *a: guided_step(*a, with_x0=case.with_x0, kernel="triton"), *arguments, statistics)
    return beside + program.__getitem__.return_value.call_count


if __name__ == "__main__":
    main(KernelBenchmark)
