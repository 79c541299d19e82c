"""A complete run on an object store: killed, locked for a second driver, continued, and read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

from mi_ray import storage
from mi_ray.runs import folder as run_folder
from mi_ray.runs.status import run_status

ROOT = Path(__file__).parents[2]
SMALL = ["--smoke", "--prompts.limit", "6", "--generate.prompts-per-shard", "1", "--generate.preview-prompts", "0"]
SMALL += ["--evaluation.limit", "2"]
WAIT_S = 400


@pytest.fixture(params=["s3", "gs"])
def run_dir(request, monkeypatch):
    """The URI of a run on a local server; the processes of the job get its address from the environment."""
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{request.getfixturevalue('s3_server')}")
        boto3.client("s3").create_bucket(Bucket="runs")
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{request.getfixturevalue('gcs_server')}")
    return f"{request.param}://runs/smoke"


def start(run_dir: str, log) -> subprocess.Popen:
    command = [sys.executable, "jobs/pipeline.py", *SMALL, "--run-dir", run_dir]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def receipts(run_dir: str) -> dict[str, bytes]:
    folder = storage.join(run_dir, "round-0", "candidates", run_folder.COMMITS)
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_names(folder)}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_run_on_an_object_store_continues_after_a_kill(run_dir, tmp_path):
    with (tmp_path / "killed.log").open("wb") as log:
        first = start(run_dir, log)
        deadline = time.monotonic() + WAIT_S
        while not receipts(run_dir) and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)  # it is alive, and so is its lease
        with (tmp_path / "second.log").open("wb") as second_log:
            refused = start(run_dir, second_log).wait(WAIT_S)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert refused == 2
    assert f"is held by process {first.pid}" in (tmp_path / "second.log").read_text()
    before = receipts(run_dir)
    assert 0 < len(before) < 6
    assert run_status(run_dir)["stages"][0]["state"] == "under way"

    with (tmp_path / "again.log").open("wb") as log:
        assert start(run_dir, log).wait(WAIT_S) == 0, (tmp_path / "again.log").read_text()[-3000:]
    after = receipts(run_dir)
    assert len(after) == 6
    assert before.items() <= after.items()
    rows = storage.read_tables(storage.join(run_dir, "round-0", "candidates")).to_pandas()
    assert len(rows) == 6 * 4
    assert not rows.duplicated(["prompt_id", "candidate_index"]).any()
    status = run_status(run_dir)
    assert {stage["state"] for stage in status["stages"]} == {"done"}
    assert status["driver"] is None
    events = storage.read_lines(storage.join(run_dir, "events.jsonl"))
    written = [e["shard"] for e in events if e["event"] == "shard_written" and e["stage"] == "generate"]
    assert sorted(written) == sorted(name.removesuffix(".json") for name in after)
    assert b"<html" in storage.read_bytes(storage.join(run_dir, "report", "index.html"))
