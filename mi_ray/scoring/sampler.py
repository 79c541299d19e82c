"""Samples the candidates of prompts in full batches on one device, with cuts of the pool on the way."""

import hashlib
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mi_ray.config import GuidanceMethod, ModelConfig, SamplerConfig
from mi_ray.config.guidance import READS_ATTENTION
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.diffusion.fitting import fitting
from mi_ray.diffusion.kernels import choose_kernel
from mi_ray.diffusion.sampling import CandidateNoise, State, Trajectory, sampling_steps, solver_plan
from mi_ray.guidance.guide import Guide, Setting
from mi_ray.guidance.methods import guide_maker
from mi_ray.scoring.work import Work

NOWHERE = (math.inf, -math.inf)  # an empty interval of log SNR: no guidance at any step


def derived_seed(*parts: str | int) -> int:
    """A 63-bit seed that depends only on these parts."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def batch_at_size(denoiser: Denoiser, batch_size: int) -> int:
    """Number of candidates in a denoiser batch, at least one. `batch_size` is that number at the model's own size.

    Both batches have the same number of latent tokens, so they need about the same time and memory. An image of half
    the height and width has a quarter of the tokens, so its batch has four times as many candidates.
    """
    own, here = (math.prod(shape[1:]) for shape in (denoiser.own_latent_shape, denoiser.latent_shape))
    return max(1, batch_size * own // here)


def specialise(denoiser: Denoiser, config: ModelConfig, batch_size: int, method: GuidanceMethod | None = None):
    """Make the denoiser faster for these batch sizes, as configured. Its outputs stay the same.

    Args:
        method: guidance method; the network is not compiled automatically if the method reads its attention layers.
    """
    rows = (batch_size, 2 * batch_size)  # one branch, both branches; scoring uses the latter
    compiled = None if config.compile == "auto" and method in READS_ATTENTION else config.compile
    denoiser.specialise(channels_last=config.channels_last, compiled=compiled, rows=rows)


@dataclass(eq=False)
class Pool:
    """The state of N candidates during sampling."""

    owner: Tensor  # (N,) long on the CPU: prompt of each candidate
    timesteps: Tensor  # (S,) of all steps
    latents: Tensor  # (N, *latent_shape) fp32: x_t; clean latents after the last step
    x0: Tensor | None  # (N, *latent_shape) fp32: last prediction of the clean latents; None if not needed yet
    delta_sq: Tensor  # (N, S) fp32, NaN for steps that a candidate has not done
    cross: Tensor  # (N, S) fp32, likewise
    guidance_scale: float
    recorded: tuple[int, ...] = ()  # steps that are stored in `transitions`
    transitions: Tensor | None = None  # as in Trajectory

    def put(self, rows: Tensor, steps: range, state: State):
        """Store the state of the candidates `rows` after `steps`."""
        rows = rows.to(self.latents.device)
        self.latents[rows] = state.latents
        if state.x0 is not None:
            self.x0 = torch.empty_like(self.latents) if self.x0 is None else self.x0
            self.x0[rows] = state.x0
        for curve, new in ((self.delta_sq, state.delta_sq), (self.cross, state.cross)):
            curve[rows, steps.start : steps.stop] = new[:, steps.start : steps.stop]

    def so_far(self, rows: Tensor, steps: int) -> Trajectory:
        """Candidates after their first steps, to be scored like finished ones, with the predicted x0 as latents."""
        rows = rows.to(self.latents.device)
        curves = self.delta_sq[rows, :steps], self.cross[rows, :steps]
        return Trajectory(self.x0[rows], self.timesteps[:steps], *curves, self.guidance_scale)

    def finished(self) -> Trajectory:
        curves = self.delta_sq, self.cross
        return Trajectory(self.latents, self.timesteps, *curves, self.guidance_scale, self.transitions)


class Cuts(Protocol):
    """The cuts of a pool during sampling."""

    after: tuple[int, ...]  # numbers of steps after which the pool is cut, rising

    def survivors(self, pool: Pool, rows: Tensor, steps: int) -> Tensor:
        """The candidates among `rows` that continue after `steps` steps."""


def even_batches(rows: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """The smallest number of batches of at most `batch_size` rows, of almost equal size: the last one is not small."""
    return rows.tensor_split(max(1, -(-len(rows) // batch_size)))


class Sampler:
    """Samples candidates of many prompts in full batches.

    Args:
        kernel: kernel of the solver step, see `diffusion.kernels.choose_kernel`.
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
        setting = Setting(denoiser, self.plan, self.null, config.guidance_scale, config.guidance_settings)
        self.guide_of = guide_maker(config.guidance_method, setting) if config.guidance_method else None

    def __call__(
        self,
        conditioning: Conditioning,
        seeds: list[list[int]],
        work: Work,
        cuts: Cuts | None = None,
        prompts: list[str] | None = None,
        recorded: tuple[int, ...] = (),
    ) -> Trajectory:
        """Sample seeds[p] for each of P prompts: N candidates, the sum of len(seeds[p]).

        Args:
            conditioning: of the prompts, P rows.
            cuts: after each cut, the remaining candidates of all prompts are packed into full batches again. A pruned
                candidate has the latents of its last step, and its curves are NaN after that.
            prompts: P texts; a guidance method needs them.
            recorded: steps whose transitions are returned; each must add noise.

        Raises:
            ValueError: there is a guidance method, but prompts is None.
        """
        if self.guide_of and prompts is None:
            raise ValueError(f"guidance_method {self.config.guidance_method} reads the prompts; give their texts")
        noise = CandidateNoise([seed for of_prompt in seeds for seed in of_prompt], self.denoiser.latent_shape)
        latents = noise.draw().to(self.denoiser.device)
        curve = torch.full((len(latents), len(self.plan.timesteps)), torch.nan, device=latents.device)
        owner = torch.arange(len(seeds)).repeat_interleave(torch.tensor([len(s) for s in seeds]))
        scale = self.config.guidance_scale
        pool = Pool(owner, self.plan.timesteps, latents, None, curve, curve.clone(), scale, recorded)
        if recorded:
            pool.transitions = latents.new_empty(len(latents), len(recorded), 2, *latents.shape[1:])
        guide = self.guide_of and self.guide_of(prompts, conditioning)
        rows, start = torch.arange(len(latents)), 0
        for stop in (*(cuts.after if cuts else ()), len(self.plan.timesteps)):
            began = time.perf_counter()
            left = rows
            while len(left):
                advance = partial(self._advance, pool, left, range(start, stop), conditioning, noise, guide)
                done, spent = fitting(self, advance, work, self.denoiser.make_room)
                left = left[done:]
                work.denoiser_evaluations += spent
            work.denoiser_evaluations += len(rows) * sum(1 + guided for guided in self.guided[start:stop])
            work.timed("sample", began)
            if stop < len(self.plan.timesteps):
                rows, start = cuts.survivors(pool, rows, stop), stop
        return pool.finished()

    def _advance(
        self,
        pool: Pool,
        rows: Tensor,
        steps: range,
        conditioning: Conditioning,
        noise: CandidateNoise,
        guide: Guide | None,
    ) -> tuple[int, int]:
        """Run the first batch of the candidates `rows` through `steps`.

        Returns:
            The number of candidates in the batch, and of denoiser evaluations besides one per branch and step.
        """
        rows = even_batches(rows, self.batch_size)[0]
        on_device = rows.to(pool.latents.device)
        chosen = rows.tolist()
        guide = guide and guide.rows(pool.owner[rows])
        latents = pool.latents[on_device]
        x0 = pool.x0[on_device] if self.plan.multistep and steps.start else None
        states = sampling_steps(
            self.denoiser,
            self.plan,
            conditioning.rows(pool.owner[rows]),
            self.null,
            latents,
            self.config.guidance_scale,
            (lambda step: noise.draw(chosen)) if self.plan.stochastic else None,
            guidance_interval=self.guidance_interval,
            kernel=self.kernel,
            steps=steps,
            previous_x0=x0,
            x0_at=(steps.stop - 1,) if steps.stop < len(self.plan.timesteps) else (),
            guide=guide,
        )
        with noise.restored_on_error(chosen):
            for state in states:
                if state.step in pool.recorded:
                    target = self.plan.target(state.step, latents, x0, state.latents)
                    pool.transitions[on_device, pool.recorded.index(state.step)] = torch.stack([latents, target], 1)
                latents, x0 = state.latents, state.x0
        pool.put(rows, steps, state)
        return len(rows), guide.evaluations if guide else 0
