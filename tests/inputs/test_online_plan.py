"""The order of prompts in an online run."""

from collections import Counter

import pyarrow as pa
import pytest

from mi_ray.config import OnlineConfig, RunConfig
from mi_ray.config.section import ConfigError
from mi_ray.inputs.online_plan import OnlinePlan, too_few_prompts
from mi_ray.inputs.prompts import PROMPTS
from mi_ray.inputs.shard_plan import ShardPlan, write_prompts
from mi_ray.runs.cost import evaluations


def plan_of(tmp_path, prompts: int = 40, **settings) -> OnlinePlan:
    rows = {"prompt_id": [f"{i:016x}" for i in range(prompts)], "prompt": [f"prompt {i}" for i in range(prompts)]}
    rows |= {name: [None] * prompts for name in PROMPTS.names if name not in rows}
    uri = str(tmp_path / "prompts.parquet")
    write_prompts(uri, pa.table(rows, schema=PROMPTS).to_batches())
    online = {"updates": 8, "prompts_per_update": 8, "validate_every": 3, "validation_prompts": 8, "lag": 1}
    return OnlinePlan(ShardPlan(uri, 4, "key"), OnlineConfig(**(online | settings)), seed=5)


def test_every_prompt_once_an_epoch_and_the_held_out_never(tmp_path):
    plan = plan_of(tmp_path)
    trained = Counter(plan.row(index)["start"] for update in range(8) for index in plan.of_update(update))
    assert set(trained) == set(range(0, 32, 4))
    assert set(trained.values()) == {2}  # 8 updates of 2 shards are two epochs of 8
    held = {plan.row(index)["start"] for version in (0, 3, 6, 8) for index in plan.of_validation(version)}
    assert held == {32, 36}
    assert plan.of_validation(1) == []


def test_no_update_has_a_shard_twice(tmp_path):
    plan = plan_of(tmp_path, prompts=20, updates=30)  # three shards are trained, two in each update
    drawn = [{plan.row(index)["start"] for index in plan.of_update(update)} for update in range(30)]
    assert {len(starts) for starts in drawn} == {2}
    assert set.union(*drawn) == {0, 4, 8}


@pytest.mark.parametrize("lag", [0, 1])
def test_each_part_names_the_version_that_draws_it_and_comes_after_what_that_needs(tmp_path, lag):
    plan = plan_of(tmp_path, lag=lag)
    for index in range(len(plan)):
        row = plan.row(index)
        assert row["version"] == (row["update"] if row["validation"] else max(0, row["update"] - lag))
        if row["version"]:
            assert max(plan.of_update(row["version"] - 1)) < index
    assert len({plan.name(index) for index in range(len(plan))}) == len(plan)


def test_names_are_the_same_when_read_again(tmp_path):
    assert [plan_of(tmp_path).name(i) for i in range(20)] == [plan_of(tmp_path).name(i) for i in range(20)]


def test_cost_counts_the_prompts_of_whole_shards(tmp_path):
    """An update of five prompts uses two shards of four."""
    given = {"run_dir": str(tmp_path), "prompts": {"file": "a.txt"}, "finetune": {"method": "nft"}}
    given |= {"generate": {"prompts_per_shard": 4, "candidates_per_prompt": 3}}
    online = {"updates": 8, "prompts_per_update": 5, "validation_prompts": 0}
    config = RunConfig.model_validate(given | {"online": online})
    plan = plan_of(tmp_path, **online)
    prompts = sum(plan.size(index) for index in plan.of_update(0))
    assert config.update_prompts == prompts == 8
    assert evaluations(config, 40, 4)["generate"] == 8 * prompts * 3 * 2 * config.sampler.num_inference_steps


def test_too_few_prompts_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"prompts.file: 12 prompts are too few: one update needs 8 and 8 are held out"
    ):
        plan_of(tmp_path, prompts=12)


def test_too_few_prompts_are_faults_of_an_online_run_only(tmp_path):
    online = {"updates": 8, "prompts_per_update": 8, "validation_prompts": 8}
    given = {"run_dir": str(tmp_path), "prompts": {"file": "a.txt"}, "generate": {"prompts_per_shard": 4}}
    config = RunConfig.model_validate(given | {"online": online, "finetune": {"method": "nft"}})
    assert too_few_prompts(config, 16) == []
    for count in (1, 12):
        (fault,) = too_few_prompts(config, count)
        assert fault.startswith(f"prompts.file: {count} prompts are too few: one update needs 8 and 8 are held out")
    assert too_few_prompts(RunConfig.model_validate(given), 12) == []
    compared = {"score": {"names": ["pmi_contrastive"]}, "select": {"by": "pmi_contrastive"}}
    assert "there is only one" in too_few_prompts(RunConfig.model_validate(given | compared), 1)[0]
    best_of = {"sampler": {"best_of": {"candidates": 2, "by": "pmi_contrastive"}}}
    assert "there is only one" in too_few_prompts(RunConfig.model_validate(given | best_of), 1)[0]
