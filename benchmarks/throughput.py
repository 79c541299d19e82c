"""How fast it is: python benchmarks/throughput.py [--out FILE.json] [--figure FILE.png] [--check] [--smoke]

All ways do the same work: the same prompts, candidates, solver, steps and guidance, in alternation; medians count. Ours
run as actors and training workers do, on a CPU in processes of their own: a generating one a core, with one thread.
"""

import gc
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Literal
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
from gates import Benchmark, Findings, Gate, main  # imports mi_ray, which keeps diffusers quiet

import diffusers  # isort: skip
from matplotlib.figure import Figure
from peft import LoraConfig
from pydantic import Field, PositiveInt

from mi_ray import storage
from mi_ray.config import ModelConfig, PruneConfig, RunConfig, SamplerConfig, load_config
from mi_ray.diffusion.adapters import DenoisingLoss, attach_adapter
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser, resolve_model
from mi_ray.prompts import Shard, prompt_id, read_prompts
from mi_ray.stages.candidates import derived_seed
from mi_ray.stages.finetune import TrainingSet, draw_microbatch, optimizer_step
from mi_ray.stages.generate import CandidateGenerator
from mi_ray.stages.machine import keep_memory
from mi_ray.stages.work import Work

PROMPTS = Path(__file__).parent.parent / "jobs" / "configs" / "prompts" / "shapes-train.jsonl"
DEMO, _ = load_config(["--config", str(PROMPTS.parents[1] / "shapes.yaml")])
SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++2m": "DPMSolverMultistepScheduler"}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
OURS = ("scored", "unscored", "bare denoiser")
STAGE = "stage, with decoding and Parquet"
PRUNED, PAPER = "stage, pruned, 20 steps", "naive score at the paper's 100 steps of DDPM"
CUT = PruneConfig(by="pmi_negatives", after=(0.2,), keep=(0.25,), num_samples=1)
CUT_SCORE = DEMO.score.model_copy(update={"names": ("pmi_negatives",)})


class ThroughputBenchmark(Benchmark):
    """How fast are scored generation and fine-tuning beside stock diffusers, a naive score and the bare denoiser?"""

    model: str = Field("shapes", description="a shipped model or a diffusers folder")
    dtype: str = Field("auto", description="float32, float16 or bfloat16; auto: float16 on a GPU, float32 without")
    channels_last: bool = Field(True, description="memory layout of our UNet, as `model.channels_last`; stock's stays")
    compile: Literal["default", "cuda-graphs"] | None = Field(None, description="our UNet, as `model.compile`")
    actors: PositiveInt = Field(
        1 if torch.cuda.is_available() else os.cpu_count(), description="processes that share our work and the cores"
    )
    prompts: PositiveInt = Field(8, description="whose pools are generated")
    candidates: PositiveInt = Field(16, description="per prompt")
    sampler: SamplerConfig = SamplerConfig(solver="dpm++2m", num_inference_steps=20, guidance_scale=5.0)
    batch_size: PositiveInt = Field(64, description="candidates in one denoiser batch of ours")
    sweep: tuple[PositiveInt, ...] = Field((1, 4, 16, 64, 128), description="batch sizes of the bare denoiser")
    training_batch: PositiveInt = Field(16, description="rows of a fine-tuning batch")
    training_steps: PositiveInt = Field(10, description="of each measured fine-tuning")
    repeats: PositiveInt = Field(3, description="measurements of each way")
    figure: Path | None = Field(None, description="PNG to draw: candidates a second by way, and the batch-size sweep")

    def answer(self) -> Findings:
        if self.smoke:
            small = {"prompts": 2, "candidates": 4, "repeats": 2, "training_steps": 2, "sweep": (1, 8)}
            sampler = self.sampler.model_copy(update={"num_inference_steps": 4})
            return self.model_copy(update={**small, "smoke": False, "sampler": sampler}).answer()
        try:
            world = World(self)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        count = min(self.actors, len(world.prompts))
        shares = [(self, world.prompts[i::count], world.seeds[i::count]) for i in range(count)]
        with Workers(Actor, shares) as actors:
            generation = world.generation(actors)
            stages = world.stages(actors)
        training = world.training()
        sweep = world.batch_sizes()
        rows = [*generation.values(), *stages.values(), *world.parts(), *training.values(), *sweep]
        if self.figure:
            draw(list(generation.values()), sweep, self.figure)

        def ratio(rows: dict[str, dict], slower: str, faster: str) -> float:
            return rows[slower]["seconds"] / rows[faster]["seconds"]

        gates = {
            "scored_over_unscored": Gate(ratio(generation, "scored", "unscored"), maximum=1.02),
            "faster_than_stock_diffusers": Gate(ratio(generation, "stock diffusers", "scored"), minimum=1.3),
            "faster_than_naive_score": Gate(ratio(generation, "naive score", "scored"), minimum=4.0),
            "pruned_faster_than_naive_at_paper_setting": Gate(ratio(stages, PAPER, PRUNED), minimum=20.0),
            "stage_outside_the_denoiser": Gate(1 - stages[STAGE]["denoiser_share"], maximum=0.07),
            "finetuning_over_plain_loop": Gate(ratio(training, "plain loop", "fine-tuning"), minimum=1.1),
        }
        return Findings(rows, gates)


