"""How fast it is: python benchmarks/throughput.py [--out FILE.json] [--figure FILE.png] [--check] [--smoke]

All ways do the same work: the same prompts, candidates, solver, steps and guidance, in alternation; medians count.
"""

import gc
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
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
from mi_ray.config import RunConfig, SamplerConfig, ScoreConfig
from mi_ray.diffusion.adapters import DenoisingLoss, attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser, resolve_model
from mi_ray.prompts import Shard, prompt_id, read_prompts
from mi_ray.stages.candidates import Sampler, Scorer, Work, derived_seed
from mi_ray.stages.finetune import TrainingSet, draw_microbatch, optimizer_step
from mi_ray.stages.generate import CandidateGenerator

PROMPTS = Path(__file__).parent.parent / "jobs" / "configs" / "prompts" / "shapes-train.jsonl"
SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++2m": "DPMSolverMultistepScheduler"}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class ThroughputBenchmark(Benchmark):
    """How fast are scored generation and fine-tuning beside stock diffusers, a naive score and the bare denoiser?"""

    model: str = Field("shapes", description="a shipped model or a diffusers folder")
    dtype: str = Field("auto", description="float32, float16 or bfloat16; auto: float16 on a GPU, float32 without")
    prompts: PositiveInt = Field(4, description="whose pools are generated")
    candidates: PositiveInt = Field(16, description="per prompt")
    sampler: SamplerConfig = SamplerConfig(solver="dpm++2m", num_inference_steps=20, guidance_scale=5.0)
    batch_size: PositiveInt = Field(64, description="candidates in one denoiser batch of ours")
    sweep: tuple[PositiveInt, ...] = Field((1, 4, 16, 64, 128), description="batch sizes of the bare denoiser")
    training_batch: PositiveInt = Field(16, description="rows of a fine-tuning batch")
    training_steps: PositiveInt = Field(10, description="of each measured fine-tuning")
    repeats: PositiveInt = Field(5, description="measurements of each way")
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
        generation = world.generation()
        stage = world.stage()
        training = world.training()
        sweep = world.batch_sizes()
        rows = [*generation.values(), stage, *world.parts(), *training.values(), *sweep]
        if self.figure:
            draw(list(generation.values()), sweep, self.figure)

        def ratio(rows: dict[str, dict], slower: str, faster: str) -> float:
            return rows[slower]["seconds"] / rows[faster]["seconds"]

        gates = {
            "scored_over_unscored": Gate(ratio(generation, "scored", "unscored"), maximum=1.02),
            "faster_than_stock_diffusers": Gate(ratio(generation, "stock diffusers", "scored"), minimum=1.3),
            "faster_than_naive_score": Gate(ratio(generation, "naive score", "scored"), minimum=4.0),
            "stage_outside_the_denoiser": Gate(1 - stage["denoiser_share"], maximum=0.07),
            "finetuning_over_plain_loop": Gate(ratio(training, "plain loop", "fine-tuning"), minimum=1.1),
        }
        return Findings(rows, gates)


# ---------------------------------------------------------------------------------------------- measuring
@dataclass
class Inside:
    """Seconds spent in the forward calls of a module."""

    seconds: float = 0.0
    calls: int = 0
    _began: float = field(default=0.0, repr=False)


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def inside(module: torch.nn.Module) -> Iterator[Inside]:
    spent = Inside()

    def before(*_):
        synchronise()
        spent._began = time.perf_counter()

    def after(*_):
        synchronise()
        spent.seconds += time.perf_counter() - spent._began
        spent.calls += 1

    hooks = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    yield spent
    for hook in hooks:
        hook.remove()


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


