"""Scores of sampled candidates: on-trajectory scores from recorded curves, pointwise scores from the denoiser."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mi_ray.config import POINTWISE_SCORES, ScoreConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.diffusion.fitting import fitting
from mi_ray.diffusion.sampling import Trajectory
from mi_ray.diffusion.schedules import Schedule
from mi_ray.information import pointwise, trajectory
from mi_ray.information.probes import Design, Probes, draw_probes
from mi_ray.language.sources import negatives_by
from mi_ray.scoring.branches import encode_each, hard_negatives, likeliest_errors
from mi_ray.scoring.sampler import derived_seed
from mi_ray.scoring.work import Work

NEIGHBOUR_POOL = 2000  # number of prompts that are searched for neighbours; limits memory for long prompt lists


def trajectory_scores(
    config: ScoreConfig,
    delta_sq: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    cross: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
) -> dict[str, Tensor]:
    """The on-trajectory scores in config.names from recorded or stored curves (n, S): {name: (n,)}.

    A curve is NaN at steps without guidance. The configuration allows such steps only outside the band, and only for
    `trajectory_banded`.

    Args:
        cross: needed by rfmi and rfmi_guided.
        guidance_scale: of the sampling, one or (n,); needed by rfmi_guided.
    """
    times = schedule.alpha_sigma(timesteps)[1]  # of a flow: s, its sigma
    scale = guidance_scale[:, None] if isinstance(guidance_scale, Tensor) else guidance_scale
    by_name = {
        "mitune": lambda curve, cross: trajectory.mitune(curve, timesteps, schedule),
        "mitune_eq2": lambda curve, cross: trajectory.mitune_eq2(curve, timesteps, schedule),
        "asd": lambda curve, cross: trajectory.asd(curve),
        "rfmi": lambda curve, cross: trajectory.rfmi(cross, times),
        "rfmi_guided": lambda curve, cross: trajectory.rfmi_guided(cross, curve, times, scale),
        "flow_difference": lambda curve, cross: trajectory.flow_difference(curve, times),
    }
    scores = {name: score(delta_sq, cross) for name, score in by_name.items() if name in config.names}
    if "trajectory_banded" in config.names:
        band = schedule.log_snr_at(timesteps), config.log_snr_min, config.log_snr_max
        curves = [None if curve is None else trajectory.banded(curve, *band) for curve in (delta_sq, cross)]
        scores["trajectory_banded"] = by_name[config.banded](*curves)
    return scores


def probed_band(config: ScoreConfig, schedule: Schedule) -> tuple[float, float]:
    """The band of log SNR of the pmi scores: the configured band, limited to the model's noise levels.

    Raises:
        ValueError: the band contains none of the model's noise levels.
    """
    return known_band(*config.probed_band, schedule)


def known_band(low: float, high: float, schedule: Schedule) -> tuple[float, float]:
    """A band of log SNR, limited to the model's noise levels.

    Raises:
        ValueError: the band contains none of the model's noise levels.
    """
    noisiest, clearest = schedule.log_snr_range
    if high <= noisiest or clearest <= low:
        raise ValueError(
            f"log_snr_min {low:g} to log_snr_max {high:g} is outside the model's noise levels, {noisiest:.2f} to"
            f" {clearest:.2f}; move the band into this range"
        )
    return max(low, noisiest), min(high, clearest)


def probe_design(config: ScoreConfig) -> Design:
    """The configured distribution of the probes over the band."""
    loc = config.logistic_loc if config.sampling == "logistic" else None
    return Design(loc, config.logistic_scale, config.levels, config.antithetic)


def draw_probes_of(prompts: list[str], config: ScoreConfig, seed: int, denoiser: Denoiser) -> Probes:
    """The probes of each prompt, the same for all its candidates and branches. They depend only on prompt and seed.

    Raises:
        ValueError: the configured band contains none of the model's noise levels.
    """
    return draw_probes(
        [derived_seed(seed, "probes", prompt) for prompt in prompts],
        config.num_samples,
        *probed_band(config, denoiser.schedule),
        denoiser.latent_shape,
        probe_design(config),
        level_seed=derived_seed(seed, "levels"),
    )


class Scorer:
    """Computes the columns score_<name> from trajectories and latents."""

    def __init__(self, denoiser: Denoiser, config: ScoreConfig, batch_size: int, seed: int, pool: list[str]):
        self.denoiser, self.config, self.batch_size, self.seed = denoiser, config, batch_size, seed
        self.null = denoiser.encode_prompts([""])
        self.negatives = negatives_by(config.negatives)
        self.pool = pool[:NEIGHBOUR_POOL] if "pmi_contrastive" in config.names else []
        chunks = [self.pool[i : i + 256] for i in range(0, len(self.pool), 256)]
        self.pool_conditioning = Conditioning.cat(map(denoiser.encode_prompts, chunks)) if chunks else None

    def neighbours(self, prompts: list[str], conditioning: Conditioning) -> Tensor:
        """The J other prompts nearest to each prompt in text-encoder space: rows (P, J) of `pool_conditioning`."""
        distance = self.denoiser.prompt_distances(conditioning, self.pool_conditioning)
        for row, prompt in enumerate(prompts):
            distance[row, [column for column, other in enumerate(self.pool) if other == prompt]] = torch.inf
        return distance.topk(min(self.config.neighbours, len(self.pool) - 1), largest=False).indices

    def __call__(
        self, prompts: list[str], conditioning: Conditioning, index: Tensor, sampled: Trajectory, work: Work
    ) -> dict[str, list[float]]:
        """Score the N candidates of P prompts.

        Args:
            conditioning: of the prompts, P rows.
            index: (N,) prompt of each candidate.

        Returns:
            {score_<name>: N values in nats}, and for pointwise scores {score_<name>_se: N standard errors}.
        """
        config = self.config
        curves = sampled.delta_sq, sampled.timesteps, self.denoiser.schedule, sampled.cross, sampled.guidance_scale
        scores = trajectory_scores(config, *curves)
        columns = {f"score_{name}": values.cpu().tolist() for name, values in scores.items()}
        if any(name in POINTWISE_SCORES for name in config.names):
            args = (prompts, conditioning, index, sampled.latents, work)
            room = self.denoiser.make_room
            for name, (value, standard_error) in fitting(self, partial(self._pointwise, *args), work, room).items():
                columns[f"score_{name}"] = value.cpu().tolist()
                columns[f"score_{name}_se"] = standard_error.cpu().tolist()
        return columns

    def _pointwise(self, prompts: list[str], conditioning: Conditioning, index: Tensor, latents: Tensor, work: Work):
        began = time.perf_counter()
        config = self.config
        branches = conditioning, torch.arange(len(prompts))[:, None]
        if "pmi" in config.names or "pmi_orthogonal" in config.names:
            branches = pointwise.beside(conditioning, self.null)
        probes = draw_probes_of(prompts, config, self.seed, self.denoiser)
        errors, distances = pointwise.denoising_statistics(
            self.denoiser.predict_epsilon,
            self.denoiser.schedule,
            latents,
            index,
            *branches,
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
            nearest = self.neighbours(prompts, conditioning).cpu()
            contrast = partial(pointwise.pmi_contrastive, total=nearest.shape[1])
            others = self.pool_conditioning, list(nearest)
            scores["pmi_contrastive"] = self._compared(*others, contrast, index, latents, own, probes, work)
        if "pmi_negatives" in config.names:
            negatives = [
                hard_negatives(self.denoiser, self.negatives, prompt, config.max_negatives) for prompt in prompts
            ]
            # A prompt without negatives is compared with the empty prompt.
            others = encode_each(self.denoiser, [[n.prompt for n in of_prompt] or [""] for of_prompt in negatives])
            scores["pmi_negatives"] = self._compared(*others, pointwise.log_odds, index, latents, own, probes, work)
        work.timed("score", began)
        return scores

    def _compared(
        self,
        others: Conditioning,
        branches: list[Tensor],
        score: Callable[[Tensor, Tensor, Probes], pointwise.Estimate],
        index: Tensor,
        latents: Tensor,
        own: Tensor,
        probes: Probes,
        work: Work,
    ) -> pointwise.Estimate:
        """Score of each candidate from the comparison of its own prompt with other prompts, (N,).

        Args:
            others: conditioning of all other prompts, one row per prompt.
            branches: for each prompt, the rows (J,) of `others` that it is compared with, at least one.
            own: (N, K) errors under the candidates' own prompts, at the same probes.
        """
        config = self.config
        found = likeliest_errors(
            self.denoiser,
            latents,
            index,
            others,
            branches,
            probes,
            2 * self.batch_size,
            count=config.shortlist or max(map(len, branches)),
            first=config.shortlist_samples if config.shortlist else config.num_samples,
        )
        work.score_evaluations += found.evaluations
        scored = [score(e[None], of_others[None], probes) for e, of_others in zip(own, found.errors, strict=True)]
        return pointwise.Estimate(*map(torch.cat, zip(*scored, strict=True)))
