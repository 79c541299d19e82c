"""All that a GPU must show: python benchmarks/gpu.py --out FILE.json (`make gpu`)

Each part is a command of its own with at most ten minutes. A part that fails or takes too long does not stop the
others. The file has the reports of all parts.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gates import ROOT, Benchmark, Findings, Gate, main
from pydantic import Field, PositiveFloat

ARCHITECTURES = ("sd15", "sdxl", "sd35-medium")
TAIL = 4000  # characters of a part's output that are kept


def _script(name: str, *arguments: str) -> Callable[[Path], list[str]]:
    """The command of a benchmark, which writes its report to the given file."""
    return lambda out: [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--out", str(out)]


def _tests(out: Path) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]


def _pipeline(out: Path) -> list[str]:
    config = ["--config", str(ROOT / "jobs" / "configs" / "shapes-smoke.yaml"), "--run-dir", str(out.with_suffix(""))]
    gpus = ["--resources.gpus-per-actor", "0.5", "--resources.train-gpus", "0.5"]
    return [sys.executable, str(ROOT / "jobs" / "pipeline.py"), *config, *gpus]


# name -> the command, given the JSON file that a benchmark writes
PARTS: dict[str, Callable[[Path], list[str]]] = {
    "tests": _tests,
    "kernel": _script("kernel.py"),
    **{f"throughput-{name}": _script("throughput.py", "--architecture", name) for name in ARCHITECTURES},
    "pipeline": _pipeline,
}


class GpuBenchmark(Benchmark):
    """Does everything that needs a GPU work on this one, and how fast is it?"""

    parts: tuple[str, ...] = Field(tuple(PARTS), description=f"parts to run: {', '.join(PARTS)}")
    minutes: PositiveFloat = Field(10.0, description="longest time of a part")
    without_gpu: bool = Field(False, description="run also if torch finds no GPU; then no figure is one of a GPU")

    def answer(self) -> Findings:
        if unknown := set(self.parts) - PARTS.keys():
            raise ValueError(f"parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
        if not torch.cuda.is_available() and not self.without_gpu:
            raise ValueError("torch finds no GPU here; run this on a machine with one")
        reports, rows, gates = {}, [], {}
        with tempfile.TemporaryDirectory() as folder:
            for name in self.parts:
                report = run_part(PARTS[name], Path(folder) / f"{name}.json", 60 * self.minutes)
                reports[name] = report
                rows.append({"part": name, "ended": report["ended"], "seconds": report["seconds"]})
                gates[f"{name}_ran"] = Gate(float(report["ended"] == "ok"), minimum=1)
                for gate, values in report.get("gates", {}).items():
                    gates[f"{name}_{gate}"] = Gate(values["value"], values.get("min"), values.get("max"))
        return Findings(rows, gates, {"parts": reports})


def run_part(command: Callable[[Path], list[str]], out: Path, seconds: float) -> dict:
    """Run a command and return how it ended ("ok", "failed" or "too long"), its time, the end of its output, and the
    report that it wrote."""
    began = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command(out), cwd=ROOT, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=seconds)
        ended = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what the part has started
        output, ended = process.communicate()[0], "too long"
    report = {"ended": ended, "seconds": time.monotonic() - began, "output": output[-TAIL:]}
    if out.is_file():
        report |= json.loads(out.read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    main(GpuBenchmark)
