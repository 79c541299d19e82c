"""The methods of benchmarks/alignment.py: arms, the settings that are tried, trainings, cost, effective guidance."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from gates import ROOT
from guidance import finished_run

from mi_ray import storage
from mi_ray.config import MethodName, RunConfig, SamplerConfig
from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import PipelineDenoiser
from mi_ray.runs.cost import evaluations
from mi_ray.runs.layout import SUMMARY
from mi_ray.scoring.sampler import Sampler

BASE = "base"
BEST_OF = {
    "best-of-4": {"candidates": 4, "by": "pmi_negatives"},
    "best-of-8, pruned": {
        "candidates": 8,
        "by": "pmi_negatives",
        "prune": {"by": "pmi_negatives", "after": [0.25], "keep": [0.25], "num_samples": 3},
    },
}
# At most three settings per method, so that every method has the same budget for its choice. The first is the published
# one. `structured` has no setting, and the one of `cfg-zero-star` concerns flow models only.
TRIED_SETTINGS = {
    "attend-and-excite": ({}, {"step_size": 5.0}, {"step_size": 10.0}),
    "semantic": ({}, {"rate_max": 1.5}, {"rate_max": 2.0}),
    "perturbed-attention": ({}, {"perturbed_scale": 0.5}, {"perturbed_scale": 1.0}),
    "contrastive": ({}, {"contrastive_scale": 0.5}, {"contrastive_scale": 2.0}),
}
TRIED_RATES = (1.0, 1 / 3, 3.0)  # factors of finetune.learning_rate
# The paper's selection and loss, for `rounds_config`: the best image of each prompt by its own score.
MI_TUNE = (
    "--score.names mitune --select.by mitune --select.top-k 1 --select.min-score none --select.balance false"
    " --finetune.baseline 0"
)
ROUNDS = ("supervised", "mi-tune")  # methods with rounds; the others are online
TrainedMethod = MethodName | Literal["mi-tune"]
PROBED_STEPS = 4


@dataclass(frozen=True)
class Arm:
    """A model and a sampler. The arms of one method that differ in the training seed only are one row."""

    name: str
    settings: SamplerConfig
    adapter: str | None = None  # local folder; None: the base model
    seed: int | None = None  # of the training
    variant: str = ""  # settings that differ from the published ones or from the config
    run_dir: str | None = None  # of the training

    @property
    def key(self) -> str:
        """Name of its folder."""
        of_seed = "" if self.seed is None else f"-seed-{self.seed}"
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.name}{variant}{of_seed}-at-{self.settings.guidance_scale:g}".replace(", ", "-").replace(" ", "-")

    def at(self, scale: float) -> "Arm":
        """The same at another guidance scale."""
        settings = self.settings.model_copy(update={"guidance_scale": scale})
        return replace(self, settings=settings)


def guidance_arms(method: str, sampler: SamplerConfig, tried: bool) -> list[Arm]:
    """A method with its published settings, and if `tried` with the others to choose from."""
    arms = []
    for settings in TRIED_SETTINGS.get(method, ({},)) if tried else ({},):
        own = sampler.model_dump() | {"guidance_method": method, "guidance_settings": settings}
        variant = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        arms.append(Arm(method, SamplerConfig.model_validate(own), variant=variant))
    return arms


def best_of_arms(sampler: SamplerConfig) -> list[Arm]:
    own = sampler.model_dump()
    return [Arm(name, SamplerConfig.model_validate(own | {"best_of": best})) for name, best in BEST_OF.items()]


def rate_flags(factor: float, learning_rate: float) -> tuple[str, list[str]]:
    """The variant's name and the flags of a training with a multiple of its config's learning rate."""
    if factor == 1:
        return "", []
    return f"learning rate {factor * learning_rate:.1g}", ["--finetune.learning-rate", str(factor * learning_rate)]


@dataclass(frozen=True)
class Training:
    """A run of jobs/finetune.py."""

    run_dir: str
    config: Path
    flags: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        return ["--config", str(self.config), "--run-dir", self.run_dir, *self.flags]

    def settings(self) -> RunConfig:
        """The settings of the run.

        Raises:
            ValueError: with all faults of the config and the flags.
        """
        try:
            return load_config(self.arguments)[0]
        except ConfigError as error:
            raise ValueError("\n".join(f"{Path(self.run_dir).name}: {fault}" for fault in error.faults)) from error

    def run(self) -> str:
        """Run the job up to its end, unless the run is finished. Returns the adapter's local folder.

        Raises:
            ValueError: the training failed, or the folder has a run with other settings.
        """
        try:
            found, adapters = finished_run(self.run_dir)
        except ValueError:
            done = subprocess.run([sys.executable, "jobs/finetune.py", *self.arguments], cwd=ROOT)
            if done.returncode:
                raise ValueError(f"the training {self.run_dir} ended with exit status {done.returncode}") from None
            found, adapters = finished_run(self.run_dir)
        if found.hash() != self.settings().hash():
            raise ValueError(f"--run-dir: {self.run_dir} has a training with other settings; give another folder")
        return adapters["tuned"]


def training_cost(run_dir: str) -> dict[str, float]:
    """Denoiser evaluations of a training with its candidates and scores, and the wall time of its stages in minutes. A
    training pass counts as in `runs.cost`. A training that has stopped itself counts up to there."""
    config, adapters = finished_run(run_dir)
    spent, minutes = evaluations(config, 0, 0)["finetune"], 0.0
    if config.online.updates:
        done = storage.read_json(storage.join(adapters["tuned"], SUMMARY))["steps"]
        spent = round(spent * done / (config.online.updates * config.online.inner_steps))
    for event in storage.iter_lines(storage.join(run_dir, "events.jsonl")):
        if event.get("stage", "evaluate").startswith("evaluate"):
            continue
        if event["event"] == "shard_written":
            spent += event["denoiser_evaluations"] + event["score_evaluations"]
        elif event["event"] == "stage_finished":
            minutes += event["seconds"] / 60
    return {"training_evaluations": spent, "training_minutes": minutes}


@torch.no_grad()
def effective_guidance(
    arm: Arm, model: PipelineDenoiser, base: PipelineDenoiser, images: pd.DataFrame, batch_size: int
) -> float:
    """The effective guidance of an arm relative to its guidance scale, on noised images of the base model.

    gamma = <(g - u) / w, c - u> / ||c - u||^2, summed over images and noise levels: g is the prediction that the solver
    follows, and c and u are the base model's predictions. Of a fine-tuned model g = u + w (its prediction - u).
    Best-of-N has 1, and Attend-and-Excite too, which changes the latents and not the prediction.

    Args:
        model: the model that samples.
        images: columns prompt and latents, one row per image.
    """
    settings, scale = arm.settings, arm.settings.guidance_scale
    if settings.guidance_method in (None, "attend-and-excite") and arm.adapter is None:
        return 1.0
    sampler, prompts = Sampler(model, settings, batch_size), images["prompt"].tolist()
    conditioning = base.encode_prompts(prompts)
    guide = sampler.guide_of(prompts, conditioning) if sampler.guide_of else None
    clean = torch.from_numpy(np.stack(images["latents"])).view(-1, *base.latent_shape).to(base.device)
    generator, along, squared = torch.Generator().manual_seed(0), 0.0, 0.0
    for step in np.linspace(0, len(sampler.plan.timesteps) - 1, PROBED_STEPS + 2)[1:-1].round().astype(int):
        alpha, sigma = sampler.plan.coefficients[step, 4:].tolist()
        x_t = alpha * clean + sigma * torch.randn(clean.shape, generator=generator).to(clean.device)
        level = sampler.plan.timesteps[step].to(base.device).expand(len(x_t))
        c = base.predict(x_t, level, conditioning).float()
        u = base.predict(x_t, level, sampler.null.expand(len(x_t))).float()
        if guide:
            own, null = guide.predictions(int(step), x_t)
            followed = guide.combined(int(step), null + scale * (own - null), own, null).float()
        else:
            followed = u + scale * (model.predict(x_t, level, conditioning).float() - u)
        along += ((followed - u) / scale * (c - u)).sum().item()
        squared += (c - u).square().sum().item()
    return along / squared
