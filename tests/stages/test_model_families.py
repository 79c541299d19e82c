"""The stages of a run on a tiny model of each family: the checks, then candidates with all scores; and a whole run."""

import io
import runpy
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_generate import PROMPTS, shard_batch
from tiny_families import CASES

from mi_ray import storage
from mi_ray.config import FLOW_SCORES, RunConfig
from mi_ray.config.command_line import load_config
from mi_ray.diffusion.adapter_files import COMFYUI, WEIGHTS, save_adapter
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.families import FAMILIES
from mi_ray.diffusion.folders import load_sizes, part_config
from mi_ray.stages.generate import CandidateGenerator
from mi_ray.stages.pipeline import Plan

ROOT = Path(__file__).parents[2]
SMOKE = ["--config", "jobs/configs/shapes-smoke.yaml"]
SHORT = ("StableDiffusion3Pipeline",)  # in every test run


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


# ---------------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def ray():
    """One Ray for all runs of this file."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def job(monkeypatch, capsys, ray):
    """Runs a job of the command line in this process. Returns what it prints."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(f"jobs/{name}.py", run_name="__main__")
        return capsys.readouterr().out

    return run


def save_model(name: str, folder: Path) -> list[str]:
    """A tiny model of the family. Returns the arguments of a short run with it."""
    torch.manual_seed(0)
    case, model, settings = CASES[name], folder / "model", folder / "settings.yaml"
    pipeline = case.build()
    with torch.no_grad():  # layers that start at zero would hide what goes into them
        for parameter in getattr(pipeline, FAMILIES[name].network).parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    pipeline.save_pretrained(model)
    own = "rfmi" if FAMILIES[name].flow else "mitune"
    settings.write_text(
        f"model: {{path: {model}, height: {case.size}, width: {case.size}}}\n"
        "prompts: {limit: 2}\n"
        f"sampler: &sampler {{solver: {case.solver}, num_inference_steps: 4}}\n"
        "generate: {candidates_per_prompt: 2, preview_prompts: 1, alignment: []}\n"
        f"score: {{names: [{own}, pmi_contrastive], neighbours: 1}}\n"
        "finetune: {learning_rate: 0.1, rank: 2, alpha: 4, steps: 2, batch_size: 2}\n"
        "evaluation: {limit: 1, images_per_prompt: 2, alignment: [], sampler: *sampler}\n"
    )
    return [*SMOKE, "--config", str(settings)]


def evaluated(run: Path, model: str) -> np.ndarray:
    """The two images of the evaluation, (2, height, width, 3)."""
    rows = storage.read_tables(str(run / "evaluation" / model)).to_pandas()
    return np.stack([np.array(Image.open(io.BytesIO(image["bytes"]))).astype(float) for image in rows["image"]])


def of_stock(name: str, folder: Path, run: Path) -> np.ndarray:
    """The images that the stock pipeline of a folder makes of the same prompt and seeds."""
    case, rows = CASES[name], storage.read_tables(str(run / "evaluation/base")).to_pandas()
    channels = FAMILIES[name].channels(part_config(str(folder), FAMILIES[name].network))
    shape = (1, channels, *load_sizes(str(folder)).latent((case.size, case.size)))
    latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in rows["seed"]])
    pipe = getattr(diffusers, name).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": case.size, "width": case.size, "num_inference_steps": 4, "output_type": "np"}
    settings |= case.settings | case.call(3.0)
    return 255 * pipe(list(rows["prompt"]), latents=(case.given or case.packed)(latents), **settings).images


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in CASES])
def test_a_whole_run_from_the_command_line(name, job, tmp_path):
    """Generate, score, select, fine-tune, evaluate, report; then export and rescore. The stock pipeline makes the same
    images."""
    run, out = tmp_path / "run", tmp_path / "exported"
    printed = job("pipeline", *save_model(name, tmp_path), "--run-dir", run)
    assert "tuned − base" in printed
    assert (run / "report/index.html").exists()
    base, tuned = evaluated(run, "base"), evaluated(run, "tuned")
    assert np.abs(base - of_stock(name, tmp_path / "model", run)).max() <= 1
    job("export", "--run-dir", run, "--out", out)
    assert np.abs(tuned - of_stock(name, out, run)).max() <= 1
    assert np.abs(tuned - base).max() > 5
    card = (out / "README.md").read_text()
    assert f"diffusers.{name}.from_pretrained" in card
    assert str(tmp_path) not in card
    assert (out / "adapter/comfyui.safetensors").exists() == (run / "round-0/adapter/comfyui.safetensors").exists()

    own = FLOW_SCORES if FAMILIES[name].flow else ("mitune", "mitune_eq2")
    job("rescore", "--run-dir", run, "--score.names", ",".join(own))
    first, again = (
        storage.read_tables(str(run / folder)).to_pandas().set_index(["prompt_id", "candidate_index"])
        for folder in ("round-0/candidates", "rescored/round-0")
    )
    np.testing.assert_allclose(again[f"score_{own[0]}"], first.loc[again.index, f"score_{own[0]}"], rtol=1e-5)
    assert again[f"score_{own[-1]}"].gt(0).all()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("updates", [0, 1])
def test_a_run_starts_from_a_users_adapter(updates, job, tmp_path):
    """Rounds and online: the model with the adapter is evaluated as base, and the adapter is trained further."""
    name = "StableDiffusion3Pipeline"
    arguments = save_model(name, tmp_path)
    network = load_denoiser(str(tmp_path / "model"), device="cpu").network
    model = attach_adapter(network, rank=3, alpha=6, target_modules=("to_q", "to_v"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "mine", "some/model")
    run = tmp_path / "run"
    online = ["--online.updates", 1, "--online.inner-steps", 1, "--online.prompts-per-update", 4] if updates else []
    online += ["--online.validation-prompts", 4, "--prompts.limit", 8, "--finetune.method", "nft"] if updates else []
    online += ["--score.names", "rfmi", "--select.by", "rfmi"] if updates else []
    job(
        "pipeline",
        *arguments,
        *online,
        *("--run-dir", run, "--finetune.start-from", tmp_path / "mine" / COMFYUI, "--finetune.learning-rate", 1e-9),
    )
    adapter = run / ("online" if updates else "round-0") / "adapter"
    first, last = (load_file(folder / WEIGHTS) for folder in (run / "start", adapter))
    assert first.keys() == last.keys()
    for layer, value in first.items():
        torch.testing.assert_close(last[layer], value, atol=1e-6, rtol=1e-5)
    assert np.abs(evaluated(run, "base") - evaluated(run, "tuned")).max() <= 1
    plain = of_stock(name, tmp_path / "model", run)
    assert np.abs(evaluated(run, "base") - plain).max() > 5
