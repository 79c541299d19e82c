"""A small online run for tests: its config, prompts, policies and actor, and a board without Ray."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mi_ray.config import RunConfig
from mi_ray.diffusion.adapters import adapter_state, attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.prompts import PROMPTS, prompt_id
from mi_ray.inputs.shard_plan import write_prompts
from mi_ray.stages import online as stage
from mi_ray.training.board import Meeting

COLORS, SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "star")
UPDATES, INNER = 4, 2


class FakeBoard:
    """The board without Ray, in a thread."""

    def __init__(self, keep: int = 2):
        self.meeting, self.loop = Meeting(keep), asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def __getattr__(self, name: str):
        return lambda *arguments: asyncio.run_coroutine_threadsafe(
            getattr(self.meeting, name)(*arguments), self.loop
        ).result(300)

    def publish(self, version: int, policy: dict[str, torch.Tensor]):
        copied = {name: values.clone() for name, values in policy.items()}
        asyncio.run_coroutine_threadsafe(self.meeting.publish(version, copied), self.loop).result(300)


def run_config(model: Path, run_dir: Path, **settings: dict) -> RunConfig:
    online = {"updates": UPDATES, "prompts_per_update": 4, "inner_steps": INNER, "validate_every": 2}
    online |= {"validation_prompts": 2, "validation_candidates": 2, "noise_levels": 2, "held_share": 0.3}
    finetune = {"method": "nft", "rank": 2, "alpha": 2, "learning_rate": 1e-3, "batch_size": 6}
    finetune |= {"log_to": []}
    given = {
        "run_dir": str(run_dir),
        "prompts": {"file": "unused"},
        "model": {"path": str(model)},
        "sampler": {"solver": "ddpm", "num_inference_steps": 3, "guidance_scale": 2.0},
        "generate": {"candidates_per_prompt": 3, "prompts_per_shard": 2},
        "score": {"names": ["mitune"]},
        "select": {"by": "mitune"},
        "finetune": finetune | settings.pop("finetune", {}),
        "online": online | settings.pop("online", {}),
        "resources": {"num_actors": (2, 2), "train_cpus": 1, "batch_size": 4} | settings.pop("resources", {}),
    }
    assert not settings
    return RunConfig.model_validate(given)


def stored_prompts(folder: Path) -> str:
    prompts = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    uri = str(folder / "prompts.parquet")
    rows = [{"prompt_id": prompt_id(prompt), "prompt": prompt} for prompt in prompts]
    write_prompts(uri, [pa.RecordBatch.from_pylist(rows, PROMPTS)])
    return uri


def some_policy(config: RunConfig, seed: int) -> dict[str, torch.Tensor]:
    """An adapter in which all weights differ from their initial values."""
    tuning, unet = config.finetune, load_denoiser(config.model.path).network
    targets, dora = tuning.target_modules, tuning.adapter == "dora"
    model = attach_adapter(unet, rank=tuning.rank, alpha=tuning.alpha, target_modules=targets, use_dora=dora)
    return moved(adapter_state(model), seed)


def moved(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: values + 0.1 * torch.randn(values.shape, generator=generator) for name, values in state.items()}


def batch_of(row: dict) -> dict[str, np.ndarray]:
    return {name: np.array([value]) for name, value in row.items()}


def generator_of(config: RunConfig, source: str, folder: Path, board: FakeBoard) -> stage.OnlineGenerator:
    return stage.OnlineGenerator(config.model_dump(mode="json"), source, str(folder), board)
