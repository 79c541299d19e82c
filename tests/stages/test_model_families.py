"""The stages of a run on a tiny model of each family: the checks, then candidates with all scores; and a whole run."""

import io
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_generate import PROMPTS, shard_batch
from tiny_families import CASES, stable_diffusion_3

from mi_ray import storage
from mi_ray.config import FLOW_SCORES, RunConfig
from mi_ray.config.command_line import load_config
from mi_ray.diffusion.families import FAMILIES
from mi_ray.stages.generate import CandidateGenerator
from mi_ray.stages.pipeline import Plan

ROOT = Path(__file__).parents[2]
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


@pytest.mark.ray
@pytest.mark.slow
def test_a_whole_run_of_a_flow_model_ends_with_an_adapter_for_its_stock_pipeline(tmp_path):
    """Stable Diffusion 3 from the command line: generate, score, select, fine-tune, evaluate, report; then rescore."""
    torch.manual_seed(0)
    model, run, settings = tmp_path / "model", tmp_path / "run", tmp_path / "settings.yaml"
    stable_diffusion_3().save_pretrained(model)
    settings.write_text(
        f"model: {{path: {model}, height: 64, width: 64}}\n"
        "score: {names: [rfmi, pmi_contrastive], num_samples: 2}\n"
        "sampler: {solver: ddim}\n"
        "finetune: {learning_rate: 0.1}\n"
        "evaluation: {sampler: {solver: ddim}}\n"
    )
    environment = os.environ | {"RAY_ADDRESS": "local"}
    command = [sys.executable, "jobs/pipeline.py", *SMOKE, "--config", str(settings), "--run-dir", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tuned − base" in done.stdout

    row = storage.read_tables(str(run / "evaluation/tuned")).to_pandas().iloc[0]
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(int(row["seed"])))
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "np"}
    base = pipe(row["prompt"], latents=latents, **call).images[0]
    pipe.load_lora_weights(run / "round-0/adapter", weight_name="pytorch_lora_weights.safetensors")
    tuned = pipe(row["prompt"], latents=latents, **call).images[0]
    found = np.array(Image.open(io.BytesIO(row["image"]["bytes"])))
    assert np.abs(found - 255 * tuned).max() <= 1
    assert np.abs(255 * (tuned - base)).max() > 5

    scores = ["--score.names", "rfmi,rfmi_guided,flow_difference"]
    command = [sys.executable, "jobs/rescore.py", "--run-dir", str(run), *scores]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    again = storage.read_tables(str(run / "rescored/round-0")).to_pandas().set_index(["prompt_id", "candidate_index"])
    first = storage.read_tables(str(run / "round-0/candidates")).to_pandas().set_index(["prompt_id", "candidate_index"])
    np.testing.assert_allclose(again["score_rfmi"], first.loc[again.index, "score_rfmi"], rtol=1e-5)
    assert again["score_flow_difference"].gt(0).all()
