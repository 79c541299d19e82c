"""The generating actor, called directly without Ray: its rows, and that they do not depend on batches."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from mi_ray import storage
from mi_ray.config import TRAJECTORY_SCORES, RunConfig
from mi_ray.config.rescore import RescoreConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.information import pointwise
from mi_ray.inputs.prompts import PROMPTS as PROMPTS_SCHEMA
from mi_ray.inputs.prompts import prompt_id
from mi_ray.inputs.shard_plan import Shard, write_prompts
from mi_ray.scoring.sampler import Sampler
from mi_ray.scoring.scorer import trajectory_scores
from mi_ray.scoring.work import Work
from mi_ray.stages import generate as stage
from mi_ray.stages.generate import CandidateGenerator
from mi_ray.stages.rescore import rescore

PROMPTS = ["a red circle", "a blue square and a green star", "two hearts"]
EACH = 4


def config_for(model, **resources) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "prompts": {"file": "unused"},
            "model": {"path": str(model)},
            "sampler": {"solver": "ddpm", "num_inference_steps": 8, "guidance_scale": 3.0},
            "generate": {"candidates_per_prompt": EACH},
            "score": {
                "names": [*TRAJECTORY_SCORES, "pmi", "pmi_orthogonal", "pmi_contrastive"],
                "num_samples": 3,
                "neighbours": 2,
            },
            "select": {"by": "pmi_contrastive"},
            "resources": resources,
        }
    )


def shard_batch(prompts: list[str], folder: Path, index: int = 0) -> dict[str, np.ndarray]:
    """The input row of a shard, as from Ray Data."""
    source = str(folder / f"prompts-{index}" / "prompts.parquet")
    rows = [{"prompt_id": prompt_id(prompt), "prompt": prompt} for prompt in prompts]
    write_prompts(source, [pa.RecordBatch.from_pylist(rows, PROMPTS_SCHEMA)])
    return {
        "index": np.array([index]),
        "name": np.array([f"part-{index:05d}.parquet"], object),
        "source": np.array([source], object),
        "start": np.array([0]),
        "stop": np.array([len(prompts)]),
    }


def generate(model, folder, shards, keep_by=("pmi_contrastive",), previews=(), **resources):
    actor = CandidateGenerator(
        config_for(model, **resources).model_dump(mode="json"),
        0,
        str(folder),
        None,
        list(keep_by),
        list(previews),
        PROMPTS,
    )
    done = [actor(shard_batch(prompts, folder, index)) for index, prompts in enumerate(shards)]
    return storage.read_tables(str(folder)).to_pandas(), done, actor


@pytest.fixture(scope="module")
def pool(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    return generate(tiny_pipeline, folder, [PROMPTS], ("pmi_contrastive", "random"), [prompt_id(PROMPTS[0])])


def test_every_candidate_has_a_row_with_its_seed_curves_and_scores(pool):
    rows, done, _ = pool
    assert len(rows) == len(PROMPTS) * EACH
    assert rows["seed"].nunique() == len(rows)
    assert rows["error"].isna().all()
    assert all(len(curve) == 8 for curve in rows["delta_sq"])
    assert np.isfinite(rows.filter(like="score_")).to_numpy().all()
    assert done[0]["denoiser_evaluations"] == [len(rows) * 8 * 2]
    assert done[0]["score_evaluations"] == [len(rows) * 3 * (1 + 1 + 2)]


def test_best_candidate_is_kept_with_latents_and_image(pool):
    rows, _, actor = pool
    for _, of_prompt in rows.groupby("prompt_id"):
        best = of_prompt.loc[of_prompt["score_pmi_contrastive"].idxmax()]
        assert of_prompt["kept"].sum() == 1
        assert best["kept"]
        assert best["rank"] == 0
        latents = torch.tensor(np.array(best["latents"], np.float32)).view(1, *best["latents_shape"])
        image = np.array(Image.open(io.BytesIO(best["image"]["bytes"])))
        decoded = actor.denoiser.decode(latents)[0]
        assert np.abs(image.astype(int) - decoded.astype(int)).max() <= 2  # latents are stored in half precision


def test_only_kept_and_previewed_candidates_have_images(pool):
    rows, _, _ = pool
    previewed = rows["prompt"] == PROMPTS[0]
    assert (rows["image"].notna() == (previewed | rows["kept"])).all()


def test_trajectory_scores_from_stored_curves(pool):
    rows, _, actor = pool
    curves = torch.tensor(np.stack(rows["delta_sq"]))
    timesteps, schedule = actor.sampler.plan.timesteps, actor.denoiser.schedule
    again = trajectory_scores(actor.config.score, curves, timesteps, schedule)
    assert set(again) == set(TRAJECTORY_SCORES)
    for name, values in again.items():
        np.testing.assert_allclose(rows[f"score_{name}"], values, rtol=1e-5)


def test_rescore_of_a_run_folder(tiny_pipeline, tmp_path, capsys):
    config = config_for(tiny_pipeline)
    storage.write_json(str(tmp_path / "run.json"), {"config": config.results_config()})
    rows, *_ = generate(tiny_pipeline, tmp_path / "round-0" / "candidates", [PROMPTS[:2], PROMPTS[2:]])
    asked = {"names": ["asd", "mitune"], "log_snr_min": -5.0}
    shown = rescore(RescoreConfig.model_validate({"run_dir": str(tmp_path), "score": asked}))
    again = storage.read_tables(str(tmp_path / "rescored" / "round-0")).to_pandas()
    both = rows.merge(again, on=["prompt_id", "candidate_index"], suffixes=("", "_again"))
    assert len(both) == len(rows) == len(again)
    for name in asked["names"]:
        np.testing.assert_allclose(both[f"score_{name}"], both[f"score_{name}_again"], rtol=1e-5)
    assert shown["score"].tolist() == asked["names"]
    assert shown["same first choice"].between(0, 1).all()
    assert "same first choice" in capsys.readouterr().out


def test_rescore_refuses_an_online_run(tmp_path):
    finetune = {"finetune": {"method": "nft"}, "online": {"updates": 2}, "rounds": 1}
    storage.write_json(str(tmp_path / "run.json"), {"config": {"prompts": {"file": "unused"}} | finetune})
    with pytest.raises(ConfigError, match="is an online run, which stores no curves; use a run in rounds"):
        rescore(RescoreConfig(run_dir=str(tmp_path)))


def test_rescore_refuses_pointwise_scores():
    with pytest.raises(ValidationError, match="pmi cannot be computed from stored curves"):
        RescoreConfig.model_validate({"run_dir": "x", "score": {"names": ["asd", "pmi"]}})


def test_candidates_do_not_depend_on_batches_and_shards(pool, tiny_pipeline, tmp_path):
    rows, _, _ = pool
    other, _, _ = generate(tiny_pipeline, tmp_path, [PROMPTS[2:], PROMPTS[:2]], batch_size=3)
    key = ["prompt_id", "candidate_index"]
    rows, other = (table.sort_values(key).reset_index(drop=True) for table in (rows, other))
    assert (rows["seed"] == other["seed"]).all()
    assert (rows["kept"] == other["kept"]).all()
    for column in rows.filter(like="score_"):
        np.testing.assert_allclose(rows[column], other[column], rtol=1e-3, atol=1e-3)


def test_candidate_can_be_sampled_again_from_its_seed(pool, tiny_pipeline):
    rows, _, _ = pool
    row = rows[rows["kept"]].iloc[1]
    denoiser = load_denoiser(str(tiny_pipeline))
    sampler = Sampler(denoiser, config_for(tiny_pipeline).sampler, 1)
    again = sampler(denoiser.encode_prompts([row["prompt"]]), [[int(row["seed"])]], Work())
    np.testing.assert_allclose(again.latents.flatten().numpy(), row["latents"].astype(np.float32), rtol=1e-3, atol=1e-3)


def test_failing_prompt_is_one_error_row(tiny_pipeline, tmp_path, monkeypatch):
    encode = CandidateGenerator._rows

    def fail(self, shard: Shard, positions, work):
        if any(shard.prompts[p] == PROMPTS[1] for p in positions):
            raise RuntimeError("injected")
        return encode(self, shard, positions, work)

    monkeypatch.setattr(CandidateGenerator, "_rows", fail)
    rows, done, _ = generate(tiny_pipeline, tmp_path, [PROMPTS])
    bad = rows[rows["error"].notna()]
    assert bad["prompt"].tolist() == [PROMPTS[1]]
    assert bad["error"].tolist() == ["RuntimeError: injected"]
    assert len(rows) == 2 * EACH + 1
    assert done[0]["errors"] == [1]


def test_candidate_that_is_not_finite_is_an_error_and_not_kept(tiny_pipeline, tmp_path, monkeypatch):
    sample = Sampler.__call__

    def broken(*arguments):
        result = sample(*arguments)
        result.latents[0] = torch.nan
        return result

    monkeypatch.setattr(Sampler, "__call__", broken)
    rows, _, _ = generate(tiny_pipeline, tmp_path, [PROMPTS])
    assert rows["error"].notna().tolist() == [True] + [False] * (len(rows) - 1)
    assert not rows["kept"].iloc[0]
    assert rows.groupby("prompt_id")["kept"].sum().tolist() == [1, 1, 1]


def test_score_that_is_not_finite_is_an_error(tiny_pipeline, tmp_path, monkeypatch):
    statistics = pointwise.denoising_statistics

    def spoiled(*arguments, **keywords):
        errors, distances = statistics(*arguments, **keywords)
        errors[0, 0] = torch.nan
        return errors, distances

    monkeypatch.setattr(pointwise, "denoising_statistics", spoiled)
    rows, *_ = generate(tiny_pipeline, tmp_path, [PROMPTS])
    assert rows["error"].notna().sum() == 1
    (bad,) = rows[rows["error"].notna()].to_dict("records")
    assert bad["error"] == "the model's output is not finite in pmi"
    assert not bad["kept"]
    assert rows.groupby("prompt_id")["kept"].sum().eq(1).all()


def test_best_of_n_by_pmi_contrastive_has_the_prompts_to_compare_with(tiny_pipeline, tmp_path, monkeypatch):
    """Also if no score of the candidates needs them."""
    best_of = {"candidates": 2, "by": "pmi_contrastive"}
    given = config_for(tiny_pipeline).model_dump(mode="json") | {"run_dir": str(tmp_path)}
    given["sampler"] |= {"num_inference_steps": 2, "best_of": best_of}
    given["score"] |= {"names": ["mitune"]}
    given["select"] |= {"by": "mitune"}
    constructor = {}
    monkeypatch.setattr(stage, "run_stage", lambda *arguments: constructor.update(arguments[3]))
    stage.generate(RunConfig.model_validate(given), None, str(tmp_path / "pool"), 0, None, ["mitune"], [], PROMPTS)
    CandidateGenerator(**constructor)(shard_batch(PROMPTS[:1], tmp_path))
    rows = storage.read_tables(str(tmp_path / "pool"))
    assert rows["error"].to_pylist() == [None] * EACH
    given["sampler"]["best_of"] = {}
    stage.generate(RunConfig.model_validate(given), None, str(tmp_path / "pool"), 0, None, ["mitune"], [], PROMPTS)
    assert constructor["pool"] == []
