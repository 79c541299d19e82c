"""Best-of-N: of several candidates for each image, the one with the best score."""

import numpy as np
import torch

from mi_ray.config import RunConfig, SamplerConfig, ScoreConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import PipelineDenoiser
from mi_ray.diffusion.sampling import Trajectory
from mi_ray.scoring.pruning import Halving
from mi_ray.scoring.sampler import Cuts, Sampler, derived_seed
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work


def sampler_of(
    config: RunConfig,
    settings: SamplerConfig,
    drawing: PipelineDenoiser,
    judging: PipelineDenoiser,
    batch_size: int,
    pool: list[str] | None = None,
) -> "Sampler | BestOf":
    """The sampler with these settings, with best-of-N if it is set.

    Args:
        drawing: the model that samples.
        judging: the model that scores the candidates of best-of-N.
        pool: prompts among which the neighbours of a prompt are searched, for pmi_contrastive.
    """
    sampler = Sampler(drawing, settings, batch_size, config.model.kernel)
    return BestOf(sampler, judging, config.score, config.seed, pool or []) if settings.best_of.candidates else sampler


def evaluation_samplers(
    config: RunConfig, drawing: PipelineDenoiser, judging: PipelineDenoiser, batch_size: int
) -> "dict[float, Sampler | BestOf]":
    """The sampler of an evaluation at each guidance scale."""
    by_scale = config.evaluation.samplers.items()
    return {scale: sampler_of(config, settings, drawing, judging, batch_size) for scale, settings in by_scale}


class BestOf:
    """Samples the best of N candidates for each image. It is called like a `Sampler`.

    The first candidate of an image has the seed of the image, so it is the image without best-of-N. Each image has its
    own pool, whatever other images of the prompt there are. If the pool is pruned, candidates with a low score are not
    sampled to the end.

    Args:
        judging: the model that computes the scores.
        score: settings of the scores, whose names are not used.
    """

    def __init__(self, sampler: Sampler, judging: PipelineDenoiser, score: ScoreConfig, seed: int, pool: list[str]):
        best_of, steps = sampler.config.best_of, sampler.config.num_inference_steps
        self.sampler, self.count, self.by = sampler, best_of.candidates, best_of.by

        def scorer(by: str, num_samples: int) -> Scorer:
            one = score.model_copy(update={"names": (by,), "num_samples": num_samples})
            return Scorer(judging, one, sampler.batch_size, seed, pool)

        self.scorer = scorer(best_of.by, score.num_samples)
        self.cuts = best_of.prune.cuts(steps, best_of.candidates)
        self.cut_scorer = scorer(best_of.prune.by, best_of.prune.num_samples) if self.cuts else None

    def __call__(
        self,
        conditioning: Conditioning,
        seeds: list[list[int]],
        work: Work,
        cuts: Cuts | None = None,
        prompts: list[str] | None = None,
    ) -> Trajectory:
        """The trajectories of the best candidates, in the order of the seeds.

        Args:
            cuts: must be None; the pools have their own cuts.
            prompts: P texts.

        Raises:
            ValueError: there are cuts, or no prompts.
        """
        if cuts is not None or prompts is None:
            raise ValueError("best-of-N needs the texts of the prompts and has its own cuts; give prompts, and no cuts")
        owner = [p for p, of_prompt in enumerate(seeds) for _ in of_prompt]
        images, texts = conditioning.rows(torch.tensor(owner)), [prompts[p] for p in owner]
        own = [seed for of_prompt in seeds for seed in of_prompt]
        pools = [[seed, *(derived_seed(seed, "best of", k) for k in range(1, self.count))] for seed in own]
        carried = np.zeros(len(own) * self.count, bool)
        halving = Halving(self.cuts, self.cut_scorer, texts, images, carried, work) if self.cuts else None
        sampled = self.sampler(images, pools, work, halving, texts)
        rows = torch.arange(len(carried)) if halving is None else torch.from_numpy(halving.finished).nonzero()[:, 0]
        index = torch.arange(len(own)).repeat_interleave(self.count)
        scores = self.scorer(texts, images, index[rows], sampled.of(rows), work)[f"score_{self.by}"]
        worth = np.full(len(carried), -np.inf)
        worth[rows.numpy()] = np.nan_to_num(scores, nan=-np.inf, posinf=-np.inf)
        best = worth.reshape(-1, self.count).argmax(1) + self.count * np.arange(len(own))
        return sampled.of(torch.from_numpy(best))
