"""A stage with several shards. Its actor is called in this process instead of by Ray Data."""

import itertools
import os
import platform
import subprocess
import sys
import threading
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from mi_ray import storage
from mi_ray.config import ResourcesConfig, RunConfig
from mi_ray.inputs.prompts import PROMPTS, prompt_id
from mi_ray.inputs.shard_plan import ShardPlan, write_prompts
from mi_ray.runs import folder as run_folder
from mi_ray.scoring import machine
from mi_ray.stages import shards
from mi_ray.stages.shards import ShardWriter, is_restarted, rows_of, run_stage
from mi_ray.storage import tables

TEXTS = [f"prompt {number}" for number in range(11)]


class Writer:
    """An actor that writes one row per prompt."""

    made: ClassVar[list[int]] = []

    def __init__(self, config: dict, folder: str, token: int | None = None):
        schema = tables.candidates_schema(("mitune",))
        self.empty = dict.fromkeys(schema.names)
        self.write = ShardWriter(
            "generate", "round 0", folder, schema, RunConfig.model_validate(config), token, lambda: 0
        )

    def __call__(self, batch):
        return self.write(batch, self.rows)

    def rows(self, shard, positions, work):
        Writer.made.append(shard.index)
        work.batch_halvings = shard.index
        known = [{"prompt_id": shard.prompt_ids[p], "prompt": shard.prompts[p]} for p in positions]
        return [self.empty | row | {"candidate_index": 0} for row in known]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Run the stage with 3 shards of 4, 4 and 3 prompts. Returns its manifest."""

    def inline(actor, constructor, rows, resources, in_flight, at_once):
        writer = actor(**constructor)
        for row in rows:
            batch = {name: np.array([value], int if type(value) is int else object) for name, value in row.items()}
            done = writer(batch)
            yield from rows_of({name: np.array(values, object) for name, values in done.items()})

    monkeypatch.setattr(shards, "stream", inline)
    monkeypatch.setattr(Writer, "made", [])
    rows = [{"prompt_id": prompt_id(text), "prompt": text} for text in TEXTS]
    source, folder = str(tmp_path / "prompts.parquet"), str(tmp_path / "candidates")
    write_prompts(source, [pa.RecordBatch.from_pylist(rows, PROMPTS)])
    given = {"run_dir": str(tmp_path), "prompts": {"file": "unused"}, "score": {"names": ["mitune"]}}
    config = RunConfig.model_validate(given)
    constructor = {"config": config.model_dump(mode="json"), "folder": folder}
    plan = ShardPlan(source, 4, "key")
    return lambda: run_stage("generate", "round 0", Writer, constructor, plan, folder, config)


def events(tmp_path) -> list[int]:
    lines = storage.read_lines(str(tmp_path / "events.jsonl"))
    return sorted(event["index"] for event in lines if event["event"] == "shard_written")


def test_every_prompt_of_the_plan_is_written_once(stage, tmp_path):
    assert stage() == {"shards": 3, "prompts": 11}
    assert storage.read_tables(str(tmp_path / "candidates"))["prompt"].to_pylist() == TEXTS
    assert events(tmp_path) == [0, 1, 2]
    stage()
    assert Writer.made == [0, 1, 2]


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: unspecified"), torch.OutOfMemoryError("CUDA")])
def test_machine_failure_makes_no_error_rows(stage, tmp_path, monkeypatch, error):
    def fails(self, shard, positions, work):
        raise error

    monkeypatch.setattr(Writer, "rows", fails)
    with pytest.raises(type(error)):
        stage()
    assert not (tmp_path / "candidates").exists()
    monkeypatch.setattr(Writer, "rows", lambda *_: 1 / 0)
    stage()
    assert storage.read_tables(str(tmp_path / "candidates"))["error"].null_count == 0


def test_folder_that_nodes_do_not_share_is_reported(stage, tmp_path, monkeypatch):
    row = ShardPlan.row
    monkeypatch.setattr(ShardPlan, "row", lambda *a: row(*a) | {"source": str(tmp_path / "elsewhere.parquet")})
    with pytest.raises(FileNotFoundError, match=r"is missing on node .*; set a run_dir that all nodes can read"):
        stage()


def test_events_contain_lost_processes_and_halved_batches(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "is_restarted", lambda: True)
    stage()
    written = [event for event in storage.read_lines(str(tmp_path / "events.jsonl")) if "shard" in event]
    reported = [(event["actor_restarts"], event["batch_halvings"], event["host"]) for event in written]
    assert reported == [(int(index == 0), index, platform.node()) for index in range(3)]


@pytest.mark.ray
def test_restarted_actor_knows_that_it_was_restarted():
    @ray.remote(num_cpus=0, max_restarts=1, max_task_retries=1)
    class Lost:
        def __init__(self):
            self.restarted = is_restarted()

        def ask(self, die: bool) -> bool:
            if die and not self.restarted:
                os._exit(1)
            return self.restarted

    assert not is_restarted()
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error")
    try:
        assert not is_restarted()
        actor = Lost.remote()
        assert [ray.get(actor.ask.remote(die)) for die in (False, True)] == [False, True]  # one process after another
    finally:
        ray.shutdown()


def test_missing_shards_and_events_are_written_again(stage, tmp_path):
    stage()
    folder = tmp_path / "candidates"
    (folder / run_folder.MANIFEST).unlink()
    lost = sorted(folder.glob("part-*"))[1]
    (folder / run_folder.COMMITS / f"{lost.name}.json").unlink()
    lost.unlink()
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_text("".join(line for line in lines if '"index": 2' not in line))
    stage()
    assert Writer.made == [0, 1, 2, 1]
    assert storage.read_tables(str(folder))["prompt"].to_pylist() == TEXTS
    assert events(tmp_path) == [0, 1, 1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("seconds", "calls", "ends"),
    [
        (0.2, itertools.count().__next__, "0 s on one shard"),
        (None, lambda: 0, "1 s without a model call"),
        (None, itertools.count().__next__, None),
    ],
)
def test_hanging_process_prints_a_message(seconds, calls, ends, monkeypatch, capsys):
    ended = threading.Event()

    def end(code: int):
        ended.set()
        raise SystemExit(code)  # raised in the watching thread

    monkeypatch.setattr(machine, "STALLED_S", 1.0)
    monkeypatch.setattr(shards.os, "_exit", end)
    with machine.Patience(seconds, calls)():
        assert ended.wait(20 if ends else 2.5) == bool(ends)
    assert (ends or "") in capsys.readouterr().err


def test_hanging_process_ends():
    code = "import time; from mi_ray.scoring.machine import Patience\nwith Patience(0.2, lambda: 0)(): time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == 1


@pytest.mark.ray
def test_failed_actor_start_does_not_stop_the_run(tmp_path):
    class Unlucky:
        def __init__(self, folder: str):
            if storage.create_bytes(f"{folder}/begun", b""):
                os._exit(1)

        def __call__(self, batch):
            return batch

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error")
    try:
        rows = [{"index": index} for index in range(3)]
        written = list(shards.stream(Unlucky, {"folder": str(tmp_path)}, rows, ResourcesConfig()))
        assert sorted(row["index"] for row in written) == [0, 1, 2]
    finally:
        ray.shutdown()


def test_machine_that_fails_after_a_shard_is_replaced(monkeypatch):
    """Ray starts another process each time. A process that has committed no shard stops the run."""
    ended = []
    monkeypatch.setattr(shards, "_in_actor", lambda: True)
    monkeypatch.setattr(shards, "is_restarted", lambda: True)
    monkeypatch.setattr(shards.os, "_exit", ended.append)
    for proven in (True, False):
        with pytest.raises(torch.AcceleratorError):
            shards.stop_if_machine_failed(torch.AcceleratorError("CUDA error"), alone=False, proven=proven)
    assert ended == [1]
