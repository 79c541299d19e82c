"""The actors and training workers of benchmarks/throughput.py, as in the stages. Each has a part of the work. On a CPU
each runs in a separate process.
"""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Literal
from unittest.mock import patch

import pyarrow as pa
import torch
from gates import Benchmark, LocalPath
from pydantic import Field, PositiveInt

from mi_ray import storage
from mi_ray.config import FinetuneConfig, ModelConfig, PruneConfig, RunConfig, SamplerConfig
from mi_ray.config.command_line import load_config
from mi_ray.config.paths import ModelPath
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.inputs.prompts import prompt_id
from mi_ray.inputs.shard_plan import Shard
from mi_ray.scoring.machine import keep_memory, usable_cores
from mi_ray.scoring.work import Work
from mi_ray.stages.generate import CandidateGenerator
from mi_ray.storage import tables
from mi_ray.training.losses import Objective
from mi_ray.training.optimization import optimizer_step
from mi_ray.training.training_set import TrainingSet, draw_microbatch

PROMPTS = Path(__file__).parent.parent / "jobs" / "configs" / "prompts" / "shapes-train.jsonl"
DEMO, _ = load_config(["--config", str(PROMPTS.parents[1] / "shapes-paper.yaml")])
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
OURS = ("scored", "unscored", "bare denoiser")
STAGE = "stage, with decoding and Parquet"
PRUNED, PAPER = "stage, pruned, 20 steps", "naive score at the paper's 100 steps of DDPM"
CUT = PruneConfig(by="pmi_negatives", after=(0.2,), keep=(0.25,), num_samples=1)
CUT_SCORE = DEMO.score.model_copy(update={"names": ("pmi_negatives",)})


class ThroughputSettings(Benchmark):
    """The settings of the throughput benchmark."""

    model: ModelPath = Field("shapes", description="the embedded model (shapes) or a diffusers folder")
    architecture: str | None = Field(
        None,
        description="sd15, sdxl or sd35-medium: this architecture with random weights, at its own image size, or a"
        " diffusers folder; ours and stock diffusers, both eager and both with compiled blocks; none: `model`",
    )
    dtype: str = Field("auto", description="float32, float16 or bfloat16; auto: as model.dtype")
    channels_last: bool = Field(True, description="memory layout of our UNet only, as `model.channels_last`")
    compile: Literal["default", "cuda-graphs"] | None = Field(None, description="for our UNet, as `model.compile`")
    actors: PositiveInt = Field(
        1 if torch.cuda.is_available() else usable_cores(),
        description="number of our processes, which share work and cores",
    )
    prompts: PositiveInt = Field(8, description="number of prompts")
    candidates: PositiveInt = Field(16, description="number of candidates per prompt")
    sampler: SamplerConfig = SamplerConfig(solver="dpm++2m", num_inference_steps=20, guidance_scale=5.0)
    batch_size: PositiveInt = Field(64, description="number of candidates in one denoiser batch of ours")
    sweep: tuple[PositiveInt, ...] = Field((1, 4, 16, 64, 128), description="batch sizes of the bare denoiser")
    training_batch: PositiveInt = Field(16, description="rows per fine-tuning batch")
    training_steps: PositiveInt = Field(10, description="number of optimiser steps per fine-tuning measurement")
    repeats: PositiveInt = Field(3, description="number of measurements of each implementation")
    figure: LocalPath | None = Field(
        None, description="PNG file to write: candidates per second, and the batch-size sweep"
    )


# ---------------------------------------------------------------------------------------------- measuring
@dataclass
class Inside:
    seconds: float = 0.0


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def inside(holder: object, call: str) -> Iterator[Inside]:
    """Context that measures the time inside a method of an object."""
    spent, method = Inside(), getattr(holder, call)

    def timed(*arguments, **keywords):
        synchronise()
        began = time.perf_counter()
        result = method(*arguments, **keywords)
        synchronise()
        spent.seconds += time.perf_counter() - began
        return result

    with patch.object(holder, call, timed):
        yield spent


