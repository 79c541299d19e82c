"""Complete online runs: what they write, and that faults do not change the results."""

import json
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from online_run import INNER, UPDATES, FakeBoard, batch_of, generator_of, run_config, stored_prompts
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.inputs.online_plan import plan_of
from mi_ray.inputs.shard_plan import read_shard
from mi_ray.runs import folder as run_folder
from mi_ray.scoring.work import Work
from mi_ray.stages import online as stage
from mi_ray.training import loop
from mi_ray.training.validation import best_version


def in_process(config: RunConfig, source: str, folder: Path, board: FakeBoard | None = None) -> dict:
    """An online run without Ray, with the actor in a thread. Returns the summary of the training."""
    plan, board = plan_of(config, source), board or FakeBoard(config.online.lag + 1)
    generator = generator_of(config, source, folder, board)
    actor = threading.Thread(target=lambda: [generator(batch_of(plan.row(i))) for i in range(len(plan))], daemon=True)
    actor.start()
    given = {"prompts": source, "folder": str(folder), "board": board}
    settings = loop.loop_settings(config, None, str(folder), None, "here", given)
    trainer = TorchTrainer(loop.train_loop, train_loop_config=settings, scaling_config=ScalingConfig(num_workers=0))
    summary = trainer.fit().return_value
    if summary["stopped"]:
        board.end()
    actor.join(60)
    return summary


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def table_of(folder: Path):
    rows = storage.read_tables(str(folder / "candidates")).to_pandas()
    return rows.sort_values(["update", "prompt_id", "candidate_index", "seed"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def undisturbed(tiny_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = run_config(tiny_pipeline, folder)
    summary = in_process(config, stored_prompts(folder), folder)
    assert summary["steps"] == UPDATES * INNER
    assert summary["stopped"] is None
    assert summary["outputs_changed"]
    return folder


def test_updates_are_logged_and_checkpoints_are_saved_and_validated(undisturbed):
    lines = [line for line in log_of(undisturbed) if line.get("reward") is not None]
    assert [line["update"] for line in lines] == list(range(UPDATES))
    assert all(line["trained_prompts"] == 1 for line in lines)
    assert sorted(os.listdir(undisturbed / "policies")) == ["version-00000", "version-00002", "version-00004"]
    rows = table_of(undisturbed)
    each = Counter(rows["update"][rows["advantage"].notna()])
    assert each == dict.fromkeys(range(UPDATES), 4 * 3)
    assert Counter(rows["update"][rows["advantage"].isna()]) == dict.fromkeys((0, 2, 4), 2 * 2)
    held = rows[rows["advantage"].isna()]
    assert held["seed"].nunique() == 2 * 2, "every version has the same seeds"


def test_update_without_trained_prompts_is_skipped(tiny_pipeline, tmp_path, capsys):
    """All rewards are equal. No prompts are held out, so the last version is kept."""
    online = {"validation_prompts": 0, "updates": 2, "reward_clip": 2.0}
    config, source = run_config(tiny_pipeline, tmp_path, online=online), stored_prompts(tmp_path)
    plan = plan_of(config, source)
    generator = generator_of(config, source, tmp_path, FakeBoard())
    for index in plan.of_update(0):
        shard = read_shard(plan.row(index), storage.ParquetRows(source))
        rows = generator.policy.rows(shard, [0, 1], 0, False, Work())
        table = pa.Table.from_pylist([r | {"advantage": None, "latents": None} for r in rows], generator.write.schema)
        run_folder.commit(str(tmp_path / "candidates"), plan.name(index), table, {})
    summary = in_process(config, source, tmp_path)
    assert summary["steps"] == 2 * INNER
    lines = log_of(tmp_path)
    assert [line["loss"] is None for line in lines] == [True, True, False, False]
    assert lines[1]["trained_prompts"] == 0
    assert lines[3]["trained_prompts"] == 1
    assert best_version(config, plan, str(tmp_path / "candidates"), [0, 2]) == {"version": 2, "validation": {}}
    assert "nothing was trained" not in capsys.readouterr().out
    one = config.model_copy(update={"online": config.online.model_copy(update={"updates": 1, "validate_every": 1})})
    folder = tmp_path / "one"
    for index in plan.of_update(0):
        drawn = storage.read_table(str(tmp_path / "candidates" / plan.name(index)))
        run_folder.commit(str(folder / "candidates"), plan_of(one, source).name(index), drawn, {})
    assert in_process(one, source, folder)["outputs_changed"] is False
    assert "warning: nothing was trained: no prompt has candidates with different" in capsys.readouterr().out


def test_average_of_the_policies_is_saved_and_validated(tiny_pipeline, tmp_path):
    """With finetune.ema_decay the actors still draw the updates with the policies themselves."""

    class Recorder(FakeBoard):
        published: ClassVar[dict[int, dict]] = {}

        def publish(self, version: int, policy: dict[str, torch.Tensor]):
            self.published[version] = {name: values.clone() for name, values in policy.items()}
            super().publish(version, policy)

    decay = 0.15
    config, source = run_config(tiny_pipeline, tmp_path, finetune={"ema_decay": decay}), stored_prompts(tmp_path)
    board = Recorder(config.online.lag + 1)
    in_process(config, source, tmp_path, board)
    plan, generator = plan_of(config, source), generator_of(config, source, tmp_path, board)
    average = board.published[1]  # the first step of diffusers' EMAModel copies
    for version in range(2, UPDATES + 1):
        keep = min(decay, version / (9 + version))
        average = {n: keep * average[n] + (1 - keep) * values for n, values in board.published[version].items()}
        if version % 2:
            continue
        saved = load_file(tmp_path / "policies" / f"version-{version:05d}" / "adapter_model.safetensors")
        assert all(torch.allclose(saved[name], values, atol=1e-7) for name, values in average.items())
        assert not all(torch.allclose(saved[name], v, atol=1e-7) for name, v in board.published[version].items())
        generator.policy.load(saved)
        (index,) = plan.of_validation(version)
        shard = read_shard(plan.row(index), storage.ParquetRows(source))
        rows = generator.policy.rows(shard, [0, 1], version, True, Work())
        written = storage.read_table(str(tmp_path / "candidates" / plan.name(index))).to_pydict()
        assert written["seed"] == [row["seed"] for row in rows]
        np.testing.assert_allclose(written["delta_sq"], [row["delta_sq"] for row in rows], rtol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_failed_generation_stops_the_training(tiny_pipeline, tmp_path, monkeypatch, fails):
    """Both if the workers end, and if they fail because one of them has ended."""
    board = FakeBoard()

    def write_missing(*_, **__):
        raise OSError("the table of prompts has gone")

    def train(config: RunConfig, settings: dict) -> dict:
        assert settings["online"]["board"].wait([0], None) is None
        if fails:
            raise RuntimeError("another worker has gone")
        return {"stopped": "the candidates have ended"}

    for name, fake in (("Board", lambda keep: board), ("write_missing", write_missing), ("train", train)):
        monkeypatch.setattr(stage, name, fake)
    with pytest.raises(OSError, match="the table of prompts has gone"):
        stage.online(run_config(tiny_pipeline, tmp_path), stored_prompts(tmp_path), str(tmp_path), "test")


@pytest.mark.parametrize("error", [RuntimeError("the loss is nan"), KeyboardInterrupt()])
def test_failed_training_stops_the_generation(tiny_pipeline, tmp_path, monkeypatch, error):
    board, ended = FakeBoard(), []

    def write_missing(*_, **__):
        ended.append(board.policy(0, 60.0))

    def train(config: RunConfig, settings: dict) -> dict:
        raise error

    for name, fake in (("Board", lambda keep: board), ("write_missing", write_missing), ("train", train)):
        monkeypatch.setattr(stage, name, fake)
    with pytest.raises(type(error)):
        stage.online(run_config(tiny_pipeline, tmp_path), stored_prompts(tmp_path), str(tmp_path), "test")
    assert board.meeting.ended
    assert ended == [("ended", None)]


class Mortal(stage.OnlineGenerator):
    """Dies once after a commit, before it is reported, and once before it makes a part."""

    def _write(self, row: dict) -> dict:
        died = Path(self.folder)
        if row["name"].startswith("update-00002-001") and _once(died / "died-before"):
            os.kill(os.getpid(), signal.SIGKILL)
        if row["name"].startswith("update-00001-000") and _once(died / "died-after"):
            self.board.finished = lambda indices: os.kill(os.getpid(), signal.SIGKILL)
        return super()._write(row)


def _once(file: Path) -> bool:
    return storage.create_bytes(str(file), b"")


def mortal_loop(settings: dict) -> dict | None:
    """Fails in step 3 with the first driver, and in step 7, after the checkpoint, with the second driver."""
    from mi_ray.training import loop as module

    optimizer_step, begun = module.optimizer_step, Path(settings["destination"], "begun")
    folder = Path(settings["destination"])

    def step(*arguments, **options):
        with begun.open("a") as file:
            file.write(".")
        ray.train.get_all_reported_checkpoints()  # waits until Ray has recorded the last one
        if begun.stat().st_size == 3 and _once(folder / "driver-died"):
            raise RuntimeError("as if the driver had gone")
        if begun.stat().st_size == 3 + 7 and _once(folder / "trainer-died"):
            os.kill(os.getpid(), signal.SIGKILL)
        return optimizer_step(*arguments, **options)

    module.optimizer_step = step
    return module.train_loop(settings)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, pytest.param(True, marks=pytest.mark.long)])
def test_run_with_killed_driver_actors_and_trainer_has_the_same_result(
    tiny_pipeline, undisturbed, tmp_path, monkeypatch, lost
):
    """With `lost`, the driver dies once more before it writes the adapter."""
    config, source = run_config(tiny_pipeline, tmp_path), stored_prompts(tmp_path)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this module
    run = (config, source, str(tmp_path), "test")
    ray.init(address="local", num_cpus=4, logging_level="error")
    try:
        monkeypatch.setattr(loop, "train_loop", mortal_loop)
        monkeypatch.setattr(stage, "OnlineGenerator", Mortal)
        monkeypatch.setattr(stage, "remove_checkpoints", lambda folder: None)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "FailureConfig", lambda max_failures: FailureConfig(max_failures=0))
            with pytest.raises(ray.train.TrainingFailedError, match="as if the driver had gone"):
                stage.online(*run)
        adapter = stage.online(*run)
        assert all((tmp_path / f"{who}-died").exists() for who in ("driver", "trainer"))
        assert all((tmp_path / f"died-{when}").exists() for when in ("before", "after"))
        same_as(undisturbed, tmp_path)
        if not lost:
            return
        summary = storage.read_json(storage.join(adapter, "summary.json"))
        weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        shutil.rmtree(adapter)  # as if the driver had died before writing it
        begun = (tmp_path / "begun").stat().st_size
        assert stage.online(*run) == adapter
        assert (tmp_path / "begun").stat().st_size == begun + 2 * INNER, "from the last checkpoint"
        same_as(undisturbed, tmp_path)
        assert storage.read_json(storage.join(adapter, "summary.json"))["version"] == summary["version"]
        for name, values in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
            torch.testing.assert_close(values, weights[name])
    finally:
        ray.shutdown()


def same_as(undisturbed: Path, folder: Path):
    """Check that parts, rows, seeds, scores, losses, rewards and saved policies are equal, with an event per part."""
    mine, theirs = table_of(folder), table_of(undisturbed)
    for name in ("update", "prompt_id", "candidate_index", "seed"):
        assert mine[name].tolist() == theirs[name].tolist()
    np.testing.assert_allclose(mine["score_mitune"], theirs["score_mitune"], rtol=1e-3)
    np.testing.assert_allclose(mine["advantage"], theirs["advantage"], atol=1e-2)
    parts, expected = ([n for n in os.listdir(f / "candidates") if n[0] != "_"] for f in (folder, undisturbed))
    assert sorted(parts) == sorted(expected)
    events = [e for e in storage.read_lines(str(folder / "events.jsonl")) if e["event"] == "shard_written"]
    assert sorted(event["shard"] for event in events) == sorted(parts)
    mine, theirs = log_of(folder), log_of(undisturbed)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for name in ("loss", "reward", "diversity"):
        one, two = ([line[name] for line in lines if line.get(name) is not None] for lines in (mine, theirs))
        assert one == pytest.approx(two, rel=1e-3)
    for version in os.listdir(undisturbed / "policies"):
        one, two = (load_file(f / "policies" / version / "adapter_model.safetensors") for f in (folder, undisturbed))
        assert one.keys() == two.keys()
        for name, values in one.items():
            torch.testing.assert_close(values, two[name], atol=1e-4, rtol=1e-2)
