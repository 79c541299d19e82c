"""An online run: what its candidates and updates depend on, and that a death in the middle changes nothing of them."""

import asyncio
import json
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from diffusers import UNet2DConditionModel
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.diffusion.adapters import MergedAdapter, adapter_state, attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.online_plan import OnlinePlan, plan_of
from mi_ray.inputs.prompts import PROMPTS, prompt_id
from mi_ray.inputs.shard_plan import Shard, read_shard, write_prompts
from mi_ray.runs import folder as run_folder
from mi_ray.scoring.policy import PolicySampler
from mi_ray.scoring.work import Work
from mi_ray.stages import online as stage
from mi_ray.training import loop
from mi_ray.training.board import Meeting
from mi_ray.training.losses import Objective
from mi_ray.training.online import OnlineSource, RunAway, best_version

COLORS, SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "star")
UPDATES, INNER = 4, 2


class FakeBoard:
    """The board without Ray: its meeting in a thread."""

    def __init__(self, keep: int = 2):
        self.meeting, self.loop = Meeting(keep), asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def __getattr__(self, name: str):
        return lambda *arguments: asyncio.run_coroutine_threadsafe(
            getattr(self.meeting, name)(*arguments), self.loop
        ).result(300)

    def publish(self, version: int, policy: dict[str, torch.Tensor]):
        copied = {name: values.clone() for name, values in policy.items()}
        asyncio.run_coroutine_threadsafe(self.meeting.publish(version, copied), self.loop).result(300)


def run_config(model: Path, run_dir: Path, **settings: dict) -> RunConfig:
    online = {"updates": UPDATES, "prompts_per_update": 4, "inner_steps": INNER, "validate_every": 2}
    online |= {"validation_prompts": 2, "validation_candidates": 2, "noise_levels": 2}
    finetune = {"method": "nft", "rank": 2, "alpha": 2, "learning_rate": 1e-3, "batch_size": 6, "prompt_dropout": 0.2}
    finetune |= {"log_to": []}
    given = {
        "run_dir": str(run_dir),
        "prompts": {"file": "unused"},
        "model": {"path": str(model)},
        "sampler": {"solver": "ddpm", "num_inference_steps": 3, "guidance_scale": 2.0},
        "generate": {"candidates_per_prompt": 3, "prompts_per_shard": 2},
        "score": {"names": ["mitune"]},
        "select": {"by": "mitune"},
        "finetune": finetune | settings.pop("finetune", {}),
        "online": online | settings.pop("online", {}),
        "resources": {"num_actors": (2, 2), "train_cpus": 1, "batch_size": 4} | settings.pop("resources", {}),
    }
    assert not settings
    return RunConfig.model_validate(given)


def stored_prompts(folder: Path) -> str:
    prompts = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    nothing = [None] * len(prompts)
    uri = str(folder / "prompts.parquet")
    write_prompts(uri, [pa.record_batch([[prompt_id(p) for p in prompts], prompts, nothing, nothing], PROMPTS)])
    return uri


def some_policy(config: RunConfig, seed: int) -> dict[str, torch.Tensor]:
    """An adapter whose every weight is away from its start."""
    tuning, unet = config.finetune, load_denoiser(config.model.path).network
    targets, dora = tuning.target_modules, tuning.adapter == "dora"
    model = attach_adapter(unet, rank=tuning.rank, alpha=tuning.alpha, target_modules=targets, use_dora=dora)
    return moved(adapter_state(model), seed)


def moved(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: values + 0.1 * torch.randn(values.shape, generator=generator) for name, values in state.items()}


# ---------------------------------------------------------------------------------------------- who draws
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_merged_adapter_is_the_adapter_and_exchanging_it_back_gives_the_same_bits(tiny_pipeline, adapter):
    def adapted():
        unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
        targets = ("to_q", "to_k", "to_v", "to_out.0")
        return attach_adapter(unet, rank=4, alpha=8, target_modules=targets, use_dora=adapter == "dora")

    @torch.no_grad()
    def output(model):
        generator = torch.Generator().manual_seed(1)
        x_t, embeddings = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 6, 16, generator=generator)
        return model(x_t, torch.tensor([10, 310, 610]), encoder_hidden_states=embeddings).sample

    model = adapted()
    merged, fresh = MergedAdapter(model), adapter_state(model)
    base, outputs = output(model), []
    for seed in (1, 2, 1):
        unmerged = adapted()
        state = moved(fresh, seed)
        loop.load_adapter_state(unmerged, state)
        merged.load(state)
        outputs.append(output(model))
        torch.testing.assert_close(outputs[-1], output(unmerged), atol=1e-5, rtol=1e-4)
    assert torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[1]).norm() > 1e-2 * base.norm()
    merged.load(fresh)
    torch.testing.assert_close(output(model), base, atol=1e-5, rtol=1e-4)