def share_inside(run: Callable[[], object], holder: object, call: str) -> float:
    """Share of the wall time of one run that is spent inside a method of an object."""
    with inside(holder, call) as spent:
        began = time.perf_counter()
        run()
        synchronise()
        return spent.seconds / (time.perf_counter() - began)


def peak_memory_gib() -> float:
    """Peak memory since the start: of the GPU, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------------------------------------- the workers
class Actor:
    """One of our generating actors with its share of the prompts. Each implementation is one method."""

    def __init__(self, settings: ThroughputSettings, prompts: list[str], seeds: list[list[int]]):
        threads = max(1, usable_cores() // settings.actors)
        torch.set_num_threads(threads)
        keep_memory()
        self._folder = tempfile.TemporaryDirectory()
        model = ModelConfig(
            path=settings.model, dtype=settings.dtype, channels_last=settings.channels_last, compile=settings.compile
        )
        self.config = RunConfig.model_validate(
            {
                "run_dir": self._folder.name,
                "prompts": {"file": str(PROMPTS)},
                "model": model.model_dump(),
                "sampler": settings.sampler.model_dump(),
                "score": {"names": ["mitune"]},
                "generate": {"candidates_per_prompt": max(2, settings.candidates)},
                "resources": {
                    "batch_size": settings.batch_size,
                    "cpus_per_actor": threads,
                    "gpus_per_actor": float(torch.cuda.is_available()),
                },
            }
        )
        self.generator = self._generator(prompts)
        self.denoiser, self.sampler = self.generator.denoiser, self.generator.sampler
        self.prompts, self.seeds, self.pool = prompts, seeds, sum(map(len, seeds))
        self.conditioning = self.denoiser.encode_prompts(prompts)
        self.batch = min(2 * settings.batch_size, 2 * self.pool)
        self.ways = {
            "scored": self.scored,
            "unscored": self.unscored,
            "bare denoiser": self.bare,
            STAGE: lambda: self.stage(self.generator),
            PRUNED: lambda: self.stage(self._pruned),
        }

    def _generator(self, prompts: list[str], **changes) -> CandidateGenerator:
        config = self.config.model_copy(update=changes).model_dump(mode="json")
        return CandidateGenerator(config, 0, self._folder.name, None, [config["select"]["by"]], [], prompts)

    @cached_property
    def _pruned(self) -> CandidateGenerator:
        """A generator with the cheapest settings that benchmarks/pruning.py found as good as the paper's setting."""
        sampler = self.config.sampler.model_copy(update={"solver": "dpm++2m-sde", "num_inference_steps": 20})
        select = self.config.select.model_copy(update={"by": CUT.by})
        return self._generator(self.prompts, sampler=sampler, prune=CUT, score=CUT_SCORE, select=select)

    def run(self, way: str):
        self.ways[way]()
        synchronise()

    def denoiser_share(self, way: str) -> tuple[float, float]:
        """Share of an implementation's wall time that is spent in the denoiser; and the peak memory so far, in GiB."""
        generator = self._pruned if way == PRUNED else self.generator
        return share_inside(self.ways[way], generator.denoiser, "predict"), peak_memory_gib()

    def scored(self):
        sampled = self.sampler(self.conditioning, self.seeds, Work())
        owner = torch.arange(len(self.prompts)).repeat_interleave(torch.tensor([len(s) for s in self.seeds]))
        self.generator.scorer(self.prompts, self.conditioning, owner, sampled, Work())

    def unscored(self):
        """Sampling without statistics, with the PyTorch step: the fused step always computes them."""
        with patch("mi_ray.diffusion.kernels._record"), patch.object(self.sampler, "kernel", "eager"):
            self.sampler(self.conditioning, self.seeds, Work())

    @torch.no_grad()
    def bare(self):
        """The same number of denoiser evaluations, and nothing else."""
        evaluations = 2 * self.pool * self.config.sampler.num_inference_steps
        bare_calls(self.denoiser, self.conditioning, self.batch, -(-evaluations // self.batch))

    def stage(self, generator: CandidateGenerator):
        """The complete processing of a shard, including its Parquet file."""
        ids, nothing = [prompt_id(p) for p in self.prompts], [None] * len(self.prompts)
        shard = Shard(0, "part-00000.parquet", ids, self.prompts, nothing, nothing)
        rows = generator._rows(shard, list(range(len(self.prompts))), Work())
        table = pa.Table.from_pylist(rows, schema=tables.candidates_schema(generator.config.score.names))
        storage.write_table(storage.join(self._folder.name, shard.name), table)


@torch.no_grad()
def bare_calls(denoiser: Denoiser, conditioning: Conditioning, batch: int, count: int):
    x_t = torch.randn(batch, *denoiser.latent_shape, device=denoiser.device)
    timesteps = torch.full((batch,), 500, device=denoiser.device)
    conditioning = conditioning.rows(slice(1)).expand(batch)
    for _ in range(count):
        denoiser.predict(x_t, timesteps, conditioning)


class Trainer:
    """One of our training workers: `training_steps` optimiser steps, as in the stage."""

    def __init__(self, settings: ThroughputSettings, data: TrainingSet, checkpointing: bool):
        keep_memory()
        self.steps, rows = settings.training_steps, settings.training_batch
        denoiser = load_denoiser(settings.model, settings.dtype)
        denoiser.specialise(channels_last=settings.channels_last, compiled=None, rows=())
        model = attach_adapter(denoiser.network, rank=16, alpha=16, target_modules=TARGETS)
        if checkpointing:
            denoiser.network.enable_gradient_checkpointing()
        self.objective = Objective(model, denoiser.schedule, FinetuneConfig(), half_of(denoiser))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(denoiser.device.type, enabled=half_of(denoiser) == torch.float16)

        def draw(step: int):
            batch = draw_microbatch(data, 0, step, rows, range(len(self.objective.alpha)), 0.0)
            return batch.to(denoiser.device)

        self.draw = draw

    def run(self):
        for step in range(self.steps):
            microbatch = [(lambda step=step: self.draw(step), 1.0)]
            loss, _ = optimizer_step(self.objective, microbatch, self.parameters, self.optimizer, self.scaler, 1.0)
            loss.item()


_worker: Actor | Trainer | None = None  # the worker of this process, if it has one


def _begin(kind: type, *arguments):
    global _worker
    _worker = kind(*arguments)


def _call(method: str, *arguments):
    return getattr(_worker, method)(*arguments)


class Workers:
    """A group of workers: on a CPU each in its own process, on a GPU all in this process.

    A call runs in all workers and returns when all are done.
    """

    def __init__(self, kind: type, shares: list[tuple]):
        apart = not torch.cuda.is_available()
        self._here = [] if apart else [kind(*share) for share in shares]
        context = multiprocessing.get_context("spawn")
        self._executors = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(kind, *share))
            for share in (shares if apart else ())
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for executor in self._executors:
            executor.shutdown()

    def __call__(self, method: str, *arguments) -> list:
        futures = [executor.submit(_call, method, *arguments) for executor in self._executors]
        return [getattr(worker, method)(*arguments) for worker in self._here] + [f.result() for f in futures]


def denoiser_shares(actors: Workers, way: str) -> tuple[float, float]:
    """The mean share of wall time in the denoiser, and the total memory of all workers, in GiB."""
    shares, memory = zip(*actors("denoiser_share", way), strict=True)
    return mean(shares), sum(memory)


def half_of(denoiser: Denoiser) -> torch.dtype | None:
    return None if denoiser.dtype == torch.float32 else denoiser.dtype
