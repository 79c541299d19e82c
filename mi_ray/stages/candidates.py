"""What one actor does with its prompts: sample, score, measure, decode. Knows the device, not the cluster."""

import hashlib
import io
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mi_ray.alignment import oracle
from mi_ray.config import POINTWISE_SCORES, ModelConfig, SamplerConfig, ScoreConfig
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.diffusion.fitting import fitting
from mi_ray.diffusion.kernels import choose_kernel
from mi_ray.diffusion.sampling import CandidateNoise, State, Trajectory, sampling_steps, solver_plan
from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information import pointwise, trajectory
from mi_ray.language.negatives import negatives_by
from mi_ray.stages.branches import encode_each, hard_negatives, likeliest_errors
from mi_ray.stages.work import Work

NEIGHBOUR_POOL = 2000  # prompts among which the nearest are sought; keeps memory flat however long the list is


def derived_seed(*parts: str | int) -> int:
    """A 63-bit seed that depends on all parts and on nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def encode_png(image: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


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
        return Trajectory(self.x0[rows], self.timesteps[:steps], self.delta_sq[rows, :steps], self.cross[rows, :steps])

    def finished(self) -> Trajectory:
        return Trajectory(self.latents, self.timesteps, self.delta_sq, self.cross)


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
        self.guided = self.plan.guided(config.guidance_interval)
        self.null = denoiser.encode_prompts([""])

    def __call__(self, embeddings: Tensor, seeds: list[list[int]], work: Work, cuts: Cuts | None = None) -> Trajectory:
        """Sample seeds[p] for each of the P prompts of embeddings (P, tokens, dim): sum of len(seeds[p]) candidates.

        Args:
            cuts: where candidates drop out. Those that are left are packed into full batches again, whatever their
                prompts; a dropped one's latents are those of its last step, its curves NaN from there on.
        """
        noise = CandidateNoise([seed for of_prompt in seeds for seed in of_prompt], self.denoiser.latent_shape)
        latents = noise.draw().to(self.denoiser.device)
        curve = torch.full((len(latents), len(self.plan.timesteps)), torch.nan, device=latents.device)
        owner = torch.arange(len(seeds)).repeat_interleave(torch.tensor([len(s) for s in seeds]))
        pool = Pool(owner, self.plan.timesteps, latents, None, curve, curve.clone())
        rows, start = torch.arange(len(latents)), 0
        for stop in (*(cuts.after if cuts else ()), len(self.plan.timesteps)):
            began = time.perf_counter()
            left = rows
            while len(left):
                advance = partial(self._advance, pool, left, range(start, stop), embeddings, noise)
                done = fitting(self, advance, work)
                left = left[done:]
            work.denoiser_evaluations += len(rows) * sum(1 + guided for guided in self.guided[start:stop])
            work.timed("sample", began)
            if stop < len(self.plan.timesteps):
                rows, start = cuts.survivors(pool, rows, stop), stop
        return pool.finished()

    def _advance(self, pool: Pool, rows: Tensor, steps: range, embeddings: Tensor, noise: CandidateNoise) -> int:
        """Take the first batch of some candidates through some steps; returns how many it held."""
        rows = even_batches(rows, self.batch_size)[0]
        on_device = rows.to(pool.latents.device)
        chosen = rows.tolist()
        states = sampling_steps(
            self.denoiser,
            self.plan,
            embeddings[pool.owner[rows].to(embeddings.device)],
            self.null,
            pool.latents[on_device],
            self.config.guidance_scale,
            (lambda step: noise.draw(chosen)) if self.plan.stochastic else None,
            guidance_interval=self.config.guidance_interval,
            kernel=self.kernel,
            steps=steps,
            previous_x0=pool.x0[on_device] if self.plan.multistep and steps.start else None,
            x0_at=(steps.stop - 1,) if steps.stop < len(self.plan.timesteps) else (),
        )
        with noise.taken_back_on_error(chosen):
            last = deque(states, maxlen=1).pop()
        pool.put(rows, steps, last)
        return len(rows)


def trajectory_scores(
    config: ScoreConfig, delta_sq: Tensor, timesteps: Tensor, schedule: NoiseSchedule
) -> dict[str, Tensor]:
    """The on-trajectory scores of config.names from curves (n, S), just recorded or stored: {name: (n,)}.

    A curve is NaN where there was no guidance, which the configuration grants to `trajectory_banded` outside its band.
    """
    by_name = {
        "mitune": lambda curve: trajectory.mitune(curve, timesteps, schedule),
        "mitune_eq2": lambda curve: trajectory.mitune_eq2(curve, timesteps, schedule),
        "asd": trajectory.asd,
    }
    scores = {name: score(delta_sq) for name, score in by_name.items() if name in config.names}
    if "trajectory_banded" in config.names:
        log_snr = schedule.log_snr[timesteps.long().cpu()]
        curve = trajectory.banded(delta_sq, log_snr, config.log_snr_min, config.log_snr_max)
        scores["trajectory_banded"] = by_name[config.banded](curve)
    return scores


def probed_band(config: ScoreConfig, schedule: NoiseSchedule) -> tuple[float, float]:
    """The log SNRs over which the pmi scores integrate: what is configured, as far as the model knows such noise.

    Raises:
        ValueError: it knows none of them.
    """
    return known_band(*config.probed_band, schedule)


def known_band(low: float, high: float, schedule: NoiseSchedule) -> tuple[float, float]:
    """A band of log SNR, as far as the model knows such noise.

    Raises:
        ValueError: it knows none of it.
    """
    noisiest, clearest = schedule.log_snr[[-1, 0]].tolist()
    if high <= noisiest or clearest <= low:
        raise ValueError(
            f"log_snr_min {low:g} to log_snr_max {high:g} is not among the model's noise levels, {noisiest:.2f} to"
            f" {clearest:.2f}; move the band"
        )
    return max(low, noisiest), min(high, clearest)


def probe_design(config: ScoreConfig) -> pointwise.Design:
    """How the configured probes are spread over their band."""
    loc = config.logistic_loc if config.sampling == "logistic" else None
    return pointwise.Design(loc, config.logistic_scale, config.levels, config.antithetic)


def draw_probes_of(prompts: list[str], config: ScoreConfig, seed: int, denoiser: Denoiser) -> pointwise.Probes:
    """The probes that all candidates and branches of each prompt meet; a prompt's depend on it and the seed alone.

    Raises:
        ValueError: the configured band reaches none of the model's noise levels.
    """
    return pointwise.draw_probes(
        [derived_seed(seed, "probes", prompt) for prompt in prompts],
        config.num_samples,
        *probed_band(config, denoiser.schedule),
        denoiser.latent_shape,
        probe_design(config),
        level_seed=derived_seed(seed, "levels"),
    )


class Scorer:
    """Turns trajectories and latents into the columns score_<name>."""

    def __init__(self, denoiser: Denoiser, config: ScoreConfig, batch_size: int, seed: int, pool: list[str]):
        self.denoiser, self.config, self.batch_size, self.seed = denoiser, config, batch_size, seed
        self.null = denoiser.encode_prompts([""])
        self.negatives = negatives_by(config.negatives)
        self.pool = pool[:NEIGHBOUR_POOL] if "pmi_contrastive" in config.names else []
        chunks = [self.pool[i : i + 256] for i in range(0, len(self.pool), 256)]
        self.pool_embeddings = torch.cat([denoiser.encode_prompts(chunk) for chunk in chunks]) if chunks else None

    def neighbours(self, prompts: list[str], embeddings: Tensor) -> Tensor:
        """Embeddings (P, J, tokens, dim) of the J other prompts nearest to each in the text encoder's space."""
        distance = torch.cdist(embeddings.flatten(1).float(), self.pool_embeddings.flatten(1).float())
        for row, prompt in enumerate(prompts):
            distance[row, [column for column, other in enumerate(self.pool) if other == prompt]] = torch.inf
        nearest = distance.topk(min(self.config.neighbours, len(self.pool) - 1), largest=False).indices
        return self.pool_embeddings[nearest]

    def __call__(
        self, prompts: list[str], embeddings: Tensor, index: Tensor, sampled: Trajectory, work: Work
    ) -> dict[str, list[float]]:
        """Score the N candidates of P prompts; index (N,) says whose each is.

        Returns:
            {score_<name>: N values in nats}, and of the pointwise ones {score_<name>_se: their standard errors}.
        """
        config = self.config
        scores = trajectory_scores(config, sampled.delta_sq, sampled.timesteps, self.denoiser.schedule)
        columns = {f"score_{name}": values.cpu().tolist() for name, values in scores.items()}
        if any(name in POINTWISE_SCORES for name in config.names):
            args = (prompts, embeddings, index, sampled.latents, work)
            for name, (value, standard_error) in fitting(self, partial(self._pointwise, *args), work).items():
                columns[f"score_{name}"] = value.cpu().tolist()
                columns[f"score_{name}_se"] = standard_error.cpu().tolist()
        return columns

    def _pointwise(self, prompts: list[str], embeddings: Tensor, index: Tensor, latents: Tensor, work: Work):
        began = time.perf_counter()
        config = self.config
        branches = [embeddings[:, None]]
        if "pmi" in config.names or "pmi_orthogonal" in config.names:
            branches.append(self.null.expand(len(prompts), -1, -1)[:, None])
        probes = draw_probes_of(prompts, config, self.seed, self.denoiser)
        errors, distances = pointwise.denoising_statistics(
            self.denoiser.predict_epsilon,
            self.denoiser.schedule,
            latents,
            index,
            torch.cat(branches, 1),
            probes,
            2 * self.batch_size,
            reference=1 if "pmi_orthogonal" in config.names else None,
        )
        work.score_evaluations += errors.numel()
        scores = {}
        if "pmi" in config.names:
            scores["pmi"] = pointwise.pmi(errors[:, 0], errors[:, 1], probes)
        if "pmi_orthogonal" in config.names:
            scores["pmi_orthogonal"] = pointwise.pmi_orthogonal(distances[:, 0], probes)
        own = errors[:, 0]
        if "pmi_contrastive" in config.names:
            others = list(self.neighbours(prompts, embeddings))
            contrast = partial(pointwise.pmi_contrastive, total=len(others[0]))
            scores["pmi_contrastive"] = self._against(others, contrast, index, latents, own, probes, work)
        if "pmi_negatives" in config.names:
            negatives = [
                hard_negatives(self.denoiser, self.negatives, prompt, config.max_negatives) for prompt in prompts
            ]
            # A prompt of which nothing can be changed is held against none at all.
            others = encode_each(self.denoiser, [[n.prompt for n in of_prompt] or [""] for of_prompt in negatives])
            scores["pmi_negatives"] = self._against(others, pointwise.log_odds, index, latents, own, probes, work)
        work.timed("score", began)
        return scores

    def _against(
        self,
        branches: list[Tensor],
        score: Callable[[Tensor, Tensor, pointwise.Probes], pointwise.Estimate],
        index: Tensor,
        latents: Tensor,
        own: Tensor,
        probes: pointwise.Probes,
        work: Work,
    ) -> pointwise.Estimate:
        """A score of each candidate's prompt against others, (N,).

        Args:
            branches: of each prompt, the embeddings (J, tokens, dim) of the others, at least one.
            own: (N, K) errors under the prompts themselves, at the probes that the others meet too.
        """
        config = self.config
        others = likeliest_errors(
            self.denoiser,
            latents,
            index,
            branches,
            probes,
            2 * self.batch_size,
            count=config.shortlist or max(map(len, branches)),
            first=config.shortlist_samples if config.shortlist else config.num_samples,
        )
        work.score_evaluations += others.evaluations
        scored = [score(e[None], against[None], probes) for e, against in zip(own, others.errors, strict=True)]
        return pointwise.Estimate(*map(torch.cat, zip(*scored, strict=True)))


def measured(images: np.ndarray, prompts: list[str], alignment: str | None) -> dict[str, list]:
    """Alignment metrics as columns; None where nothing is measured."""
    if alignment == "oracle":
        return oracle.measure(images, prompts)
    return {metric: [None] * len(prompts) for metric in oracle.METRICS}
