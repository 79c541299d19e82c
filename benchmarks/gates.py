"""The shared part of all benchmarks: command line, report as JSON and as a table, and gates."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, CliApp, CliToggleFlag, SettingsConfigDict

from mi_ray.alignment.metric import Metric
from mi_ray.config.paths import absolute
from mi_ray.scoring.machine import usable_cores
from mi_ray.storage import write_json

PACKAGES = ("mi-ray", "torch", "ray", "diffusers", "transformers", "peft", "numpy", "scipy", "pyarrow")
ROOT = Path(__file__).parent.parent
LocalPath = Annotated[Path, AfterValidator(lambda path: Path(absolute(str(path))))]


@dataclass(frozen=True)
class Gate:
    """A measured value and its allowed range: at least `minimum`, at most `maximum`."""

    value: float
    minimum: float | None = None
    maximum: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value is in the range; false for NaN."""
        low = self.minimum is None or self.value >= self.minimum
        return bool(low and (self.maximum is None or self.value <= self.maximum))  # convert NumPy booleans

    def as_json(self) -> dict:
        bounds = {"min": self.minimum, "max": self.maximum}
        return {"value": self.value, **{k: v for k, v in bounds.items() if v is not None}, "holds": self.holds}


@dataclass(frozen=True)
class Findings:
    """The results of a benchmark: table rows, gates by name, and what the JSON file has besides them."""

    rows: list[dict[str, str | int | float]]
    gates: dict[str, Gate]
    details: dict = field(default_factory=dict)


class Benchmark(BaseSettings):
    """A question with its command line. A subclass states the question in its docstring and answers it."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True, cli_hide_none_type=True, cli_parse_none_str="none", extra="forbid"
    )

    out: LocalPath | None = Field(None, description="JSON file to write")
    check: CliToggleFlag[bool] = Field(False, description="exit with status 1 if a gate does not hold")
    smoke: CliToggleFlag[bool] = Field(False, description="run the same code on small inputs; takes seconds")

    def answer(self) -> Findings:
        """Run the measurement.

        Raises:
            ValueError: an option is wrong.
        """
        raise NotImplementedError

    def cli_cmd(self):
        question = " ".join(type(self).__doc__.split())
        try:
            findings = self.answer()
        except ValueError as error:
            sys.exit(_refused(error))
        gates = {name: gate.as_json() for name, gate in findings.gates.items()}
        surroundings = environment()
        print(f"{question}\n\n{table(findings.rows)}\n")
        print(table([{"gate": name, **gate} for name, gate in gates.items()]))
        print("\n" + ", ".join(f"{name} {value}" for name, value in surroundings.items() if name != "versions"))
        if self.out:
            content = {"question": question, "results": findings.rows, "gates": gates, "environment": surroundings}
            write_json(str(self.out), content | findings.details)
        if self.check and not all(gate.holds for gate in findings.gates.values()):
            sys.exit(1)


def main(benchmark: type[Benchmark]):
    """Run a benchmark from the command line."""
    CliApp.run(benchmark)


def _refused(error: ValueError) -> int:
    for fault in str(error).splitlines():
        print(f"error: {fault}", file=sys.stderr)
    return 2


def metric_details(metrics: Mapping[str, Metric]) -> dict[str, dict[str, str]]:
    """Model, revision, template and library of every column of some metrics."""
    return {column.name: column.as_metadata() for metric in metrics.values() for column in metric.columns}


def environment() -> dict:
    """The environment of the measurement: package versions, CPU, usable cores, GPU, and the commit of the code."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "cores": usable_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit, with "+" if files differ from it; None outside a git repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(rows: list[dict]) -> str:
    """Rows as aligned text, with a column for every key of any row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value).strip('"')
