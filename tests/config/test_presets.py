"""The presets of known models: valid, with a source on each line, and with the values of the stock pipelines."""

import inspect
from pathlib import Path

import diffusers
import pytest
from tiny_families import CASES

from mi_ray.config import RunConfig
from mi_ray.config.command_line import load_config
from mi_ray.diffusion.adapters import target_faults
from mi_ray.diffusion.families import FAMILIES

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
PRESETS = {
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
    "paper-sd21": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd35-medium": "StableDiffusion3Pipeline",
    "flux2-klein": "Flux2KleinPipeline",
    "qwen-image": "QwenImagePipeline",
    "z-image": "ZImagePipeline",
}


def load(name: str) -> RunConfig:
    flags = ["--config", str(CONFIGS / f"{name}.yaml"), "--prompts.file", "p.txt", "--run-dir", "run"]
    return load_config(flags)[0]


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_has_its_source(name):
    load(name)
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if line and not line.startswith("#") and not line.endswith(":")]
    assert len(values) > 15
    assert [line for line in values if " # " not in line] == []
    marks = {mark for mark in ("code", "paper", "pipeline", "example") if any(f"# [{mark}]" in line for line in values)}
    assert [mark for mark in marks if not any(line.startswith(f"#   [{mark}] ") for line in lines)] == []


@pytest.mark.parametrize("name", PRESETS)
def test_targets_are_layers_and_scores_those_of_the_family(name):
    config, family = load(name), FAMILIES[PRESETS[name]]
    network = getattr(CASES[PRESETS[name]].build(), family.network)
    assert target_faults(network, config.finetune.target_modules) == []
    assert config.score.names == (("rfmi",) if family.flow else ("mitune",))


@pytest.mark.parametrize("name", [name for name, pipeline in PRESETS.items() if FAMILIES[pipeline].flow])
def test_flows_are_sampled_as_their_pipelines_do(name):
    parameters = inspect.signature(getattr(diffusers, PRESETS[name]).__call__).parameters
    guidance = parameters["true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"].default
    for sampler in (load(name).sampler, load(name).evaluation.sampler):
        assert sampler.num_inference_steps == parameters["num_inference_steps"].default
        assert sampler.guidance_scale == guidance + (name == "z-image")  # it writes the scale as w - 1


def test_the_paper_s_experiment_is_that_of_its_model():
    paper, model = load("paper-sd21"), load("sd21")
    for section in ("model", "sampler", "generate", "score", "select", "finetune"):
        assert getattr(paper, section) == getattr(model, section)
    assert (model.sampler, model.finetune) == (
        RunConfig.model_fields["sampler"].default,
        RunConfig.model_fields["finetune"].default,
    )
