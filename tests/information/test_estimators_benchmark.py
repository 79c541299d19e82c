import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / "estimators.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.long
def test_estimators_table_has_every_option(tmp_path):
    done = run("--smoke", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    worlds = {row["world"] for row in report["results"]}
    assert len(worlds) == 4
    assert len(report["results"]) == len(worlds) * 18
    assert all(row["variance x evaluations"] > 0 for row in report["results"])
    assert {row["times uniform's"] for row in report["results"] if row["probes"] == "uniform"} == {1.0}


def test_odd_num_samples_is_refused():
    done = run("--num-samples", "9")
    assert (done.returncode, done.stderr.splitlines()[-1].partition(";")[0]) == (2, "error: num_samples: 9 is invalid")
