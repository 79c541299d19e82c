"""`throughput.py --architecture`: ours and stock diffusers on one network, both eager and both with compiled blocks.

All do the same number of denoiser evaluations, which is checked. Stock diffusers is called once per prompt, for all its
candidates. Ours fills batches with the candidates of several prompts, and also computes the score.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import diffusers
import torch
from gates import Findings, Gate
from measuring import SCHEDULERS, alternate
from peft import LoraConfig
from random_models import denoiser_of, pipeline_of
from workers import PROMPTS, TARGETS, ThroughputSettings, half_of, peak_memory_gib

from mi_ray.config import FinetuneConfig
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.schedules import FLOW, prediction_from
from mi_ray.inputs.prompts import read_prompts
from mi_ray.scoring.sampler import Sampler, derived_seed
from mi_ray.scoring.work import Work
from mi_ray.training.losses import Batch, Objective
from mi_ray.training.optimization import optimizer_step

_EAGER, _COMPILED = "eager", "compiled"


class Speed:
    """One network, and the ways to use it."""

    def __init__(self, settings: ThroughputSettings):
        self.settings, on_gpu = settings, torch.cuda.is_available()
        dtype = settings.dtype
        if dtype == "auto":
            dtype = "float32" if not on_gpu else "bfloat16" if settings.architecture.startswith("sd35") else "float16"
        self.pipeline = pipeline_of(settings.architecture, getattr(torch, dtype), "cuda" if on_gpu else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        self.denoiser = denoiser_of(settings.architecture, self.pipeline, 64 if settings.smoke else None)
        self.flow = self.denoiser.schedule.prediction_type == FLOW
        # A flow model visits the levels of its own scheduler: Euler in both.
        changes = {"solver": "ddim"} if self.flow else {}
        self.sampling = settings.sampler.model_copy(update=changes)
        if not self.flow:
            scheduler = getattr(diffusers, SCHEDULERS[self.sampling.solver])
            self.pipeline.scheduler = scheduler.from_config(self.pipeline.scheduler.config)
        self.prompts = read_prompts(str(PROMPTS), field="prompts", limit=settings.prompts)[0]["prompt"].to_pylist()
        self.seeds = [[derived_seed(prompt, c) for c in range(settings.candidates)] for prompt in self.prompts]
        self.conditioning = self.denoiser.encode_prompts(self.prompts)
        self.sampler = Sampler(self.denoiser, self.sampling, settings.batch_size)
        self.pool = len(self.prompts) * settings.candidates
        self.evaluations = 2 * self.pool * self.sampling.num_inference_steps

    # ------------------------------------------------------------------------------------------ generation
    def scored(self):
        self.sampler(self.conditioning, self.seeds, Work())

    def unscored(self):
        """Without the statistics of the score, with the PyTorch step: the fused step always computes them."""
        with patch("mi_ray.diffusion.kernels._record"), patch.object(self.sampler, "kernel", "eager"):
            self.scored()

    def stock(self):
        height, width = self.denoiser.image_size
        for prompt, seeds in zip(self.prompts, self.seeds, strict=True):
            self.pipeline(
                prompt,
                height=height,
                width=width,
                num_images_per_prompt=len(seeds),
                num_inference_steps=self.sampling.num_inference_steps,
                guidance_scale=self.sampling.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            )

    def generation(self) -> list[dict]:
        ways = {"ours, scored": self.scored, "ours, unscored": self.unscored, "stock diffusers": self.stock}
        rows = []
        for mode in (_EAGER, _COMPILED):
            if mode == _COMPILED:
                each = self.settings.candidates  # ours: one and both branches of a batch; stock: both of a prompt
                batch = min(self.settings.batch_size, self.pool)
                sizes = tuple(sorted({batch, 2 * batch, 2 * each}))
                backend = "inductor" if torch.cuda.is_available() else "eager"
                self.denoiser.specialise(channels_last=False, compiled="blocks", rows=sizes, backend=backend)
            done = {name: self._evaluations(run) for name, run in ways.items()}
            for name, seconds in alternate(ways, self.settings.repeats).items():
                rows.append(
                    {
                        "part": "generation",
                        "way": f"{name}, {mode}",
                        "seconds": seconds,
                        "candidates_per_s": self.pool / seconds,
                        "evaluations": done[name],
                        "dtype": str(self.denoiser.dtype).removeprefix("torch."),
                        "peak_memory_gib": peak_memory_gib(),
                    }
                )
        return rows

    def _evaluations(self, run: Callable[[], None]) -> int:
        """Rows that the network evaluates in one run."""
        with counted(self.denoiser.network) as rows:
            run()
        return sum(rows)

    # ------------------------------------------------------------------------------------------ fine-tuning
    def training(self) -> list[dict]:
        """Our optimiser step against a plain loop with PEFT, which encodes the texts at each step. Both are eager."""
        settings = self.settings
        ways = {"fine-tuning": self._ours(), "plain loop": self._plain()}
        seconds = alternate(ways, settings.repeats)
        steps, rows = settings.training_steps, settings.training_steps * settings.training_batch
        return [
            {
                "part": "fine-tuning",
                "way": way,
                "seconds": seconds[way],
                "steps_per_s": steps / seconds[way],
                "rows_per_s": rows / seconds[way],
            }
            for way in ways
        ]

    def _data(self) -> tuple[torch.Tensor, list[str]]:
        count = self.settings.training_batch
        latents = torch.randn(count, *self.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
        return latents.to(self.denoiser.device), [self.prompts[i % len(self.prompts)] for i in range(count)]

    def _ours(self) -> Callable[[], None]:
        denoiser, (latents, texts) = self.denoiser, self._data()
        model = attach_adapter(copy.deepcopy(denoiser.network), rank=16, alpha=16, target_modules=TARGETS)
        half = half_of(denoiser)
        objective = Objective(
            model, denoiser.schedule, FinetuneConfig(), half, network_prediction=denoiser.family.predict
        )
        optimizer = torch.optim.AdamW(objective.parameters_trained, lr=1e-4, fused=True)
        scaler = torch.amp.GradScaler(denoiser.device.type, enabled=half == torch.float16)
        conditioning, ones = denoiser.encode_prompts(texts), torch.ones(len(latents), device=denoiser.device)

        def draw() -> Batch:
            timesteps = torch.randint(1, 999, (len(latents),), device=denoiser.device)
            return Batch(latents, torch.randn_like(latents), timesteps, conditioning, ones)

        def run():
            for _ in range(self.settings.training_steps):
                loss, _ = optimizer_step(
                    objective, [(draw, 1.0)], objective.parameters_trained, optimizer, scaler, max_grad_norm=1.0
                )
                loss.item()

        return run

    def _plain(self) -> Callable[[], None]:
        denoiser, (latents, texts) = self.denoiser, self._data()
        network, family, schedule = copy.deepcopy(denoiser.network), denoiser.family, denoiser.schedule
        network.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=list(TARGETS)))
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.float()
        optimizer, half = torch.optim.AdamW(parameters, lr=1e-4), half_of(denoiser)
        scaler = torch.amp.GradScaler(denoiser.device.type, enabled=half == torch.float16)

        def run():
            for _ in range(self.settings.training_steps):
                noise = torch.randn_like(latents)
                timesteps = torch.randint(1, 999, (len(latents),), device=denoiser.device)
                alpha, sigma = (values.view(-1, 1, 1, 1) for values in schedule.alpha_sigma(timesteps))
                with torch.autocast(denoiser.device.type, half) if half else nullcontext():
                    conditioning = denoiser.encode_prompts(texts)
                    prediction = family.predict(network, alpha * latents + sigma * noise, timesteps, conditioning)
                target = prediction_from(schedule.prediction_type, latents, noise, alpha, sigma)
                loss = torch.nn.functional.mse_loss(prediction.float(), target)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                loss.item()

        return run


@contextmanager
def counted(network: torch.nn.Module) -> Iterator[list[int]]:
    """Context that records the number of rows of each call of the network."""
    rows: list[int] = []

    def record(module, inputs, named):
        rows.append(len(named["hidden_states"] if "hidden_states" in named else inputs[0]))

    hook = network.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


def compare(settings: ThroughputSettings) -> Findings:
    """The rows and the gates of one architecture."""
    if settings.smoke:
        sampler = settings.sampler.model_copy(update={"num_inference_steps": 3})
        small = {"prompts": 2, "candidates": 2, "batch_size": 2, "repeats": 1, "training_steps": 1, "training_batch": 2}
        settings = settings.model_copy(update={**small, "sampler": sampler})
    speed = Speed(settings)
    generation, training = speed.generation(), speed.training()
    seconds = {row["way"]: row["seconds"] for row in [*generation, *training]}

    def ratio(slower: str, faster: str) -> float:
        return seconds[slower] / seconds[faster]

    filling = max(row["evaluations"] for row in generation) / speed.evaluations
    gates = {
        "evaluations_over_needed": Gate(filling, maximum=1.0),
        "scored_over_unscored": Gate(ratio("ours, scored, eager", "ours, unscored, eager"), maximum=1.01),
        "compiled_over_stock_eager": Gate(ratio("stock diffusers, eager", "ours, scored, compiled"), minimum=1.3),
        "compiled_over_stock_compiled": Gate(
            ratio("stock diffusers, compiled", "ours, scored, compiled"), minimum=1.05
        ),
        "finetuning_over_plain_loop": Gate(ratio("plain loop", "fine-tuning"), minimum=1.1),
    }
    return Findings([*generation, *training], gates)
