"""What one actor does with its prompts: sample, score, measure, decode. Knows the device, not the cluster."""

import hashlib
import math
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mi_ray.config import ModelConfig, SamplerConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.diffusion.fitting import fitting
from mi_ray.diffusion.kernels import choose_kernel
from mi_ray.diffusion.sampling import CandidateNoise, State, Trajectory, sampling_steps, solver_plan
from mi_ray.scoring.work import Work

NOWHERE = (math.inf, -math.inf)  # the interval of log SNR without any: one branch at every step


def derived_seed(*parts: str | int) -> int:
    """A 63-bit seed that depends on all parts and on nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def batch_at_size(denoiser: Denoiser, batch_size: int) -> int:
    """How many candidates go in one denoiser batch, if at the model's own size `batch_size` do.

    As many as have no more latent tokens together, and at least one: an image of half the height and width has a
    quarter of them, so that four times as many candidates cost about the same time and memory.
    """
    own, here = (math.prod(shape[1:]) for shape in (denoiser.own_latent_shape, denoiser.latent_shape))
    return max(1, batch_size * own // here)


def specialise(denoiser: Denoiser, config: ModelConfig, batch_size: int):
    """Trade the denoiser's generality for speed, as configured; what it computes stays the same."""
    rows = (batch_size, 2 * batch_size)  # one branch, both branches; scoring takes as many as the latter
    denoiser.specialise(channels_last=config.channels_last, compiled=config.compile, rows=rows)


@dataclass(eq=False)
class Pool:
    """N candidates on their way: what sampling has left of each so far."""

    owner: Tensor  # (N,) long on the CPU: whose prompt's
    timesteps: Tensor  # (S,) of the whole way
    latents: Tensor  # (N, *latent_shape) fp32: x_t, clean where the whole way is done
    x0: Tensor | None  # (N, *latent_shape) fp32: the clean latents predicted last, where they were needed
    delta_sq: Tensor  # (N, S) fp32, NaN where a candidate has not come
    cross: Tensor  # (N, S) fp32, likewise
    guidance_scale: float

    def put(self, rows: Tensor, steps: range, state: State):
        """Take over what sampling left of some candidates after some steps."""
        rows = rows.to(self.latents.device)
        self.latents[rows] = state.latents
        if state.x0 is not None:
            self.x0 = torch.empty_like(self.latents) if self.x0 is None else self.x0
            self.x0[rows] = state.x0
        for curve, new in ((self.delta_sq, state.delta_sq), (self.cross, state.cross)):
            curve[rows, steps.start : steps.stop] = new[:, steps.start : steps.stop]

    def so_far(self, rows: Tensor, steps: int) -> Trajectory:
        """Some candidates after their first steps, scored like finished ones: the predicted x0 stands for the image."""
        rows = rows.to(self.latents.device)
        curves = self.delta_sq[rows, :steps], self.cross[rows, :steps]
        return Trajectory(self.x0[rows], self.timesteps[:steps], *curves, self.guidance_scale)

    def finished(self) -> Trajectory:
        return Trajectory(self.latents, self.timesteps, self.delta_sq, self.cross, self.guidance_scale)


class Cuts(Protocol):
    """Where a pool is cut on the way, and by what."""

    after: tuple[int, ...]  # numbers of steps, rising

    def survivors(self, pool: Pool, rows: Tensor, steps: int) -> Tensor:
        """Which of the candidates `rows` go on after so many steps."""


def even_batches(rows: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """The fewest batches of at most batch_size rows, as equal as can be: no small one is left over at the end."""
    return rows.tensor_split(max(1, -(-len(rows) // batch_size)))


class Sampler:
    """Samples candidates of many prompts in full batches.

    Args:
        kernel: of the solver step, as `diffusion.kernels.choose_kernel` takes it.
    """

    def __init__(self, denoiser: Denoiser, config: SamplerConfig, batch_size: int, kernel: str = "auto"):
        self.denoiser, self.config, self.batch_size = denoiser, config, batch_size
        self.kernel = choose_kernel(kernel, denoiser.device)
        self.plan = solver_plan(
            denoiser.schedule, config.solver, config.num_inference_steps, timestep_spacing=config.timestep_spacing
        )
        self.guidance_interval = config.guidance_interval if config.branches == 2 else NOWHERE
        self.guided = self.plan.guided(self.guidance_interval)
        self.null = denoiser.encode_prompts([""])

    def __call__(
        self, conditioning: Conditioning, seeds: list[list[int]], work: Work, cuts: Cuts | None = None
    ) -> Trajectory:
        """Sample seeds[p] for each of P prompts: N candidates, the sum of len(seeds[p]).

        Args:
            conditioning: of the prompts, P rows.
            cuts: where candidates drop out. Those that are left are packed into full batches again, whatever their
                prompts; a dropped one's latents are those of its last step, its curves NaN from there on.
        """
        noise = CandidateNoise([seed for of_prompt in seeds for seed in of_prompt], self.denoiser.latent_shape)
        latents = noise.draw().to(self.denoiser.device)
        curve = torch.full((len(latents), len(self.plan.timesteps)), torch.nan, device=latents.device)
        owner = torch.arange(len(seeds)).repeat_interleave(torch.tensor([len(s) for s in seeds]))
        scale = self.config.guidance_scale
        pool = Pool(owner, self.plan.timesteps, latents, None, curve, curve.clone(), scale)
        rows, start = torch.arange(len(latents)), 0
        for stop in (*(cuts.after if cuts else ()), len(self.plan.timesteps)):
            began = time.perf_counter()
            left = rows
            while len(left):
                advance = partial(self._advance, pool, left, range(start, stop), conditioning, noise)
                done = fitting(self, advance, work)
                left = left[done:]
            work.denoiser_evaluations += len(rows) * sum(1 + guided for guided in self.guided[start:stop])
            work.timed("sample", began)
            if stop < len(self.plan.timesteps):
                rows, start = cuts.survivors(pool, rows, stop), stop
        return pool.finished()

    def _advance(
        self, pool: Pool, rows: Tensor, steps: range, conditioning: Conditioning, noise: CandidateNoise
    ) -> int:
        """Take the first batch of some candidates through some steps; returns how many it held."""
        rows = even_batches(rows, self.batch_size)[0]
        on_device = rows.to(pool.latents.device)
        chosen = rows.tolist()
        states = sampling_steps(
            self.denoiser,
            self.plan,
            conditioning.rows(pool.owner[rows]),
            self.null,
            pool.latents[on_device],
            self.config.guidance_scale,
            (lambda step: noise.draw(chosen)) if self.plan.stochastic else None,
            guidance_interval=self.guidance_interval,
            kernel=self.kernel,
            steps=steps,
            previous_x0=pool.x0[on_device] if self.plan.multistep and steps.start else None,
            x0_at=(steps.stop - 1,) if steps.stop < len(self.plan.timesteps) else (),
        )
        with noise.taken_back_on_error(chosen):
            last = deque(states, maxlen=1).pop()
        pool.put(rows, steps, last)
        return len(rows)
