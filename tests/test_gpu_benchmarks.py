"""What a GPU must show: the driver of all parts, and one architecture at tiny size on this CPU."""

import json
import sys
from pathlib import Path

import pytest
from tiny_families import CASES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """The module of a benchmark, by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def of(name: str):
        return __import__(name)

    return of


def command(code: str):
    return lambda out: [sys.executable, "-S", "-c", code, str(out)]


REPORT = "{'results': [{'way': 'a', 'seconds': 2}], 'gates': {'fast': {'value': 1.5, 'min': 2.0, 'holds': False}}}"
FAKE = {
    "good": command(f"import json, sys; print('done'); json.dump({REPORT}, open(sys.argv[1], 'w'))"),
    "broken": command("raise SystemExit('no kernel')"),
    "slow": command("import time; print('begun', flush=True); time.sleep(60)"),
}


def test_one_file_has_every_part_whether_it_fails_or_takes_too_long(benchmark, monkeypatch, tmp_path):
    gpu, out = benchmark("gpu"), tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "PARTS", FAKE)
    gpu.GpuBenchmark(parts=(*FAKE,), minutes=1 / 60, without_gpu=True, out=out).cli_cmd()
    content = json.loads(out.read_text())
    parts = content["parts"]
    assert {name: part["ended"] for name, part in parts.items()} == {
        "good": "ok",
        "broken": "failed",
        "slow": "too long",
    }
    assert parts["good"]["results"] == [{"way": "a", "seconds": 2}]
    assert "no kernel" in parts["broken"]["output"]
    assert "begun" in parts["slow"]["output"]
    assert 0.9 < parts["slow"]["seconds"] < 20
    holds = {name: gate["holds"] for name, gate in content["gates"].items()}
    assert holds == {"good_ran": True, "good_fast": False, "broken_ran": False, "slow_ran": False}


def test_every_part_is_a_command_of_this_repository(benchmark, tmp_path):
    gpu = benchmark("gpu")
    assert [*gpu.PARTS] == [
        "tests",
        "kernel",
        "throughput-sd15",
        "throughput-sdxl",
        "throughput-sd35-medium",
        "pipeline",
    ]
    for part in gpu.PARTS.values():
        words = part(tmp_path / "x.json")
        assert all(Path(word).is_file() for word in words if word.endswith(".py"))
    with pytest.raises(ValueError, match="parts: speed is none of tests"):
        gpu.GpuBenchmark(parts=("speed",), without_gpu=True).answer()


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_an_architecture_is_compared_at_equal_work(benchmark, tmp_path, name):
    CASES[name].build().save_pretrained(tmp_path / "model")
    throughput = benchmark("throughput")
    findings = throughput.ThroughputBenchmark(
        architecture=str(tmp_path / "model"), smoke=True, dtype="float32"
    ).answer()
    generation = [row for row in findings.rows if row["part"] == "generation"]
    assert [row["way"] for row in generation] == [
        f"{way}, {mode}"
        for mode in ("eager", "compiled")
        for way in ("ours, scored", "ours, unscored", "stock diffusers")
    ]
    assert {row["evaluations"] for row in generation} == {2 * 2 * 2 * 3}  # branches, prompts, candidates, steps
    assert findings.gates["evaluations_over_needed"].holds
    assert findings.gates.keys() == {
        "evaluations_over_needed",
        "scored_over_unscored",
        "compiled_over_stock_eager",
        "compiled_over_stock_compiled",
        "finetuning_over_plain_loop",
    }
    assert {row["way"] for row in findings.rows if row["part"] == "fine-tuning"} == {"fine-tuning", "plain loop"}
