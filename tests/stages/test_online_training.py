"""The training of an online run: its data, and when it stops."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from online_run import INNER, FakeBoard, batch_of, generator_of, run_config, some_policy, stored_prompts

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.online_plan import OnlinePlan, plan_of
from mi_ray.runs import folder as run_folder
from mi_ray.training.losses import Objective, weights_of
from mi_ray.training.online import OnlineSource, RunAway
from mi_ray.training.validation import best_version


@pytest.fixture(scope="module")
def drawn(tiny_pipeline, tmp_path_factory) -> tuple[RunConfig, str, Path]:
    """The parts of two updates and one validation: (config, prompts, folder)."""
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


def board_of(plan: OnlinePlan, folder: Path) -> FakeBoard:
    """A board that knows the committed parts of a folder."""
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
def test_several_workers_have_the_gradient_of_one_worker(drawn, workers):
    config, prompts, folder = drawn
    source, objective = source_of(config, prompts, folder, board_of(plan_of(config, prompts), folder))
    source.load({}, [])
    assert source.open(0)
    alone = gradient(source, objective, 0, 0, 1)
    together = sum(gradient(source, objective, 0, rank, workers) for rank in range(workers)) / workers
    assert alone.norm() > 0
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)
    assert len({len(source.parts(0, rank, workers)) for rank in range(workers)}) == 1


def test_restarted_source_has_the_same_batches_and_versions(drawn):
    config, prompts, folder = drawn
    plan = plan_of(config, prompts)
    first, objective = source_of(config, prompts, folder, board_of(plan, folder))
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

    board = board_of(plan, folder)
    again, _ = source_of(config, prompts, folder, board)
    again.save = lambda uri, values: None
    again.load(state, lines)
    assert sorted(board.meeting.policies) == [0, 1]
    for version, policy in board.meeting.policies.items():
        assert all(torch.equal(policy[name], values) for name, values in drawn_by[version].items())
    assert again.history[0] == first.history[0]
    assert again.open(INNER)
    batch = again.parts(INNER, 0, 1)[0][0]()
    for name in ("x0", "noise", "timesteps", "advantages", "held"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name


def test_measurements_of_the_policy_need_no_more_memory_than_a_training_step(drawn):
    """The effective guidance and the probe use batches of at most finetune.batch_size rows, here one prompt."""
    config, prompts, folder = drawn
    source, objective = source_of(config, prompts, folder, board_of(plan_of(config, prompts), folder))
    source.load({}, [])
    assert source.open(0)
    predict, sizes = objective.predict, []

    def counted(batch, conditioning=None):
        sizes.append(len(batch.x0))
        return predict(batch, conditioning)

    objective.predict = counted
    assert source.effective_guidance() == pytest.approx(1, abs=1e-5)  # the policy is the base model
    for values in objective.old:
        values.add_(0.1)
    gamma = source.effective_guidance()
    assert set(sizes) == {config.finetune.batch_size}
    overlap = square = 0.0
    for draw, _ in source.parts(0, 0, 1):
        batch = draw()
        null = source.denoiser.encode_prompts([""]).expand(len(batch.x0))
        with torch.no_grad():
            base, empty = predict(batch), predict(batch, null)
            with weights_of(objective.old, objective.parameters_trained):
                policy = predict(batch)
        overlap, square = overlap + ((policy - empty) * (base - empty)).sum(), square + (base - empty).square().sum()
    assert gamma == pytest.approx(float(overlap / square), rel=1e-4)
    assert abs(gamma - 1) > 1e-3
    assert len(source.probe().x0) == config.finetune.batch_size
    source.groups = []
    assert math.isnan(source.effective_guidance())


def test_random_rewards_need_no_scores_and_depend_only_on_the_seeds(tiny_pipeline, tmp_path):
    config = run_config(tiny_pipeline, tmp_path, online={"rewards": ["random"], "validation_prompts": 0})
    source, board = stored_prompts(tmp_path), FakeBoard()
    plan, generator = plan_of(config, source), generator_of(config, source, tmp_path, board)
    board.publish(0, some_policy(config, 0))
    rows = []
    for index in plan.of_update(0):
        generator(batch_of(plan.row(index)))
        rows += storage.read_table(str(tmp_path / "candidates" / plan.name(index))).to_pylist()
    assert [row["score_mitune"] for row in rows] == [None] * 12
    drawn = np.array([np.random.default_rng(row["seed"]).standard_normal() for row in rows]).reshape(4, 3)
    scaled = (drawn - drawn.mean(1, keepdims=True)) / drawn.std(1, ddof=1, keepdims=True)
    assert [row["advantage"] for row in rows] == pytest.approx((scaled / 2).ravel().tolist(), rel=1e-5)
    learned, objective = source_of(config, source, tmp_path, board)
    learned.load({}, [])
    assert learned.open(0)
    assert len(learned.groups) == 4
    assert "reward" not in learned.figures
    assert gradient(learned, objective, 0, 0, 1).norm() > 0


def test_held_rows_are_empty_prompts_and_levels_that_are_not_trained(drawn):
    config, prompts, folder = drawn
    source, _ = source_of(config, prompts, folder, board_of(plan_of(config, prompts), folder))
    held = {"held_share": 0.6, "held_weight": 3}
    source.config = config.model_copy(update={"online": config.online.model_copy(update=held)})
    source.timesteps = range(500, 1000)
    assert source.open(0)
    null, seen = source.denoiser.encode_prompts([""])["embeds"], Counter()
    for inner in range(40):
        batch = source._draw(source.groups, inner)
        for t, held, weight, embeds in zip(
            batch.timesteps.tolist(),
            batch.held.tolist(),
            batch.weights.tolist(),
            batch.conditioning["embeds"],
            strict=True,
        ):
            empty, trained = torch.allclose(embeds, null[0], atol=1e-6), t >= 500
            assert weight == (3 if held else 1)
            seen[held, empty, trained] += 1
    assert set(seen) == {(False, False, True), (True, True, True), (True, True, False), (True, False, False)}
    assert 0.45 < sum(count for (held, *_), count in seen.items() if held) / seen.total() < 0.75


def rewritten(folder: Path, to: Path, plan: OnlinePlan, index: int, **columns) -> None:
    """Commit a copy of a part with another index, with changed columns."""
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
def test_training_stops_if_the_latents_change_too_much(drawn, tmp_path, scale, flatten, message):
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


def test_training_stops_if_the_self_score_falls(drawn, tmp_path):
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
    for rewards in ((), ("random",)):  # random has no column
        judged = config.model_copy(update={"online": online.model_copy(update={"rewards": rewards})})
        kept = best_version(judged, plan, str(tmp_path / "candidates"), [0, 2])
        assert kept["version"] == 0
        assert set(kept["validation"]) == {"0", "2"}


def test_version_without_a_finite_reward_is_not_kept(drawn, tmp_path):
    """The summary stays strict JSON. The mean of NaN is NaN, and any comparison with it is false."""
    config, prompts, folder = drawn
    config = config.model_copy(update={"online": config.online.model_copy(update={"updates": 6})})
    plan = plan_of(config, prompts)
    for version, reward in ((0, math.nan), (2, 1.0), (4, 2.0), (6, math.nan)):
        for index in plan.of_validation(version):
            rewritten(folder, tmp_path, plan, index, score_mitune=lambda v, r=reward: r)
    candidates = str(tmp_path / "candidates")
    assert best_version(config, plan, candidates, [0, 2, 4, 6]) == {"version": 4, "validation": {"2": 1.0, "4": 2.0}}
    assert best_version(config, plan, candidates, [0, 6]) == {"version": 6, "validation": {}}
