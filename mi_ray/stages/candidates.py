"""What one actor does with its prompts: sample, score, measure, decode. Knows the device, not the cluster."""

import hashlib
import io
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mi_ray.alignment import oracle
from mi_ray.config import POINTWISE_SCORES, SamplerConfig, ScoreConfig
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.diffusion.sampling import Trajectory, candidate_noise, sample, solver_plan
from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information import pointwise, trajectory
from mi_ray.information.negatives import pmi_negatives
from mi_ray.language.negatives import chosen, negatives_by
from mi_ray.stages.branches import branch_errors

NEIGHBOUR_POOL = 2000  # prompts among which the nearest are sought; keeps memory flat however long the list is


def derived_seed(*parts: str | int) -> int:
    """A 63-bit seed that depends on all parts and on nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def encode_png(image: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@dataclass
class Work:
    """What was spent: denoiser evaluations of sampling and of pointwise scores, seconds inside each."""

    denoiser_evaluations: int = 0
    score_evaluations: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, began: float):
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


class Sampler:
    """Samples candidates of many prompts in full batches."""

    def __init__(self, denoiser: Denoiser, config: SamplerConfig, batch_size: int):
        self.denoiser, self.config, self.batch_size = denoiser, config, batch_size
        self.plan = solver_plan(
            denoiser.schedule, config.solver, config.num_inference_steps, timestep_spacing=config.timestep_spacing
        )
        self.null = denoiser.encode_prompts([""])

    def __call__(self, embeddings: Tensor, seeds: list[list[int]], work: Work) -> Trajectory:
        """Sample seeds[p] for each of the P prompts of embeddings (P, tokens, dim): sum of len(seeds[p]) candidates."""
        began = time.perf_counter()
        flat = [seed for of_prompt in seeds for seed in of_prompt]
        index = torch.repeat_interleave(torch.arange(len(seeds)), torch.tensor([len(s) for s in seeds]))
        parts = []
        for rows in torch.arange(len(flat)).split(self.batch_size):
            latents, step_noise = candidate_noise([flat[i] for i in rows.tolist()], self.denoiser.latent_shape)
            prompts = embeddings[index[rows].to(embeddings.device)]
            null = self.null.expand(len(rows), -1, -1)
            noise = step_noise if self.plan.stochastic else None
            scale = self.config.guidance_scale
            parts.append(sample(self.denoiser, self.plan, prompts, null, latents, scale, noise))
        work.denoiser_evaluations += 2 * len(flat) * len(self.plan.timesteps)
        work.timed("sample", began)
        joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("latents", "delta_sq", "cross")}
        return Trajectory(timesteps=parts[0].timesteps, **joined)


def trajectory_scores(
    config: ScoreConfig, delta_sq: Tensor, timesteps: Tensor, schedule: NoiseSchedule
) -> dict[str, Tensor]:
    """The on-trajectory scores of config.names from curves (n, S), just recorded or stored: {name: (n,)}."""
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


def probe_design(config: ScoreConfig) -> pointwise.Design:
    """How the configured probes are spread over their band."""
    loc = config.logistic_loc if config.sampling == "logistic" else None
    return pointwise.Design(loc, config.logistic_scale, config.levels, config.antithetic)


def draw_probes_of(
    prompts: list[str], config: ScoreConfig, seed: int, latent_shape: tuple[int, ...]
) -> pointwise.Probes:
    """The probes that all candidates and branches of each prompt meet; a prompt's depend on it and the seed alone."""
    return pointwise.draw_probes(
        [derived_seed(seed, "probes", prompt) for prompt in prompts],
        config.num_samples,
        *config.probed_band,
        latent_shape,
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

    def _neighbours(self, prompts: list[str], embeddings: Tensor) -> Tensor:
        """Embeddings (P, J, tokens, dim) of the J other prompts nearest to each in the text encoder's space."""
        distance = torch.cdist(embeddings.flatten(1).float(), self.pool_embeddings.flatten(1).float())
        for row, prompt in enumerate(prompts):
            distance[row, [column for column, other in enumerate(self.pool) if other == prompt]] = torch.inf
        nearest = distance.topk(min(self.config.neighbours, len(self.pool) - 1), largest=False).indices
        return self.pool_embeddings[nearest]

    def __call__(
        self, prompts: list[str], embeddings: Tensor, index: Tensor, sampled: Trajectory, work: Work
    ) -> dict[str, list[float]]:
        """Score the N candidates of P prompts; index (N,) says whose each is. {score_<name>: N values in nats}."""
        config = self.config
        scores = trajectory_scores(config, sampled.delta_sq, sampled.timesteps, self.denoiser.schedule)
        if any(name in POINTWISE_SCORES for name in config.names):
            scores |= self._pointwise(prompts, embeddings, index, sampled.latents, work)
        return {f"score_{name}": scores[name].cpu().tolist() for name in config.names}

    def _pointwise(self, prompts: list[str], embeddings: Tensor, index: Tensor, latents: Tensor, work: Work):
        began = time.perf_counter()
        config = self.config
        branches = [embeddings[:, None]]
        with_null = "pmi" in config.names or "pmi_orthogonal" in config.names
        if with_null:
            branches.append(self.null.expand(len(prompts), -1, -1)[:, None])
        if "pmi_contrastive" in config.names:
            branches.append(self._neighbours(prompts, embeddings))
        probes = draw_probes_of(prompts, config, self.seed, self.denoiser.latent_shape)
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
        work.timed("score", began)
        scores = {}
        if "pmi" in config.names:
            scores["pmi"] = pointwise.pmi(errors[:, 0], errors[:, 1], probes).value
        if "pmi_orthogonal" in config.names:
            scores["pmi_orthogonal"] = pointwise.pmi_orthogonal(distances[:, 0], probes).value
        if "pmi_contrastive" in config.names:
            others = errors[:, 1 + with_null :]
            scores["pmi_contrastive"] = pointwise.pmi_contrastive(errors[:, 0], others, probes)
        if "pmi_negatives" in config.names:
            scores["pmi_negatives"] = self._against_negatives(prompts, index, latents, errors[:, 0], probes, work)
        return scores

    def _against_negatives(
        self, prompts: list[str], index: Tensor, latents: Tensor, errors: Tensor, probes: pointwise.Probes, work: Work
    ) -> Tensor:
        """The log odds of each candidate's prompt against its hard negatives, (N,); nan where it has none.

        errors: (N, K) under the prompts themselves, at the probes that the negatives meet too.
        """
        began = time.perf_counter()
        negatives = [chosen(self.negatives(prompt), self.config.max_negatives) for prompt in prompts]
        texts = [[negative.prompt for negative in of_prompt] for of_prompt in negatives]
        others = branch_errors(self.denoiser, latents, index, texts, probes, 2 * self.batch_size)
        work.score_evaluations += sum(other.numel() for other in others)
        work.timed("score", began)
        scored = [
            pmi_negatives(own[None], other[None], probes)[0] if len(other) else own.new_full((1,), torch.nan)
            for own, other in zip(errors, others, strict=True)
        ]
        return torch.cat(scored)


def measured(images: np.ndarray, prompts: list[str], alignment: str | None) -> dict[str, list]:
    """Alignment metrics as columns; None where nothing is measured."""
    if alignment == "oracle":
        return oracle.measure(images, prompts)
    return {metric: [None] * len(prompts) for metric in oracle.METRICS}
