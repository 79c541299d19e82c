"""Sampling and scoring at another size than the model's own: batches by latent tokens, and scores of pairs."""

import numpy as np
import pytest
import torch

from mi_ray.config import SamplerConfig, ScoreConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.pair_config import ScorePairsConfig
from mi_ray.scoring.pair_scorer import PairScorer
from mi_ray.scoring.sampler import Sampler, batch_at_size
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work


@pytest.mark.parametrize(
    ("size", "batch"),
    [
        ((64, 64), 12),
        ((None, None), 12),
        ((32, 32), 48),
        ((128, 64), 6),
        ((128, 128), 3),
        ((96, 80), 6),
        ((512, 512), 1),
    ],
)
def test_batch_has_the_same_number_of_latent_tokens_at_every_size(tiny_pipeline, size, batch):
    assert batch_at_size(load_denoiser(str(tiny_pipeline), size=size), 12) == batch


def test_candidates_and_pairs_of_another_size_are_scored(tiny_pipeline):
    denoiser = load_denoiser(str(tiny_pipeline), size=(96, 48))
    prompts, work = ["a red circle", "two hearts"], Work()
    conditioning = denoiser.encode_prompts(prompts)
    sampled = Sampler(denoiser, SamplerConfig(solver="ddim", num_inference_steps=3), 4)(
        conditioning, [[1, 2], [3]], work
    )
    names = ("mitune", "pmi", "pmi_contrastive", "pmi_negatives")
    scorer = Scorer(denoiser, ScoreConfig(names=names, num_samples=2, max_negatives=2), 4, 0, prompts)
    scores = scorer(prompts, conditioning, torch.tensor([0, 0, 1]), sampled, work)
    assert all(np.isfinite(scores[f"score_{name}"]).all() for name in names)
    images = denoiser.decode(sampled.latents)[1:]
    config = ScorePairsConfig(image="-", prompt="-").score.model_copy(update={"num_samples": 2, "max_negatives": 2})
    pairs = PairScorer(denoiser, config, 4, 0, words=False)
    assert all(np.isfinite(row["score_pmi"]) for row in pairs(images, prompts, work))
    assert pairs.maps(images, prompts).direct.shape == (2, 12, 6)
