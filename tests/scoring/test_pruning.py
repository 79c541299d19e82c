"""Successive halving: pruned candidates, their cost, and independence of batches."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from mi_ray.config import PruneConfig, RunConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.prompts import prompt_id
from mi_ray.inputs.shard_plan import Shard
from mi_ray.runs.cost import evaluations
from mi_ray.scoring.pruning import Halving, cut_scorer
from mi_ray.scoring.sampler import Sampler, even_batches
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work
from mi_ray.stages.generate import CandidateGenerator
from mi_ray.training.select import ranks

PROMPTS = ["a red circle", "a blue square and a green star", "two hearts"]
EACH = 6
STEPS = 10
CUTS = {3: 4, 6: 2}


def config_for(folder, by="pmi_contrastive", solver="ddpm", **sections) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "prompts": {"file": "unused"},
            "model": {"path": str(folder)},
            "sampler": {"solver": solver, "num_inference_steps": STEPS, "guidance_scale": 3.0},
            "generate": {"candidates_per_prompt": EACH},
            "score": {"names": ["mitune", "pmi_contrastive"], "num_samples": 2, "neighbours": 2},
            "select": {"by": "pmi_contrastive"},
            "prune": {"by": by, "after": [0.3, 0.6], "keep": [0.6, 0.33], "num_samples": 2},
        }
        | sections
    )


@pytest.fixture(scope="module")
def denoiser(tiny_pipeline):
    return load_denoiser(str(tiny_pipeline), device="cpu")


def sampled(denoiser, config, prompts, batch_size, carried=None, cuts=True):
    """(trajectory, halving, work) for seeds that depend on the prompts, as in the generation."""
    work, conditioning = Work(), denoiser.encode_prompts(prompts)
    seeds = [[1000 * PROMPTS.index(prompt) + c for c in range(EACH)] for prompt in prompts]
    scorer = Scorer(denoiser, config.score, batch_size, 0, PROMPTS)
    carried = np.zeros(len(prompts) * EACH, bool) if carried is None else carried
    counts = config.prune.cuts(STEPS, EACH)
    halving = Halving(counts, cut_scorer(config, scorer, PROMPTS), prompts, conditioning, carried, work)
    sampler = Sampler(denoiser, config.sampler, batch_size)
    return sampler(conditioning, seeds, work, halving if cuts else None), halving, work


# ------------------------------------------------------------------------------------------ the schedule
def test_cuts_are_counted_in_whole_steps_and_candidates():
    assert PruneConfig().cuts(100, 50) == {}
    assert PruneConfig(by="mitune").cuts(100, 50) == {20: 13}
    assert PruneConfig(by="mitune", after=[0.1, 0.5], keep=[0.5, 0.1]).cuts(30, 16) == {3: 8, 15: 2}
    assert PruneConfig(by="mitune", after=[0.1, 0.12], keep=[0.5, 0.25]).cuts(10, 16) == {1: 4}  # the same step
    assert PruneConfig(by="mitune").candidate_steps(100, 50) == 50 * 20 + 13 * 80


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"after": [0.2, 0.4]}, "after has 2 values and keep has 1"),
        ({"after": [0.4, 0.2], "keep": [0.5, 0.2]}, "rising"),
        ({"after": [0.2, 0.4], "keep": [0.5, 0.5]}, "falling"),
        ({"after": [1.0]}, "between 0 and 1"),
        ({"after": [], "keep": []}, "after has 0 values"),
    ],
)
def test_invalid_schedules_are_refused(fields, named):
    with pytest.raises(ValidationError, match=named):
        PruneConfig(by="mitune", **fields)


def test_settings_that_pruning_does_not_support_are_refused(tiny_pipeline):
    with pytest.raises(ValidationError, match=r"prune\.keep leaves 2"):
        config_for(tiny_pipeline, select={"by": "pmi_contrastive", "top_k": 3})
    with pytest.raises(ValidationError, match="by oracle needs every candidate measured"):
        config_for(
            tiny_pipeline,
            generate={"candidates_per_prompt": EACH, "alignment": "oracle"},
            evaluation={"controls": ["oracle"]},
        )


# ------------------------------------------------------------------------------------------ the sampling
@pytest.mark.parametrize("solver", ["ddpm", "dpm++2m", "dpm++2m-sde"])
def test_survivors_equal_candidates_without_pruning(denoiser, tiny_pipeline, solver):
    config = config_for(tiny_pipeline, solver=solver)
    whole, _, _ = sampled(denoiser, config, PROMPTS, 64, cuts=False)
    pruned, halving, work = sampled(denoiser, config, PROMPTS, 5)
    left = halving.finished
    assert left.reshape(-1, EACH).sum(1).tolist() == [2, 2, 2]
    torch.testing.assert_close(pruned.latents[left], whole.latents[left], rtol=1e-3, atol=1e-3)
    for name in ("delta_sq", "cross"):
        ours, theirs = getattr(pruned, name), getattr(whole, name)
        torch.testing.assert_close(ours[left], theirs[left], rtol=1e-3, atol=1e-3)
        for row, steps in enumerate(halving.steps_done(STEPS)):
            torch.testing.assert_close(ours[row, :steps], theirs[row, :steps], rtol=1e-3, atol=1e-3)
            assert ours[row, steps:].isnan().all()
    assert work.denoiser_evaluations == 2 * len(PROMPTS) * (EACH * 3 + 4 * 3 + 2 * 4)
    assert work.denoiser_evaluations == evaluations(config, len(PROMPTS), 0)["generate"]


@pytest.mark.parametrize("by", ["mitune", "pmi_contrastive"])
def test_pruning_does_not_depend_on_batches_or_other_prompts(denoiser, tiny_pipeline, by):
    config = config_for(tiny_pipeline, by=by)
    _, together, _ = sampled(denoiser, config, PROMPTS, 64)
    _, packed, _ = sampled(denoiser, config, PROMPTS, 4)
    _, alone, _ = sampled(denoiser, config, PROMPTS[1:2], 64)
    assert together.pruned_after.tolist() == packed.pruned_after.tolist()
    assert together.pruned_after[EACH : 2 * EACH].tolist() == alone.pruned_after.tolist()
    np.testing.assert_allclose(together.scores, packed.scores, rtol=1e-3, atol=1e-3)


def test_cut_uses_the_score_of_the_steps_so_far(denoiser, tiny_pipeline):
    """Compared with a pool without pruning: the first steps of the curves determine the first cut."""
    config = config_for(tiny_pipeline, by="asd")
    whole, _, _ = sampled(denoiser, config, PROMPTS, 64, cuts=False)
    _, halving, _ = sampled(denoiser, config, PROMPTS, 64)
    worth = whole.delta_sq[:, :3].sum(1).view(-1, EACH)
    lowest = worth.argsort(1)[:, : EACH - CUTS[3]].sort(1).values
    pruned = [np.flatnonzero(row == 3).tolist() for row in halving.pruned_after.reshape(-1, EACH)]
    assert pruned == lowest.tolist()


def test_candidates_of_a_control_are_never_pruned(denoiser, tiny_pipeline):
    config = config_for(tiny_pipeline)
    _, free, _ = sampled(denoiser, config, PROMPTS, 64)
    carried = free.pruned_after == 3
    _, halving, _ = sampled(denoiser, config, PROMPTS, 64, carried)
    assert halving.pruned_after.tolist() == free.pruned_after.tolist()
    assert halving.finished.tolist() == ((free.pruned_after == 0) | carried).tolist()


def test_even_batches_have_almost_equal_size():
    sizes = [len(batch) for batch in even_batches(torch.arange(401), 64)]
    assert sum(sizes) == 401
    assert len(sizes) == 7
    assert max(sizes) - min(sizes) == 1
    assert [len(batch) for batch in even_batches(torch.arange(3), 64)] == [3]


# ------------------------------------------------------------------------------------------ the rows
def test_pruned_candidates_rank_last():
    columns = {
        "candidate_index": list(range(5)),
        "prompt_id": ["p"] * 5,
        "score_pmi": [0.1, None, 0.2, None, None],
        "pruned_after": [None, 3, None, 6, 3],
        "prune_score": [5.0, 9.0, 6.0, -7.0, 8.0],
    }
    assert ranks(columns, "pmi", 0) == [1, 3, 0, 2, 4]


def test_pruned_candidates_have_rows(tiny_pipeline, tmp_path):
    config = config_for(tiny_pipeline, generate={"candidates_per_prompt": EACH, "alignment": "oracle"})
    previews = [prompt_id(PROMPTS[0])]
    actor = CandidateGenerator(
        config.model_dump(mode="json"), 0, str(tmp_path), None, ["pmi_contrastive", "random"], previews, PROMPTS
    )
    nothing = [None] * len(PROMPTS)
    shard = Shard(0, "part-00000.parquet", [prompt_id(p) for p in PROMPTS], PROMPTS, nothing, nothing)
    rows = pa.Table.from_pylist(actor._rows(shard, [0, 1, 2], Work()), schema=actor.write.schema).to_pylist()
    assert len(rows) == len(PROMPTS) * EACH
    for prompt in PROMPTS:
        of_prompt = sorted((row for row in rows if row["prompt"] == prompt), key=lambda row: row["rank"])
        assert [row["rank"] for row in of_prompt] == list(range(EACH))
        assert [row["pruned_after"] for row in of_prompt] == [None, None, 6, 6, 3, 3]
        assert [row["kept"] for row in of_prompt] == [True] + [False] * (EACH - 1)
        random = np.argmin(
            ranks({"candidate_index": range(EACH), "prompt_id": [prompt_id(prompt)] * EACH}, "random", 0)
        )
        for row in of_prompt:
            carried = row["candidate_index"] == random
            done = STEPS if row["pruned_after"] is None or carried else row["pruned_after"]
            assert len(row["delta_sq"]) == len(row["cross"]) == done
            assert np.isfinite(row["delta_sq"]).all()
            assert (row["latents"] is not None) == (row["kept"] or carried)
            assert (row["score_mitune"] is None) == (done < STEPS)
            assert (row["exact"] is None) == (done < STEPS)
            assert np.isfinite(row["prune_score"])
            assert row["error"] is None
