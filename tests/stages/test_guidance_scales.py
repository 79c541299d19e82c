"""An evaluation at several guidance scales equals separate evaluations with the same prompts and seeds."""

import numpy as np
import pyarrow as pa
import pytest

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.inputs.prompts import PROMPTS as PROMPT_TABLE
from mi_ray.inputs.prompts import prompt_id
from mi_ray.inputs.shard_plan import Shard, ShardPlan, write_prompts
from mi_ray.runs.cost import evaluations
from mi_ray.scoring.work import Work
from mi_ray.stages.evaluate import Evaluator

PROMPTS = ["a red circle", "a blue square left of a green star", "two pink hearts"]
SCALES, STEPS, EACH, NOISES = (1.0, 3.0, 5.0), 4, 2, 2


def config_of(model, run_dir, scale: float, scales: tuple[float, ...] = ()) -> RunConfig:
    sampler = {"solver": "dpm++2m", "num_inference_steps": STEPS, "guidance_scale": scale}
    evaluation = {"images_per_prompt": EACH, "sampler": sampler, "guidance_scales": scales, "alignment": "oracle"}
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "prompts": {"file": "prompts.txt"},
            "model": {"path": str(model)},
            "score": {"num_samples": NOISES},
            "evaluation": evaluation,
        }
    )


def evaluated(config: RunConfig, model: str = "base") -> tuple[list[dict], Work]:
    nothing, work = [None] * len(PROMPTS), Work()
    shard = Shard(0, "part-00000.parquet", [prompt_id(p) for p in PROMPTS], PROMPTS, nothing, nothing)
    actor = Evaluator(config.model_dump(mode="json"), model, config.run_dir, None)
    return actor._rows(shard, list(range(len(PROMPTS))), work), work


@pytest.fixture(scope="module")
def together(tiny_pipeline, tmp_path_factory):
    return evaluated(config_of(tiny_pipeline, tmp_path_factory.mktemp("run"), 3.0, (5.0, 1.0)))


@pytest.mark.parametrize("scale", SCALES)
def test_each_scale_equals_a_separate_evaluation(together, tiny_pipeline, tmp_path, scale):
    mine = [row for row in together[0] if row["guidance_scale"] == scale]
    alone, _ = evaluated(config_of(tiny_pipeline, tmp_path, scale))
    assert len(mine) == len(alone) == len(PROMPTS) * EACH
    for row, other in zip(mine, alone, strict=True):
        np.testing.assert_array_equal(row.pop("features"), other.pop("features"))
        assert row == other
    assert all(row["score_pmi"] is not None for row in mine)


def test_scale_one_evaluates_one_branch(together, tmp_path):
    config = config_of("shapes", tmp_path, 3.0, SCALES)
    rows, work = together
    assert work.denoiser_evaluations == len(PROMPTS) * EACH * STEPS * (1 + 2 + 2)
    counted = evaluations(config, 10, len(PROMPTS))["evaluate"] / 2  # half of the total of base and tuned
    assert counted == work.denoiser_evaluations + work.score_evaluations
    assert {row["seed"] for row in rows if row["guidance_scale"] == 1} == {row["seed"] for row in rows}


def test_real_images_have_no_guidance_scale(tmp_path):
    rows, _ = evaluated(config_of("shapes", tmp_path, 3.0, SCALES), "reference")
    assert len(rows) == len(PROMPTS) * EACH
    assert {row["guidance_scale"] for row in rows} == {None}


def test_rows_are_ordered_by_prompt_scale_and_image(tiny_pipeline, tmp_path):
    config = config_of(tiny_pipeline, tmp_path, 3.0, SCALES)
    rows = [{"prompt_id": prompt_id(p), "prompt": p} for p in PROMPTS]
    source, folder = str(tmp_path / "prompts.parquet"), str(tmp_path / "evaluation" / "base")
    write_prompts(source, pa.Table.from_pylist(rows, PROMPT_TABLE).to_batches())
    row = ShardPlan(source, len(PROMPTS), "key").row(0)
    Evaluator(config.model_dump(mode="json"), "base", folder, None)({key: np.array([row[key]]) for key in row})
    table = storage.read_tables(folder).to_pandas()
    keys = list(zip(table["prompt"], table["guidance_scale"], table["image_index"], strict=True))
    assert keys == [(p, s, i) for p in PROMPTS for s in SCALES for i in range(EACH)]
    assert table["error"].isna().all()