def test_candidates_depend_on_policy_prompt_and_seed_alone(tiny_pipeline, tmp_path):
    """Neither on the batch size, nor on the shard's other prompts, nor on the policies before."""
    config = run_config(tiny_pipeline, tmp_path)
    prompts = [f"a {color} star" for color in COLORS[:3]]
    ids = [prompt_id(prompt) for prompt in prompts]
    first, second = some_policy(config, 1), some_policy(config, 2)

    def drawn(batch_size: int, policies: list[dict], shards: list[list[int]], update: int = 3) -> list[dict]:
        resources = config.resources.model_copy(update={"batch_size": batch_size})
        sampler, rows = PolicySampler(config.model_copy(update={"resources": resources})), []
        for policy in policies:
            sampler.load(policy)
        for members in shards:
            texts, keys = [prompts[i] for i in members], [ids[i] for i in members]
            shard = Shard(0, "part", texts, keys, *[[None] * len(members)] * 2)
            rows += sampler.rows(shard, list(range(len(members))), update, False, Work())
        return sorted(rows, key=lambda row: (row["prompt"], row["candidate_index"]))

    expected = drawn(4, [first], [[0, 1, 2]])
    assert len({row["seed"] for row in expected}) == 9
    for other in (drawn(64, [first], [[2, 0, 1]]), drawn(2, [second, first], [[1], [2, 0]])):
        assert [row["seed"] for row in other] == [row["seed"] for row in expected]
        for name, tolerance in (("score_mitune", 1e-4), ("advantage", 1e-2)):
            assert [row[name] for row in other] == pytest.approx(
                [row[name] for row in expected], rel=tolerance, abs=1e-3
            )
        mine, theirs = (np.stack([row["latents"] for row in rows]).astype(float) for rows in (other, expected))
        np.testing.assert_allclose(mine, theirs, atol=5e-3)
    for other in (drawn(4, [second], [[0, 1, 2]]), drawn(4, [first], [[0, 1, 2]], update=4)):
        mine, theirs = (np.stack([row["latents"] for row in rows]).astype(float) for rows in (other, expected))
        assert np.abs(mine - theirs).mean() > 1e-2


def batch_of(row: dict) -> dict[str, np.ndarray]:
    return {name: np.array([value]) for name, value in row.items()}


def generator_of(config: RunConfig, source: str, folder: Path, board: FakeBoard) -> stage.OnlineGenerator:
    return stage.OnlineGenerator(config.model_dump(mode="json"), source, str(folder), board)


def test_an_actor_that_waits_makes_what_another_lost_and_tells_what_another_did_not(
    tiny_pipeline, tmp_path, monkeypatch
):
    """The actor that had the first update is gone: one part is committed but not told, the other was never made."""
    monkeypatch.setattr(stage, "LOOK_S", 0.1)
    config, source, board = run_config(tiny_pipeline, tmp_path), stored_prompts(tmp_path), FakeBoard()
    plan, generator = plan_of(config, source), generator_of(config, source, tmp_path, board)
    told, lost = plan.of_update(0)
    board.publish(0, some_policy(config, 0))
    generator(batch_of(plan.row(told)))
    board.meeting.done.clear()
    waiting = threading.Thread(target=generator, args=[batch_of(plan.row(plan.of_update(2)[0]))])
    waiting.start()
    assert board.wait([told, lost], None) == [told, lost]
    assert board.wait(plan.of_validation(0), None) == plan.of_validation(0)
    board.publish(1, some_policy(config, 1))
    waiting.join(60)
    assert board.wait(plan.of_update(2)[:1], None) == plan.of_update(2)[:1]


