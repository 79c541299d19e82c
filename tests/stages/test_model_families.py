"""The stages of a run on a tiny model of each family, without Ray: the checks, then candidates with all scores."""

import numpy as np
import pytest
import torch
from test_generate import PROMPTS, shard_batch
from tiny_families import CASES

from mi_ray import storage
from mi_ray.config import FLOW_SCORES, RunConfig
from mi_ray.config.command_line import load_config
from mi_ray.diffusion.families import FAMILIES
from mi_ray.stages.generate import CandidateGenerator
from mi_ray.stages.pipeline import Plan

SMOKE = ["--config", "jobs/configs/shapes-smoke.yaml"]


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_planned_and_its_candidates_are_drawn_and_scored(name, tmp_path):
    torch.manual_seed(0)
    model, case = tmp_path / "model", CASES[name]
    case.build().save_pretrained(model)
    own = FLOW_SCORES if FAMILIES[name].flow else ("mitune", "mitune_eq2")
    scores = [*own, "asd", "trajectory_banded", "pmi", "pmi_orthogonal", "pmi_contrastive", "pmi_negatives"]
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"model: {{path: {model}, height: {case.size}, width: {case.size}}}\n"
        f"score: {{names: [{', '.join(scores)}], banded: {own[0]}, log_snr_max: 2, num_samples: 2}}\n"
        "sampler: {num_inference_steps: 4}\n"
    )
    plan = Plan(load_config([*SMOKE, "--config", str(settings), "--run-dir", str(tmp_path / "run")])[0])
    config: RunConfig = plan.config
    generate = CandidateGenerator(
        config.model_dump(mode="json"), 0, str(tmp_path), None, ["pmi_contrastive"], [], PROMPTS
    )
    generate(shard_batch(PROMPTS[:2], tmp_path))
    rows = storage.read_tables(str(tmp_path)).to_pandas()
    each = config.generate.candidates_per_prompt
    assert len(rows) == 2 * each
    assert rows["error"].isna().all()
    assert rows.groupby("prompt_id")["kept"].sum().tolist() == [1, 1]
    assert rows["image"].notna().sum() == 2
    found = rows[[f"score_{score}" for score in scores]].to_numpy()
    assert np.isfinite(found).all()
    assert (found.std(0) > 0).all()
