"""The output of jobs/status.py for folders at different points of a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.config.section import ConfigError
from mi_ray.runs import folder as run_folder
from mi_ray.runs import lease
from mi_ray.runs.cost import evaluations
from mi_ray.runs.status import _pace, run_status, status_text

ROOT = Path(__file__).parents[2]
PACE = ((110 - 101) + (120 - 110) + (1130 - 1101)) / 3  # seconds per shard of the two drivers in the fixture
FACTS = {"rows": 4, "denoiser_evaluations": 100, "score_evaluations": 20, "seconds": 2.0}


@pytest.fixture
def run_dir(tmp_path) -> str:
    """A run with 5 shards of 2 prompts. Two drivers wrote three shards; one prompt failed, one was skipped."""
    uri = str(tmp_path)
    config = RunConfig.model_validate(
        {
            "run_dir": uri,
            "prompts": {"file": "prompts.txt"},
            "generate": {"candidates_per_prompt": 2, "prompts_per_shard": 2},
            "finetune": {"steps": 10},
            "evaluation": {"controls": ["random"]},
        }
    )
    storage.write_json(storage.join(uri, "run.json"), {"config": config.results_config(), "config_hash": config.hash()})
    candidates = storage.join(uri, "round-0", "candidates")
    for session in range(2):
        run_folder.log_event(uri, "run_started", time=100.0 + 1000 * session)
        planned = {"folder": "round-0/candidates", "shards": 5, "missing": 5 - 2 * session}
        run_folder.log_event(uri, "shards_planned", time=101.0 + 1000 * session, **planned)
        run_folder.log_event(uri, "prompts_read", stage="train", used=9, skipped=1, read=10)
        run_folder.log_event(uri, "prompts_read", stage="evaluation", used=3, skipped=1, read=4)
        run_folder.log_event(uri, "prompt_skipped", prompt="too long", stage="prompts", message="99 tokens")
        run_folder.log_event(uri, "prompt_skipped", prompt="", stage="prompts", message="7 more: not UTF-8", count=7)
    for index, moment in enumerate((110.0, 120.0, 1130.0)):
        name = f"part-{index}.parquet"
        storage.create_bytes(storage.join(candidates, run_folder.COMMITS, f"{name}.json"), b"{}")
        facts = {"stage": "generate", "model": "round 0", "folder": "round-0/candidates", "shard": name, **FACTS}
        facts |= {"actor_restarts": int(index == 2), "batch_halvings": index}
        run_folder.log_event(uri, "shard_written", time=moment, errors=int(index == 1), **facts)
    return uri


def by_name(status: dict) -> dict:
    return {(stage["stage"], stage["model"]): stage for stage in status["stages"]}


def test_status_counts_done_left_and_failed(run_dir):
    status = run_status(run_dir)
    stages = by_name(status)
    first = stages["generate", "tuned, round 0"]
    assert (first["done"], first["left"], first["errors"], first["state"]) == (3, 2, 1, "under way")
    assert (stages["finetune", "random, round 0"]["left"], stages["finetune", "tuned, round 0"]["state"]) == (
        10,
        "to do",
    )
    assert stages["evaluate", "tuned"]["left"] == 2
    assert ("generate", "random, round 0") not in stages  # all arms share the candidates of the first round
    assert (status["error_rows"], status["prompts_skipped"], status["sessions"]) == (1, 8, 2)
    assert (status["actor_restarts"], status["batch_halvings"]) == (1, 3)


def test_pace_excludes_the_pause_between_two_drivers(run_dir):
    written = [(moment, True) for moment in (10.0, 20.0, 30.0)]
    assert _pace([(0.0, False), *written, (1990.0, False), (2000.0, True)]) == 10.0
    assert _pace([(0.0, False), *[(600.0, True)] * 8]) == 75.0  # eight actors that finish at the same time
    assert _pace([(0.0, False)]) is None
    assert _pace([(10.0, True)]) is None
    stages = by_name(run_status(run_dir))
    assert stages["generate", "tuned, round 0"]["seconds_left"] == pytest.approx(2 * PACE)


def test_stages_without_a_pace_are_estimated_by_evaluations(run_dir):
    stages = by_name(run_status(run_dir))
    each = PACE / 120  # seconds per denoiser evaluation, of all actors together
    images = 3 * 10 * (2 * 50 + 2 * 12)  # prompts, seeds, evaluations of DDIM and of PMI
    assert stages["evaluate", "base"]["seconds_left"] == pytest.approx(each * images)


def test_complete_stages_are_done(run_dir):
    folder = storage.join(run_dir, "round-0")
    for index in range(3, 5):
        storage.create_bytes(
            storage.join(folder, "candidates", run_folder.COMMITS, f"part-{index}.parquet.json"), b"{}"
        )
    storage.write_json(storage.join(folder, "candidates", run_folder.MANIFEST), {})
    storage.write_bytes(storage.join(folder, "selected.parquet"), b"")
    storage.write_json(storage.join(folder, "adapter", "summary.json"), {})
    stages = by_name(run_status(run_dir))
    for stage in ("generate", "select", "finetune"):
        assert stages[stage, "tuned, round 0"]["state"] == "done"
        assert stages[stage, "tuned, round 0"]["seconds_left"] == 0


def test_status_names_the_driver(run_dir):
    assert run_status(run_dir)["driver"] is None
    with lease.held(run_dir, 40):
        status = run_status(run_dir)
        assert status["driver"]["pid"] == lease.os.getpid()
        assert f"process {lease.os.getpid()}" in status_text(status)
    assert "driver: none" in status_text(run_status(run_dir))


def test_status_shows_the_error_of_the_last_driver(run_dir):
    assert "failed" not in status_text(run_status(run_dir))
    run_folder.log_event(run_dir, "run_failed", error="ConfigError: the disk is full")
    assert "the last driver failed: ConfigError: the disk is full" in status_text(run_status(run_dir))


def test_continued_run_of_pairs_is_not_done_before_its_end(tmp_path):
    """An earlier driver scored one of three shards; its manifest and an old receipt still exist."""
    uri = str(tmp_path)
    storage.write_json(storage.join(uri, "run.json"), {"config": {"input": "a", "model": "b"}, "config_hash": "0"})
    storage.write_json(storage.join(uri, "scores", run_folder.MANIFEST), {})
    for part in ("kept", "stale"):
        storage.create_bytes(storage.join(uri, "scores", run_folder.COMMITS, f"{part}.parquet.json"), b"{}")

    def states() -> list[tuple]:
        return [(s["done"], s["left"], s["state"]) for s in run_status(uri)["stages"]]

    run_folder.log_event(uri, "run_started")
    run_folder.log_event(uri, "run_finished")
    run_folder.log_event(uri, "run_started")
    assert states()[0] == (0, None, "to do")
    run_folder.log_event(uri, "shards_planned", folder="scores", shards=3, missing=2)
    assert states() == [(1, 2, "under way"), (0, 1, "to do")]
    for part in ("one", "two"):
        run_folder.log_event(uri, "shard_written", folder="scores", shard=part, errors=0, **FACTS)
    assert states() == [(3, 0, "done"), (0, 1, "to do")]
    run_folder.log_event(uri, "run_finished")
    assert states() == [(3, 0, "done"), (1, 0, "done")]


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        run_status(str(tmp_path))


def test_folder_of_another_job_is_refused(tmp_path):
    storage.write_json(str(tmp_path / "run.json"), {"config": {"out": "model"}, "config_hash": "0"})
    with pytest.raises(ConfigError, match=r"no run of jobs/pipeline\.py"):
        run_status(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({}, ["tuned, round 0"]),
        ({"finetune": {"baseline": 0.5}}, ["tuned, round 0", "baseline, round 0"]),
        (
            {"finetune": {"baseline": 0.5}, "evaluation": {"controls": ["random"]}},
            ["tuned, round 0", "random, round 0"],
        ),
        (
            {"finetune": {"baseline": 0.5}, "rounds": 2},
            ["tuned, round 0", "tuned, round 1", "baseline of tuned, round 1"],
        ),
    ],
)
def test_training_of_the_baseline_is_in_plan_and_status(tmp_path, fields, trained):
    config = RunConfig.model_validate({"run_dir": str(tmp_path), "prompts": {"file": "prompts.txt"}, **fields})
    storage.write_json(str(tmp_path / "run.json"), {"config": config.results_config(), "config_hash": config.hash()})
    stages = run_status(str(tmp_path))["stages"]
    assert [s["model"] for s in stages if s["stage"] == "finetune"] == trained
    each = 3 * config.finetune.steps * config.finetune.batch_size * config.finetune.gradient_accumulation
    assert evaluations(config, 10, 2)["finetune"] == each * len(trained)


@pytest.mark.slow
def test_status_command_prints_a_table_or_json(run_dir):
    def status(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "jobs/status.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    text = status(run_dir)
    assert text.returncode == 0, text.stderr
    assert "2 shards" in text.stdout
    assert json.loads(status(run_dir, "--json").stdout)["error_rows"] == 1
    missing = status(str(Path(run_dir) / "nowhere"))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: run_dir")
