"""Speed of generation and training: python benchmarks/throughput.py [--out FILE.json] [--figure FILE.png] [--check]

`--architecture sd15|sdxl|sd35-medium`: a published architecture with random weights instead of the embedded model.

All implementations do the same work: the same prompts, candidates, solver, steps and guidance scale. They run in turn,
and the median time is reported. Ours run like actors and training workers. On a CPU these are separate processes, for
generation one per core with one thread each.
"""

import gc
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from architecture_speed import compare
from gates import Findings, Gate, main  # imports mi_ray, which keeps diffusers quiet
from measuring import SCHEDULERS, alternate
from workers import (
    OURS,
    PAPER,
    PROMPTS,
    PRUNED,
    STAGE,
    TARGETS,
    Actor,
    ThroughputSettings,
    Trainer,
    Workers,
    bare_calls,
    denoiser_shares,
    half_of,
    peak_memory_gib,
    share_inside,
)

import diffusers  # isort: skip
from matplotlib.figure import Figure
from peft import LoraConfig

from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.folders import resolve_model
from mi_ray.inputs.prompts import read_prompts
from mi_ray.scoring.sampler import derived_seed
from mi_ray.training.training_set import TrainingSet


class ThroughputBenchmark(ThroughputSettings):
    """How fast are scored generation and fine-tuning, compared with unmodified diffusers, a naive score and the bare
    denoiser?"""

    def answer(self) -> Findings:
        if self.architecture:
            return compare(self)
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


# ---------------------------------------------------------------------------------------------- the others
class World:
    """The model and the work, the same for all implementations."""

    def __init__(self, settings: ThroughputBenchmark):
        self.settings = settings
        self.denoiser = load_denoiser(settings.model, settings.dtype)
        self.prompts = read_prompts(str(PROMPTS), field="prompts", limit=settings.prompts)[0]["prompt"].to_pylist()
        self.seeds = [[derived_seed(prompt, c) for c in range(settings.candidates)] for prompt in self.prompts]
        self.conditioning = self.denoiser.encode_prompts(self.prompts)
        self.pool = len(self.prompts) * settings.candidates
        self.evaluations = 2 * self.pool * settings.sampler.num_inference_steps

    def _stock_pipeline(self):
        """An unmodified diffusers pipeline with its own modules, in the denoiser's dtype and on its device."""
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch_dtype will be renamed to dtype
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
        """Call the pipeline for each prompt, without a score, with the configured solver and steps or with others."""
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
        """`stock` with the score as in MI-TUNE's released code: each step copies to the host and frees memory."""
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
        """One row per implementation: seconds, and the share of time inside the denoiser's forward calls."""
        ways = {"stock diffusers": self.stock, "naive score": self.naive}
        all_ways = {way: (lambda way=way: actors("run", way)) for way in OURS} | ways
        rows = {}
        for way, seconds in alternate(all_ways, self.settings.repeats).items():
            if way in ways:
                measured = share_inside(ways[way], self.pipeline.unet, "forward"), peak_memory_gib()
            else:
                measured = denoiser_shares(actors, way)
            rows[way] = self._row(way, seconds, *measured)
        return rows

    def stages(self, actors: Workers) -> dict[str, dict]:
        """The stage, the stage with pruning, and the naive score with the paper's setting, measured on one prompt."""
        seconds = alternate(
            {way: (lambda way=way: actors("run", way)) for way in (STAGE, PRUNED)}, self.settings.repeats
        )
        rows = {way: self._row(way, seconds[way], *denoiser_shares(actors, way)) for way in seconds}
        setting = ("ddpm", 4 if self.settings.sampler.num_inference_steps < 5 else 100)
        began = time.perf_counter()
        share = share_inside(lambda: self.naive(*setting, prompts=1), self.pipeline.unet, "forward")
        seconds = (time.perf_counter() - began) * len(self.prompts)
        rows[PAPER] = self._row(PAPER, seconds, share, peak_memory_gib())
        for way in (PRUNED, PAPER):  # they do another number of evaluations
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
        """The other work of the stages: decoding images, encoding images, encoding prompts."""
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
        ways = {str(b): (lambda b=b: bare_calls(self.denoiser, self.conditioning, b, -(-count // b))) for b in sizes}
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
        """Our training against diffusers' example loop, which encodes texts at each step, and with cached texts."""
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
        conditioning = self.denoiser.encode_prompts([*self.prompts, ""]).cpu()
        return TrainingSet(torch.arange(rows), rows, latents, torch.ones(rows), prompts, conditioning)

    def _plain(self, cached: bool) -> Callable[[], None]:
        """diffusers' text-to-image LoRA example, on latents: same scheduler, optimiser and order of operations."""
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
        known = data.conditioning.rows(data.prompts).to(device)["embeds"]

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
    bars.set_xlabel("candidates per second")
    line.plot([int(row["way"]) for row in sweep], [row["evaluations_per_s"] for row in sweep], "o-", color="#3f74d8")
    line.set(xscale="log", xlabel="rows in a denoiser batch", ylabel="evaluations per second", ylim=(0, None))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(ThroughputBenchmark)