# ---------------------------------------------------------------------------------------------- the ways
class World:
    """The model and the work that all ways share."""

    def __init__(self, settings: ThroughputBenchmark):
        self.settings = settings
        self.denoiser = load_denoiser(settings.model, settings.dtype)
        self.prompts = read_prompts(str(PROMPTS), field="prompts", limit=settings.prompts)[0]["prompt"].to_pylist()
        self.seeds = [[derived_seed(prompt, c) for c in range(settings.candidates)] for prompt in self.prompts]
        self.embeddings = self.denoiser.encode_prompts(self.prompts)
        self.sampler = Sampler(self.denoiser, settings.sampler, settings.batch_size)
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
        """With the same solver as ours."""
        pipeline = self._stock_pipeline()
        scheduler = getattr(diffusers, SCHEDULERS[self.settings.sampler.solver])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        return pipeline

    # ------------------------------------------------------------------------------------------ generation
    def scored(self) -> list[float]:
        sampled = self.sampler(self.embeddings, self.seeds, Work())
        owner = torch.arange(len(self.prompts)).repeat_interleave(self.settings.candidates)
        return self._scorer(self.prompts, self.embeddings, owner, sampled, Work())["score_mitune"]

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.denoiser, ScoreConfig(names=("mitune",)), self.settings.batch_size, 0, [])

    def unscored(self):
        with patch("mi_ray.diffusion.kernels._record"):
            self.sampler(self.embeddings, self.seeds, Work())

    def stock(self):
        """A loop around the pipeline, prompt by prompt, without any score."""
        for prompt, seeds in zip(self.prompts, self.seeds, strict=True):
            self.pipeline(
                prompt,
                num_images_per_prompt=len(seeds),
                num_inference_steps=self.settings.sampler.num_inference_steps,
                guidance_scale=self.settings.sampler.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            )

    def naive(self) -> list[float]:
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
            self.stock()
        finally:
            hook.remove()
        return scores

    @torch.no_grad()
    def bare(self, batch: int | None = None, count: int | None = None):
        """As many denoiser evaluations and nothing else, `batch` at a time."""
        batch, count = batch or 2 * self.settings.batch_size, count or self.evaluations
        batch = min(batch, 2 * self.pool)
        x_t = torch.randn(batch, *self.denoiser.latent_shape, device=self.denoiser.device)
        timesteps = torch.full((batch,), 500, device=self.denoiser.device)
        embeddings = self.embeddings[:1].expand(batch, -1, -1)
        for _ in range(-(-count // batch)):
            self.denoiser.predict(x_t, timesteps, embeddings)

    def generation(self) -> dict[str, dict]:
        """One row a way: seconds, and the share of them inside the denoiser's forward calls."""
        ways = {
            "scored": (self.scored, self.denoiser.unet),
            "unscored": (self.unscored, self.denoiser.unet),
            "stock diffusers": (self.stock, self.pipeline.unet),
            "naive score": (self.naive, self.pipeline.unet),
            "bare denoiser": (self.bare, self.denoiser.unet),
        }
        seconds = alternate({name: run for name, (run, _) in ways.items()}, self.settings.repeats)
        return {name: self._row("generation", name, seconds[name], *way) for name, way in ways.items()}

    def _row(self, part: str, name: str, seconds: float, run: Callable, unet: torch.nn.Module) -> dict:
        with inside(unet) as spent:
            began = time.perf_counter()
            run()
            synchronise()
            whole = time.perf_counter() - began
        return {
            "part": part,
            "way": name,
            "seconds": seconds,
            "candidates_per_s": self.pool / seconds,
            "evaluations_per_s": self.evaluations / seconds,
            "denoiser_share": spent.seconds / whole,
            "dtype": str(self.denoiser.dtype).removeprefix("torch."),
            "peak_memory_gib": peak_memory_gib(),
        }

    def stage(self) -> dict:
        """What a generating actor does with a shard, its Parquet file included."""
        with tempfile.TemporaryDirectory() as folder:
            config = RunConfig.model_validate(
                {
                    "run_dir": folder,
                    "prompts": {"file": str(PROMPTS)},
                    "model": {"path": self.settings.model, "dtype": self.settings.dtype},
                    "sampler": self.settings.sampler.model_dump(),
                    "generate": {"candidates_per_prompt": max(2, self.settings.candidates)},
                    "resources": {"batch_size": self.settings.batch_size, "cpus_per_actor": torch.get_num_threads()},
                }
            )
            actor = CandidateGenerator(config.model_dump(mode="json"), 0, folder, None, ["mitune"], [], self.prompts)
            ids, nothing = [prompt_id(p) for p in self.prompts], [None] * len(self.prompts)
            shard = Shard(0, "part-00000.parquet", ids, self.prompts, nothing, nothing)

            def run():
                rows = actor._rows(shard, list(range(len(self.prompts))), Work())
                table = pa.Table.from_pylist(rows, schema=storage.candidates_schema(config.score.names))
                storage.write_table(storage.join(folder, shard.name), table)

            seconds = alternate({"stage": run}, self.settings.repeats)["stage"]
            return self._row("generation", "stage, with decoding and Parquet", seconds, run, actor.denoiser.unet)

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
        ways = {str(b): (lambda b=b: self.bare(b, count)) for b in self.settings.sweep if b <= 2 * self.pool}
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
        ways = {
            "fine-tuning": self._ours(),
            "fine-tuning, activation checkpointing": self._ours(checkpointing=True),
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

    def _half(self) -> torch.dtype | None:
        return None if self.denoiser.dtype == torch.float32 else self.denoiser.dtype

    def _ours(self, checkpointing: bool = False) -> Callable[[], None]:
        """`training_steps` optimiser steps as the stage does them."""
        settings, device = self.settings, self.denoiser.device
        denoiser = load_denoiser(settings.model, settings.dtype, str(device))
        model = attach_adapter(denoiser.unet, rank=16, alpha=16, target_modules=TARGETS)
        if checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        objective = DenoisingLoss(model, denoiser.schedule, None, self._half())
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=self._half() == torch.float16)

        def draw(step: int):
            batch = draw_microbatch(self._data, 0, step, settings.training_batch, range(len(objective.alpha)), 0.0)
            return tuple(tensor.to(device) for tensor in batch)

        def run():
            for step in range(settings.training_steps):
                loss, _ = optimizer_step(objective, [lambda step=step: draw(step)], parameters, optimizer, scaler, 1.0)
                loss.item()

        return run

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
        scaler = torch.amp.GradScaler(device.type, enabled=self._half() == torch.float16)
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
                with torch.autocast(device.type, self._half()) if self._half() else nullcontext():
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