# ---------------------------------------------------------------------------------------------- measuring
@dataclass
class Inside:
    seconds: float = 0.0


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def inside(holder: object, call: str) -> Iterator[Inside]:
    """While this lasts, the time within a method of an object is taken."""
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
    """Of the wall time of one run, what is spent within a method of an object."""
    with inside(holder, call) as spent:
        began = time.perf_counter()
        run()
        synchronise()
        return spent.seconds / (time.perf_counter() - began)


def alternate(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, the ways in turn after one round to warm up."""
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            synchronise()
            began = time.perf_counter()
            run()
            synchronise()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def peak_memory_gib() -> float:
    """Of the GPU, or of this process on the CPU; since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------------------------------------- our ways
class Actor:
    """A generating actor of ours with its share of the prompts; every way is one call."""

    def __init__(self, settings: ThroughputBenchmark, prompts: list[str], seeds: list[list[int]]):
        threads = max(1, os.cpu_count() // settings.actors)
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
        self.embeddings = self.denoiser.encode_prompts(prompts)
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
        """With what benchmarks/pruning.py found as good as the paper's steps at the least cost."""
        sampler = self.config.sampler.model_copy(update={"solver": "dpm++2m-sde", "num_inference_steps": 20})
        select = self.config.select.model_copy(update={"by": CUT.by})
        return self._generator(self.prompts, sampler=sampler, prune=CUT, score=CUT_SCORE, select=select)

    def run(self, way: str):
        self.ways[way]()
        synchronise()

    def denoiser_share(self, way: str) -> tuple[float, float]:
        """Of the wall time of a way, what is spent in the denoiser; and the peak memory so far, GiB."""
        generator = self._pruned if way == PRUNED else self.generator
        return share_inside(self.ways[way], generator.denoiser, "predict"), peak_memory_gib()

    def scored(self):
        sampled = self.sampler(self.embeddings, self.seeds, Work())
        owner = torch.arange(len(self.prompts)).repeat_interleave(torch.tensor([len(s) for s in self.seeds]))
        self.generator.scorer(self.prompts, self.embeddings, owner, sampled, Work())

    def unscored(self):
        """The step in PyTorch, which can leave the statistics out; the fused one cannot."""
        with patch("mi_ray.diffusion.kernels._record"), patch.object(self.sampler, "kernel", "eager"):
            self.sampler(self.embeddings, self.seeds, Work())

    @torch.no_grad()
    def bare(self):
        """As many denoiser evaluations and nothing else."""
        evaluations = 2 * self.pool * self.config.sampler.num_inference_steps
        bare_calls(self.denoiser, self.embeddings, self.batch, -(-evaluations // self.batch))

    def stage(self, generator: CandidateGenerator):
        """What is done with a shard, its Parquet file included."""
        ids, nothing = [prompt_id(p) for p in self.prompts], [None] * len(self.prompts)
        shard = Shard(0, "part-00000.parquet", ids, self.prompts, nothing, nothing)
        rows = generator._rows(shard, list(range(len(self.prompts))), Work())
        table = pa.Table.from_pylist(rows, schema=storage.candidates_schema(generator.config.score.names))
        storage.write_table(storage.join(self._folder.name, shard.name), table)


@torch.no_grad()
def bare_calls(denoiser: Denoiser, embeddings: torch.Tensor, batch: int, count: int):
    x_t = torch.randn(batch, *denoiser.latent_shape, device=denoiser.device)
    timesteps = torch.full((batch,), 500, device=denoiser.device)
    embeddings = embeddings[:1].expand(batch, -1, -1)
    for _ in range(count):
        denoiser.predict(x_t, timesteps, embeddings)


class Trainer:
    """A training worker of ours: `training_steps` optimiser steps as the stage does them."""

    def __init__(self, settings: ThroughputBenchmark, data: TrainingSet, checkpointing: bool):
        keep_memory()
        self.steps, rows = settings.training_steps, settings.training_batch
        denoiser = load_denoiser(settings.model, settings.dtype)
        denoiser.specialise(channels_last=settings.channels_last, compiled=None, rows=())
        model = attach_adapter(denoiser.unet, rank=16, alpha=16, target_modules=TARGETS)
        if checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        self.objective = DenoisingLoss(model, denoiser.schedule, None, half_of(denoiser))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(denoiser.device.type, enabled=half_of(denoiser) == torch.float16)

        def draw(step: int):
            batch = draw_microbatch(data, 0, step, rows, range(len(self.objective.alpha)), 0.0)
            return tuple(tensor.to(denoiser.device) for tensor in batch)

        self.draw = draw

    def run(self):
        for step in range(self.steps):
            microbatch = [lambda step=step: self.draw(step)]
            loss, _ = optimizer_step(self.objective, microbatch, self.parameters, self.optimizer, self.scaler, 1.0)
            loss.item()


_worker: Actor | Trainer | None = None  # of a process that has one


def _begin(kind: type, *arguments):
    global _worker
    _worker = kind(*arguments)


def _call(method: str, *arguments):
    return getattr(_worker, method)(*arguments)


class Workers:
    """On a CPU each in a process of its own, on a GPU all in this; a call goes to all and returns when all are done."""

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


def told_by(actors: Workers, way: str) -> tuple[float, float]:
    """The mean share of wall time in the denoiser, and the memory of all, GiB."""
    shares, memory = zip(*actors("denoiser_share", way), strict=True)
    return mean(shares), sum(memory)


def half_of(denoiser: Denoiser) -> torch.dtype | None:
    return None if denoiser.dtype == torch.float32 else denoiser.dtype


# ---------------------------------------------------------------------------------------------- the others
class World:
    """The model and the work that all ways share."""

    def __init__(self, settings: ThroughputBenchmark):
        self.settings = settings
        self.denoiser = load_denoiser(settings.model, settings.dtype)
        self.prompts = read_prompts(str(PROMPTS), field="prompts", limit=settings.prompts)[0]["prompt"].to_pylist()
        self.seeds = [[derived_seed(prompt, c) for c in range(settings.candidates)] for prompt in self.prompts]
        self.embeddings = self.denoiser.encode_prompts(self.prompts)
        self.pool = len(self.prompts) * settings.candidates
        self.evaluations = 2 * self.pool * settings.sampler.num_inference_steps

    def _stock_pipeline(self):
        """Stock diffusers on modules of its own, in the denoiser's precision and on its device."""
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch_dtype is to be called dtype
            pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
                resolve_model(self.settings.model),
                torch_dtype=self.denoiser.dtype,
                safety_checker=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.denoiser.device)

    @cached_property
    def pipeline(self):
        return self._stock_pipeline()

    # ------------------------------------------------------------------------------------------ generation
    def stock(self, solver: str | None = None, steps: int | None = None, prompts: int | None = None):
        """A loop around the pipeline, prompt by prompt, without any score; by our solver and steps, or others."""
        sampler = self.settings.sampler
        scheduler = getattr(diffusers, SCHEDULERS[solver or sampler.solver])
        self.pipeline.scheduler = scheduler.from_config(self.pipeline.scheduler.config)
        for prompt, seeds in list(zip(self.prompts, self.seeds, strict=True))[:prompts]:
            self.pipeline(
                prompt,
                num_images_per_prompt=len(seeds),
                num_inference_steps=steps or sampler.num_inference_steps,
                guidance_scale=self.settings.sampler.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            )

    def naive(self, solver: str | None = None, steps: int | None = None, prompts: int | None = None) -> list[float]:
        """The same with the score as MI-TUNE's released code takes it: to the host at each step, memory collected."""
        scores = []

        def score(unet, inputs, output):
            unconditional, conditional = output[0].chunk(2)
            difference = (conditional - unconditional).cpu()
            scores.append(difference.square().flatten(1).sum(1).tolist())
            gc.collect()
            torch.cuda.empty_cache()

        hook = self.pipeline.unet.register_forward_hook(score)
        try:
            self.stock(solver, steps, prompts)
        finally:
            hook.remove()
        return scores

    def generation(self, actors: Workers) -> dict[str, dict]:
        """One row a way: seconds, and the share of them inside the denoiser's forward calls."""
        ways = {"stock diffusers": self.stock, "naive score": self.naive}
        all_ways = {way: (lambda way=way: actors("run", way)) for way in OURS} | ways
        rows = {}
        for way, seconds in alternate(all_ways, self.settings.repeats).items():
            if way in ways:
                told = share_inside(ways[way], self.pipeline.unet, "forward"), peak_memory_gib()
            else:
                told = told_by(actors, way)
            rows[way] = self._row(way, seconds, *told)
        return rows

    def stages(self, actors: Workers) -> dict[str, dict]:
        """The stage as it is, the stage pruned, and the naive score at the paper's setting: one prompt's pool, once."""
        seconds = alternate(
            {way: (lambda way=way: actors("run", way)) for way in (STAGE, PRUNED)}, self.settings.repeats
        )
        rows = {way: self._row(way, seconds[way], *told_by(actors, way)) for way in seconds}
        setting = ("ddpm", 4 if self.settings.sampler.num_inference_steps < 5 else 100)
        began = time.perf_counter()
        share = share_inside(lambda: self.naive(*setting, prompts=1), self.pipeline.unet, "forward")
        seconds = (time.perf_counter() - began) * len(self.prompts)
        rows[PAPER] = self._row(PAPER, seconds, share, peak_memory_gib())
        for way in (PRUNED, PAPER):  # not as many as the others do
            del rows[way]["evaluations_per_s"]
        return rows

    def _row(self, way: str, seconds: float, share: float, memory: float) -> dict:
        return {
            "part": "generation",
            "way": way,
            "seconds": seconds,
            "candidates_per_s": self.pool / seconds,
            "evaluations_per_s": self.evaluations / seconds,
            "denoiser_share": share,
            "dtype": str(self.denoiser.dtype).removeprefix("torch."),
            "peak_memory_gib": memory,
        }

    def parts(self) -> list[dict]:
        """What else the stages spend time on: the decoder, the encoder, the texts."""
        latents = torch.randn(self.pool, *self.denoiser.latent_shape, device=self.denoiser.device)
        images = self.denoiser.decode(latents)
        ways = {
            "decoding images": lambda: self.denoiser.decode(latents),
            "encoding images": lambda: self.denoiser.encode_images(images),
            "encoding prompts": lambda: self.denoiser.encode_prompts(self.prompts),
        }
        counts = dict.fromkeys(ways, self.pool) | {"encoding prompts": len(self.prompts)}
        seconds = alternate(ways, self.settings.repeats)
        return [
            {"part": "beside", "way": way, "seconds": seconds[way], "per_s": counts[way] / seconds[way]} for way in ways
        ]

    def batch_sizes(self) -> list[dict]:
        """The bare denoiser at each batch size."""
        count = 2 * max(self.settings.sweep)
        sizes = [size for size in self.settings.sweep if size <= 2 * self.pool]
        ways = {str(b): (lambda b=b: bare_calls(self.denoiser, self.embeddings, b, -(-count // b))) for b in sizes}
        seconds = alternate(ways, self.settings.repeats)
        return [
            {
                "part": "batch size",
                "way": way,
                "seconds": seconds[way],
                "evaluations_per_s": -(-count // int(way)) * int(way) / seconds[way],
            }
            for way in ways
        ]

    # ------------------------------------------------------------------------------------------ fine-tuning
    def training(self) -> dict[str, dict]:
        """Ours against diffusers' example loop (texts encoded at each step), and the same with cached texts."""
        settings = self.settings
        with (
            Workers(Trainer, [(settings, self._data, False)]) as ours,
            Workers(Trainer, [(settings, self._data, True)]) as checkpointing,
        ):
            ways = {
                "fine-tuning": lambda: ours("run"),
                "fine-tuning, activation checkpointing": lambda: checkpointing("run"),
                "plain loop": self._plain(cached=False),
                "plain loop, cached texts": self._plain(cached=True),
            }
            seconds = alternate(ways, settings.repeats)
        return {
            way: {
                "part": "fine-tuning",
                "way": way,
                "seconds": seconds[way],
                "steps_per_s": settings.training_steps / seconds[way],
                "rows_per_s": settings.training_steps * settings.training_batch / seconds[way],
            }
            for way in ways
        }

    @cached_property
    def _data(self) -> TrainingSet:
        rows = self.settings.training_batch
        latents = torch.randn(rows, *self.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
        prompts = torch.arange(rows) % len(self.prompts)
        embeddings = self.denoiser.encode_prompts([*self.prompts, ""]).cpu()
        return TrainingSet(latents, torch.ones(rows), prompts, embeddings)

    def _plain(self, cached: bool) -> Callable[[], None]:
        """diffusers' text-to-image LoRA example on latents: its scheduler, its optimiser, its order."""
        settings, device = self.settings, self.denoiser.device
        pipeline = self._stock_pipeline()
        unet, scheduler = pipeline.unet, diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=list(TARGETS)))
        parameters = [p for p in unet.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.float()
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        scaler = torch.amp.GradScaler(device.type, enabled=half_of(self.denoiser) == torch.float16)
        data = self._data
        texts = [self.prompts[p] for p in data.prompts.tolist()]
        tokens = pipeline.tokenizer(
            texts, padding="max_length", max_length=self.denoiser.max_tokens, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        known = data.embeddings[data.prompts].to(device)

        def run():
            for _ in range(settings.training_steps):
                latents = data.latents.to(device)
                noise = torch.randn_like(latents)
                timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=device)
                noisy = scheduler.add_noise(latents, noise, timesteps)
                with torch.autocast(device.type, half_of(self.denoiser)) if half_of(self.denoiser) else nullcontext():
                    with torch.no_grad():
                        embeddings = known if cached else pipeline.text_encoder(tokens).last_hidden_state
                    prediction = unet(noisy, timesteps, encoder_hidden_states=embeddings).sample
                epsilon = scheduler.config.prediction_type == "epsilon"
                target = noise if epsilon else scheduler.get_velocity(latents, noise, timesteps)
                loss = torch.nn.functional.mse_loss(prediction.float(), target)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                loss.item()

        return run


def draw(generation: list[dict], sweep: list[dict], path: Path):
    figure = Figure((9, 3.4), layout="constrained")
    bars, line = figure.subplots(1, 2)
    places = np.arange(len(generation))[::-1]
    bars.barh(places, [row["candidates_per_s"] for row in generation], color="#3f74d8")
    bars.set_yticks(places, [row["way"] for row in generation])
    bars.set_xlabel("candidates a second")
    line.plot([int(row["way"]) for row in sweep], [row["evaluations_per_s"] for row in sweep], "o-", color="#3f74d8")
    line.set(xscale="log", xlabel="rows in a denoiser batch", ylabel="evaluations a second", ylim=(0, None))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(ThroughputBenchmark)