def test_a_late_part_costs_nothing_and_a_late_validation_takes_the_saved_policy(tiny_pipeline, tmp_path):
    config = run_config(tiny_pipeline, tmp_path, online={"deadline_s": 0.01})
    source, board = stored_prompts(tmp_path), FakeBoard()
    plan, generator = plan_of(config, source), generator_of(config, source, tmp_path, board)
    first, late = plan.of_update(0)
    board.publish(0, some_policy(config, 0))
    generator(batch_of(plan.row(first)))
    assert board.wait([first, late], 0.01) == [first]
    for version in (1, 2, 3):
        board.publish(version, policy := some_policy(config, version))
    calls, generator.version = generator.policy.calls, 3
    assert generator(batch_of(plan.row(late)))["shard"] == [""]
    assert generator.policy.calls == calls
    board.finished([late])
    assert board.wait([first, late], 0.01) == [first], "decided once"
    saved = storage.join(stage.policy_folder(str(tmp_path), 0), "adapter_model.safetensors")
    storage.write_bytes(saved, loop_bytes(policy))
    (validation,) = plan.of_validation(0)
    assert generator(batch_of(plan.row(validation)))["shard"] == [plan.name(validation)]


def loop_bytes(state: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(state)


# ---------------------------------------------------------------------------------------------- the board
def test_an_update_closes_with_all_its_parts_or_after_the_deadline_for_every_worker_alike():
    board = FakeBoard()
    board.finished([3])
    answers = []
    workers = [threading.Thread(target=lambda: answers.append(board.wait([3, 4], None))) for _ in range(2)]
    for worker in workers:
        worker.start()
    board.finished([4])
    for worker in workers:
        worker.join(10)
    assert answers == [[3, 4]] * 2
    board.finished([5])
    assert board.wait([5, 6], 0.2) == [5]
    board.finished([6])
    board.end()
    assert board.wait([5, 6], None) == [5]
    board.finished([7])
    assert board.wait([7], None) is None, "the run had ended before anybody asked"


def test_the_board_keeps_the_last_versions_and_none_older_comes_back():
    board = FakeBoard(keep=2)
    assert board.policy(0, 0.0) == ("wait", None)
    for version in (0, 1, 2, 3):
        board.publish(version, {"w": torch.full((1,), float(version))})
    board.publish(1, {"w": torch.ones(1)})  # by a training that has started again
    assert [board.policy(version, 0.0)[0] for version in range(5)] == ["past", "past", "here", "here", "wait"]
    board.end()
    assert [board.policy(version, 0.0)[0] for version in range(5)] == ["past", "past", "here", "here", "ended"]


# ---------------------------------------------------------------------------------------------- who trains
@pytest.fixture(scope="module")
def drawn(tiny_pipeline, tmp_path_factory) -> tuple[RunConfig, str, Path]:
    """The parts of the first two updates and the first validation: (config, prompts, folder)."""
    folder = tmp_path_factory.mktemp("drawn")
    config, source, board = run_config(tiny_pipeline, folder), stored_prompts(folder), FakeBoard()
    plan, generator = plan_of(config, source), generator_of(config, source, folder, board)
    board.publish(0, some_policy(config, 0))
    for index in (*plan.of_validation(0), *plan.of_update(0), *plan.of_update(1)):
        generator(batch_of(plan.row(index)))
    return config, source, folder


def source_of(config: RunConfig, source: str, folder: Path, board: FakeBoard) -> tuple[OnlineSource, Objective]:
    tuning, denoiser = config.finetune, load_denoiser(config.model.path)
    torch.manual_seed(config.seed)
    model = attach_adapter(denoiser.network, rank=tuning.rank, alpha=tuning.alpha, target_modules=tuning.target_modules)
    objective = Objective(model, denoiser.schedule, tuning)
    objective.start, objective.old = ([p.detach().clone() for p in objective.parameters_trained] for _ in range(2))
    plan = plan_of(config, source)
    return OnlineSource(config, plan, str(folder), board, denoiser, objective, range(10, 900)), objective


def told(plan: OnlinePlan, folder: Path) -> FakeBoard:
    """A board that knows the parts of a folder."""
    board, names = FakeBoard(), [plan.name(index) for index in range(len(plan))]
    missing = set(run_folder.missing_parts(str(folder / "candidates"), names))
    board.finished([index for index, name in enumerate(names) if name not in missing])
    return board


def gradient(source: OnlineSource, objective: Objective, step: int, rank: int, workers: int) -> torch.Tensor:
    objective.zero_grad()
    for draw, share in source.parts(step, rank, workers):
        (objective(draw()) * share).backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters_trained])


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_together_learn_from_what_one_alone_does(drawn, workers):
    config, prompts, folder = drawn
    source, objective = source_of(config, prompts, folder, told(plan_of(config, prompts), folder))
    source.load({}, [])
    assert source.open(0)
    alone = gradient(source, objective, 0, 0, 1)
    together = sum(gradient(source, objective, 0, rank, workers) for rank in range(workers)) / workers
    assert alone.norm() > 0
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)
    assert len({len(source.parts(0, rank, workers)) for rank in range(workers)}) == 1


