"""python benchmarks/hostile_inputs.py --examples 5000 --out report.json"""

import os
import re
import subprocess
import sys

from gates import ROOT, Benchmark, Findings, Gate
from pydantic import Field
from pydantic_settings import CliApp

TESTS = "tests/inputs/test_properties.py"


class HostileInputs(Benchmark):
    """Does anything but the right value, an error row, or a message of bounded length come out of random prompt files,
    captions, tables, tars and images?"""

    examples: int = Field(5000, ge=1, description="number of random inputs of each property")

    def answer(self) -> Findings:
        examples = 20 if self.smoke else self.examples
        command = [sys.executable, "-m", "pytest", "-q", TESTS, "--hypothesis-show-statistics"]
        surroundings = os.environ | {"EXAMPLES": str(examples)}
        done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
        rows = list(_rows(done.stdout))
        if not rows:
            raise ValueError(f"{TESTS} did not run: {done.stdout[-500:]}{done.stderr[-500:]}")
        failed = sum(row["failed"] for row in rows)
        tried = sum(row["inputs"] for row in rows)
        return Findings(rows, {"failed": Gate(failed, maximum=0), "tests failed": Gate(done.returncode, maximum=0),
                               "inputs": Gate(tried, minimum=1)})  # fmt: skip


def _rows(output: str):
    """A row for each property, from the statistics of hypothesis."""
    for block in re.split(rf"^{TESTS}::", output, flags=re.M)[1:]:
        counts = re.findall(r"(\d+) passing, (\d+) failing", block)
        if counts:
            passing, failing = (sum(map(int, column)) for column in zip(*counts, strict=True))
            name = block.partition(":")[0].removeprefix("test_").replace("_", " ")
            yield {"property": name, "inputs": passing + failing, "failed": failing}


if __name__ == "__main__":
    CliApp.run(HostileInputs)
