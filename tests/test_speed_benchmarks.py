"""The speed benchmarks: that they measure what they report. No test checks a speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=surroundings)


# ------------------------------------------------------------------------------------------ the compiled kernel
@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """The report of the kernel benchmark, which compiles for sm_80 and sm_90 without a GPU."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("kernel") / "kernel.json"
    done = run("kernel.py", "--smoke", "--check", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_compiled_step_moves_every_byte_once(compiled):
    rows = [row for row in compiled["results"] if row["way"].startswith("fused, sm_")]
    assert {(row["way"], row["predictions"]) for row in rows} == {
        (f"fused, sm_{capability}", dtype) for capability in (80, 90) for dtype in ("float16", "bfloat16", "float32")
    }
    for row in rows:  # dpm++2m reads both predictions, x_t and the last x0, and writes x_t and x0
        assert row["bytes_per_number"] == (20 if row["predictions"] != "float32" else 24)
        assert row["wide_share"] == 1
        assert row["spilled_bytes"] == 0
        assert row["registers"] <= 128
        assert row["launches"] == 1


@pytest.mark.slow
def test_kernel_benchmark_reports_unaligned_latents(tmp_path):
    pytest.importorskip("triton")
    done = run("kernel.py", "--smoke", "--check", "--size", "7", "--out", str(tmp_path / "odd.json"))
    assert done.returncode == 1, done.stderr
    gates = json.loads((tmp_path / "odd.json").read_text())["gates"]
    assert not gates["fused_share_of_16_byte_accesses"]["holds"]
    assert gates["fused_bytes_over_minimum"]["holds"]


# ------------------------------------------------------------------------------------------ pruning
@pytest.fixture
def pruning(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pruning

    return pruning


def test_pruning_schedules_on_recorded_scores(pruning):
    """Two prompts with four candidates: three continue after step 1, one after step 2; the final score chooses."""
    recorded = pruning.Recorded(
        worth=np.array([[0.0, 1, 0, 0], [1, 0, 0, 0]]),
        final=np.array([[9.0, 8, 7, 6], [1, 2, 3, 4]]),
        paper=np.array([[0.0, 1, 0, 0], [0, 0, 1, 0]]),
        final_cost=5.0,
        cuts={
            ("asd", 1): np.array([[1.0, 2, 3, 4], [4, 3, 2, 1]]),
            ("asd", 2): np.array([[9.0, 2, 1, 0], [0, 1, 2, 9]]),
        },
        cut_costs={"asd": 0.5},
    )
    assert recorded.best(recorded.final).tolist() == [0, 0]
    assert recorded.best(recorded.paper).tolist() == [1, 0]
    assert recorded.survivors("asd", {1: 3}).tolist() == [[False, True, True, True], [True, True, True, False]]
    last = recorded.survivors("asd", {1: 3, 2: 1})
    assert last.tolist() == [[False, True, False, False], [False, False, True, False]]
    assert recorded.best(np.where(last, recorded.final, -np.inf)).tolist() == [1, 0]
    assert recorded.survivors("random", {1: 2, 2: 1}).sum(1).tolist() == [1, 1]


def test_pruning_evaluations_equal_a_count_by_hand(pruning, monkeypatch):
    monkeypatch.setattr(pruning, "SCHEDULES", (((0.25, 0.5), (0.75, 0.25)),))
    monkeypatch.setattr(pruning, "SCORES", ("asd",))
    draws = np.random.default_rng(0).random((4, 3, 4))
    cuts = {("asd", 1): draws[0], ("asd", 2): draws[1]}
    recorded = pruning.Recorded(draws[2].round(), draws[3], draws[0], 5.0, cuts, {"asd": 0.5})
    rows = pruning.compared(recorded, "good", "ddim", 4, 4, "pmi")
    for row, best in rows:
        assert row["top1_good"] == best.mean()
    lost, half = pruning.lost_of(np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 0, 0]))
    assert lost == pytest.approx(25)
    assert half == pytest.approx(196 * 0.5 / 2)  # standard deviation 0.5, four prompts
    whole, pruned, random = (row for row, _ in rows)
    assert whole["evaluations"] == 4 * (2 * 4 + 5)
    assert random["evaluations"] == 2 * (4 * 1 + 3 * 1 + 1 * 2) + 1 * 5
    assert pruned["evaluations"] == random["evaluations"] + (4 + 3) * 0.5
    assert [row["prune_by"] for row in (whole, pruned, random)] == ["nothing", "asd", "random"]


@pytest.mark.slow
@pytest.mark.long
def test_pruning_benchmark_runs(tiny_pipeline, tmp_path):
    out, figure = tmp_path / "pruning.json", tmp_path / "pruning.png"
    done = run("pruning.py", "--smoke", "--model", str(tiny_pipeline), "--out", str(out), "--figure", str(figure))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["results"]
    assert {row["solver"] for row in rows} == {"ddpm", "dpm++2m"}
    assert all(row["evaluations"] < rows[0]["evaluations"] for row in rows if row["prune_by"] == "random")
    assert figure.stat().st_size > 0


# ------------------------------------------------------------------------------------------ throughput
@pytest.mark.slow
@pytest.mark.long
def test_throughput_benchmark_compares_equal_work(tiny_pipeline, tmp_path):
    out, figure = tmp_path / "throughput.json", tmp_path / "throughput.png"
    done = run("throughput.py", "--smoke", "--model", str(tiny_pipeline), "--out", str(out), "--figure", str(figure))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    rows = {row["way"]: row for row in report["results"]}
    for way in ("scored", "unscored", "stock diffusers", "naive score", "bare denoiser"):
        assert rows[way]["evaluations_per_s"] * rows[way]["seconds"] == pytest.approx(2 * 2 * 4 * 4)
        assert 0 < rows[way]["denoiser_share"] < 1
    assert report["gates"].keys() >= {"scored_over_unscored", "faster_than_stock_diffusers", "faster_than_naive_score"}
    assert figure.stat().st_size > 0