def test_a_source_that_starts_again_has_the_same_batches_and_publishes_the_versions_of_its_checkpoint(drawn):
    config, prompts, folder = drawn
    plan = plan_of(config, prompts)
    first, objective = source_of(config, prompts, folder, told(plan, folder))
    first.save = lambda uri, values: None
    first.load({}, [])
    lines, optimizer = [], torch.optim.SGD(objective.parameters_trained, lr=10.0)
    for step in range(INNER):
        assert first.open(step)
        gradient(first, objective, step, 0, 1)
        optimizer.step()
        lines.append({"step": step + 1, **first.close(step)})
    state = first.state()
    own = [values.clone() for values in objective.old]
    drawn_by = {version: {n: v.clone() for n, v in policy.items()} for version, policy in state["recent"].items()}
    assert list(drawn_by) == [0, 1]
    assert any(not torch.equal(drawn_by[0][name], values) for name, values in drawn_by[1].items())
    assert first.open(INNER)
    expected = first.parts(INNER, 0, 1)[0][0]()
    for values in objective.old:
        values.add_(1.0)
    assert all(torch.equal(drawn_by[1][name], values) for name, values in state["recent"][1].items()), "not a view"
    for values, before in zip(objective.old, own, strict=True):
        values.copy_(before)

    board = told(plan, folder)
    again, _ = source_of(config, prompts, folder, board)
    again.save = lambda uri, values: None
    again.load(state, lines)
    assert sorted(board.meeting.policies) == [0, 1]
    for version, policy in board.meeting.policies.items():
        assert all(torch.equal(policy[name], values) for name, values in drawn_by[version].items())
    assert again.history[0] == first.history[0]
    assert again.open(INNER)
    batch = again.parts(INNER, 0, 1)[0][0]()
    for name in ("x0", "noise", "timesteps", "advantages", "null"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name


def rewritten(folder: Path, to: Path, plan: OnlinePlan, index: int, **columns) -> None:
    """A drawn part under another index, with some columns computed anew from its own."""
    drawn = next((folder / "candidates").glob("update-00001-000-*.parquet"))
    table = storage.read_table(str(drawn))
    for name, of in columns.items():
        values = pa.array([of(value) for value in table[name].to_pylist()], table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    run_folder.commit(str(to / "candidates"), plan.name(index), table, {})


@pytest.mark.parametrize(
    ("scale", "flatten", "message"),
    [
        (1.5, False, "standard deviation of the latents of 1 updates has changed by 5.%"),
        (1.0, True, "diversity of a prompt's .* is .% of"),
    ],
)
def test_a_training_stops_where_the_latents_leave_the_first_ones(drawn, tmp_path, scale, flatten, message):
    config, prompts, folder = drawn
    drift = {"validate_every": 1} | ({"max_latent_drift": 9.0} if flatten else {})  # one update against the first
    config = config.model_copy(update={"online": config.online.model_copy(update=drift)})
    plan, board = plan_of(config, prompts), FakeBoard()
    drawn_part = next((folder / "candidates").glob("update-00001-000-*.parquet"))
    one = storage.read_table(str(drawn_part))["latents"].to_pylist()[0]

    def changed(latents):
        return None if latents is None else (scale * np.array(one if flatten else latents)).tolist()

    for index in plan.of_update(0):
        rewritten(folder, tmp_path, plan, index)
    for index in plan.of_update(1):
        rewritten(folder, tmp_path, plan, index, latents=changed)
    board.finished(range(len(plan)))
    source, _ = source_of(config, prompts, tmp_path, board)
    source.load({}, [])
    assert source.open(0)
    with pytest.raises(RunAway, match=message):
        source.open(INNER)


def test_a_training_stops_where_the_self_score_of_held_out_prompts_falls(drawn, tmp_path):
    config, prompts, folder = drawn
    online = config.online.model_copy(update={"updates": 6, "validation_prompts": 4})
    config = config.model_copy(update={"online": online})
    plan, board = plan_of(config, prompts), FakeBoard()
    names = iter(range(1000))
    for version, fallen in ((0, 0.0), (2, 5.0)):
        for index in plan.of_validation(version):
            rewritten(folder, tmp_path, plan, index, score_mitune=lambda v, f=fallen: -f + 1e-3 * next(names))
    for update in range(5):
        for index in plan.of_update(update):
            rewritten(folder, tmp_path, plan, index)
    board.finished(range(len(plan)))
    source, _ = source_of(config, prompts, tmp_path, board)
    source.load({}, [])
    for update in range(4):
        assert source.open(update * INNER)
    with pytest.raises(RunAway, match=r"self-score of held-out prompts fell by (5|4.99) since update 0"):
        source.open(4 * INNER)
    for rewards in ((), ("random",)):  # which has no column
        judged = config.model_copy(update={"online": online.model_copy(update={"rewards": rewards})})
        kept = best_version(judged, plan, str(tmp_path / "candidates"), [0, 2])
        assert kept["version"] == 0
        assert set(kept["validation"]) == {"0", "2"}


# ---------------------------------------------------------------------------------------------- whole runs
def in_process(config: RunConfig, source: str, folder: Path, board: FakeBoard | None = None) -> dict:
    """An online run without Ray: one actor in a thread, the training in this one. Returns the training's summary."""
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


def test_updates_are_logged_and_every_version_of_a_checkpoint_is_saved_and_scored(undisturbed):
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


def test_an_update_that_trains_no_prompt_is_passed_over(tiny_pipeline, tmp_path):
    """Its rewards are all the same. Nothing is held out: the last version is the one that is kept."""
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


@pytest.mark.parametrize("fails", [False, True])
def test_a_generation_that_fails_ends_the_training_and_is_the_error_of_the_run(
    tiny_pipeline, tmp_path, monkeypatch, fails
):
    """Whether the workers end, or fail because one of them has ended."""
    board = FakeBoard()

    def write_missing(*arguments):
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
def test_a_training_that_fails_ends_the_generation(tiny_pipeline, tmp_path, monkeypatch, error):
    board, ended = FakeBoard(), []

    def write_missing(*arguments):
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
    """Dies once after a commit, before anybody is told of it, and once before it makes a part."""

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
    """Its third optimiser step fails with the first driver; its seventh, past the checkpoint, with the second."""
    from mi_ray.training import loop as module

    optimizer_step, begun = module.optimizer_step, Path(settings["destination"], "begun")
    folder = Path(settings["destination"])

    def step(*arguments):
        with begun.open("a") as file:
            file.write(".")
        ray.train.get_all_reported_checkpoints()  # waits until Ray knows of the last one
        if begun.stat().st_size == 3 and _once(folder / "driver-died"):
            raise RuntimeError("as if the driver had gone")
        if begun.stat().st_size == 3 + 7 and _once(folder / "trainer-died"):
            os.kill(os.getpid(), signal.SIGKILL)
        return optimizer_step(*arguments)

    module.optimizer_step = step
    return module.train_loop(settings)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_whose_driver_actors_and_trainer_die_ends_where_an_undisturbed_one_does(
    tiny_pipeline, undisturbed, tmp_path, monkeypatch
):
    config, source = run_config(tiny_pipeline, tmp_path), stored_prompts(tmp_path)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which the workers cannot import
    run = (config, source, str(tmp_path), "test")
    ray.init(num_cpus=4, logging_level="error")
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
        summary = storage.read_json(storage.join(adapter, "summary.json"))
        weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        shutil.rmtree(adapter)  # the driver died before it wrote that
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
    """The same parts, rows, seeds, scores, losses, rewards and saved policies; an event for each part."""
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
