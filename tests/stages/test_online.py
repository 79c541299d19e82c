"""The candidates of an online run: the actor that samples them, and the board."""

import threading

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from online_run import COLORS, FakeBoard, batch_of, generator_of, moved, run_config, some_policy, stored_prompts
from safetensors.torch import save

from mi_ray import storage
from mi_ray.diffusion.adapters import MergedAdapter, adapter_state, attach_adapter, load_adapter_state
from mi_ray.inputs.online_plan import plan_of
from mi_ray.inputs.prompts import prompt_id
from mi_ray.inputs.shard_plan import Shard
from mi_ray.scoring.policy import PolicySampler
from mi_ray.scoring.work import Work
from mi_ray.stages import online as stage


# ---------------------------------------------------------------------------------------------- who draws
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_merged_adapter_equals_the_adapter_and_can_be_replaced(tiny_pipeline, adapter):
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
        load_adapter_state(unmerged, state)
        merged.load(state)
        outputs.append(output(model))
        torch.testing.assert_close(outputs[-1], output(unmerged), atol=1e-5, rtol=1e-4)
    assert torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[1]).norm() > 1e-2 * base.norm()
    merged.load(fresh)
    torch.testing.assert_close(output(model), base, atol=1e-5, rtol=1e-4)


def test_candidates_depend_only_on_policy_prompt_and_seed(tiny_pipeline, tmp_path):
    """They do not depend on the batch size, on other prompts of the shard, or on earlier policies."""
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


def test_waiting_actor_makes_and_reports_lost_parts(tiny_pipeline, tmp_path, monkeypatch):
    """The actor of the first update was lost: one part is committed but not reported, the other was never made."""
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


def test_late_part_is_not_made_and_late_validation_uses_the_saved_policy(tiny_pipeline, tmp_path):
    config = run_config(tiny_pipeline, tmp_path, online={"deadline_s": 0.01})
    source, board = stored_prompts(tmp_path), FakeBoard()
    plan, generator = plan_of(config, source), generator_of(config, source, tmp_path, board)
    first, late = plan.of_update(0)
    board.publish(0, some_policy(config, 0))
    generator(batch_of(plan.row(first)))
    assert board.wait([first, late], 0.01) == [first]
    for version in (1, 2, 3):
        board.publish(version, policy := some_policy(config, version))
    calls, generator.loaded = generator.policy.calls, (3, False)
    assert generator(batch_of(plan.row(late)))["shard"] == [""]
    assert generator.policy.calls == calls
    board.finished([late])
    assert board.wait([first, late], 0.01) == [first], "decided once"
    saved = storage.join(stage.policy_folder(str(tmp_path), 2), "adapter_model.safetensors")
    storage.write_bytes(saved, save(policy))
    (validation,) = plan.of_validation(2)
    assert generator(batch_of(plan.row(validation)))["shard"] == [plan.name(validation)]


def test_late_validation_of_the_base_model_is_made_by_an_actor_that_has_gone_on(tiny_pipeline, tmp_path):
    """The actor that had the part was lost, and version 0 is no longer on the board. Without the part, the training
    would wait for ever. Its images are those of the base model."""
    config, source, board = run_config(tiny_pipeline, tmp_path), stored_prompts(tmp_path), FakeBoard()
    plan, generator = plan_of(config, source), generator_of(config, source, tmp_path, board)
    first = adapter_state(generator.policy.adapter.model)  # new: it changes nothing
    storage.write_bytes(storage.join(stage.policy_folder(str(tmp_path), 0), "adapter_model.safetensors"), save(first))
    for version in (0, 1, 2, 3):
        board.publish(version, some_policy(config, version))
    assert board.policy(0, 0.0)[0] == "past"
    (lost,) = plan.of_validation(0)
    generator.policy.load(some_policy(config, 3))
    generator.loaded = (3, False)
    assert generator(batch_of(plan.row(lost)))["shard"] == [plan.name(lost)]
    assert board.wait([lost], None) == [lost]
    expected = generator_of(config, source, tmp_path / "other", FakeBoard())
    assert expected(batch_of(plan.row(lost)))["shard"] == [plan.name(lost)]
    mine, theirs = (
        storage.read_table(storage.join(str(folder), "candidates", plan.name(lost)))["score_mitune"].to_pylist()
        for folder in (tmp_path, tmp_path / "other")
    )
    assert mine == pytest.approx(theirs, rel=1e-3)


# ---------------------------------------------------------------------------------------------- the board
def test_board_decides_the_parts_of_an_update_once():
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
    assert board.wait([7], None) is None, "the run had already ended"


def test_board_keeps_only_the_last_versions():
    board = FakeBoard(keep=2)
    assert board.policy(0, 0.0) == ("wait", None)
    for version in (0, 1, 2, 3):
        board.publish(version, {"w": torch.full((1,), float(version))})
    board.publish(1, {"w": torch.ones(1)})  # by a restarted training
    assert [board.policy(version, 0.0)[0] for version in range(5)] == ["past", "past", "here", "here", "wait"]
    board.end()
    assert [board.policy(version, 0.0)[0] for version in range(5)] == ["past", "past", "here", "here", "ended"]
