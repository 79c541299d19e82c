"""Scores pairs of image and caption: PMI, log odds against hard negatives, contradicted words, share of each word."""

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mi_ray.config import ScoreConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.information.maps import InformationMaps, information_maps, without_each_word
from mi_ray.information.negatives import margin, posteriors
from mi_ray.information.pointwise import beside, denoising_errors, log_odds, pmi
from mi_ray.information.probes import Probes
from mi_ray.language.negatives import Negative
from mi_ray.language.sources import negatives_by
from mi_ray.scoring.branches import branch_errors, encode_each, hard_negatives, likeliest_errors
from mi_ray.scoring.scorer import draw_probes_of
from mi_ray.scoring.work import Work

CLEAR = 2.0  # a negative must be likelier than the caption by this number of standard errors


# ---------------------------------------------------------------------------------------------- images
class _Encoded(NamedTuple):
    """n pairs, encoded for the denoiser."""

    latents: Tensor  # (n, *latent_shape)
    conditioning: Conditioning  # n rows
    index: Tensor  # (n,) prompt of each pair: 0 to n - 1
    probes: Probes


class PairScorer:
    """Scores pairs of image and caption. A pair's scores depend on the pair, the configuration and the seed only.

    Args:
        words: also compute the share of each word of the caption.
    """

    def __init__(self, denoiser: Denoiser, config: ScoreConfig, batch_size: int, seed: int, words: bool):
        self.denoiser, self.config, self.batch_size, self.seed, self.words = denoiser, config, batch_size, seed, words
        self.null = denoiser.encode_prompts([""])
        self.negatives = negatives_by(config.negatives)

    def __call__(self, images: np.ndarray, prompts: list[str], work: Work) -> list[dict]:
        """Score images (n, h, w, 3) uint8 with their prompts. Returns n rows with the score columns of `SCORED`."""
        began = time.perf_counter()
        encoded = self._encode(images, prompts)
        errors = denoising_errors(
            self.denoiser.predict_epsilon,
            self.denoiser.schedule,
            encoded.latents,
            encoded.index,
            *beside(encoded.conditioning, self.null),
            encoded.probes,
            2 * self.batch_size,
        )
        own = errors[:, 0]
        values, standard_errors = pmi(own, errors[:, 1], encoded.probes)
        negatives = [
            hard_negatives(self.denoiser, self.negatives, prompt, self.config.max_negatives) for prompt in prompts
        ]
        left_out = [without_each_word(prompt) if self.words else [] for prompt in prompts]
        others = likeliest_errors(
            self.denoiser,
            encoded.latents,
            encoded.index,
            *encode_each(self.denoiser, [[n.prompt for n in of_prompt] for of_prompt in negatives]),
            encoded.probes,
            2 * self.batch_size,
            count=self.config.shortlist or self.config.max_negatives,
            first=self.config.shortlist_samples if self.config.shortlist else self.config.num_samples,
        )
        without = branch_errors(
            self.denoiser,
            encoded.latents,
            encoded.index,
            *encode_each(self.denoiser, [[text for _, text in words] for words in left_out]),
            encoded.probes,
            2 * self.batch_size,
        )
        work.score_evaluations += errors.numel() + others.evaluations + sum(w.numel() for w in without)
        work.timed("score", began)
        rows = []
        for i, (of_prompt, words) in enumerate(zip(negatives, left_out, strict=True)):
            row = {"score_pmi": values[i].item(), "score_pmi_se": finite(standard_errors[i].item())}
            likely = [of_prompt[kept] for kept in others.kept[i].tolist()]
            row |= _comparison(own[i], errors[i, 1], others.errors[i], likely, encoded.probes)
            rows.append(row | {"words": _words(own[i], without[i], [word for word, _ in words], encoded.probes)})
        return rows

    def maps(self, images: np.ndarray, prompts: list[str]) -> InformationMaps:
        """The maps of PMI over the images (n, h, w, 3) uint8, from the same probes as the scores."""
        encoded = self._encode(images, prompts)
        return information_maps(
            self.denoiser.predict_epsilon,
            self.denoiser.schedule,
            encoded.latents,
            encoded.index,
            encoded.conditioning,
            self.null,
            encoded.probes,
            2 * self.batch_size,
        )

    def _encode(self, images: np.ndarray, prompts: list[str]) -> _Encoded:
        probes = draw_probes_of(prompts, self.config, self.seed, self.denoiser)
        latents, conditioning = self.denoiser.encode_images(images), self.denoiser.encode_prompts(prompts)
        return _Encoded(latents, conditioning, torch.arange(len(prompts)), probes)


def _comparison(own: Tensor, null: Tensor, others: Tensor, negatives: list[Negative], probes: Probes) -> dict:
    """The columns that compare the caption with other prompts: score_margin, score_pmi_negatives and contradicted.

    score_margin compares with the likeliest of the negatives and the empty prompt. The empty prompt is included because
    a caption can be wrong in a way that no negative corrects. The image contradicts the words that the likeliest
    negative changes, if it is likelier than the caption by more than `CLEAR` standard errors of the difference.

    Args:
        own, null: (K,) errors under the caption and under the empty prompt.
        others: (J, K) errors under the negatives.
    """
    names = ("score_pmi_negatives", "score_pmi_negatives_se", "posterior")
    contradiction = ("contradicted_attribute", "contradicted_kind", "contradicted", "instead", "instead_posterior")
    row = dict.fromkeys((*names, *contradiction))
    lead, uncertainty = margin(own[None], torch.cat([null[None], others])[None], probes)
    row |= {"score_margin": lead.item(), "score_margin_se": finite(uncertainty.item())}
    if not negatives:
        return row
    value, standard_error = log_odds(own[None], others[None], probes)
    posterior = posteriors(own[None], others[None], probes)[0]
    row |= zip(names, (value.item(), finite(standard_error.item()), posterior[0].item()), strict=True)
    lead, uncertainty = margin(own[None], others[None], probes)
    best = int(posterior[1:].argmax())
    if lead < 0 and not -lead <= CLEAR * uncertainty:  # the uncertainty of a single probe is NaN
        negative = negatives[best]
        change = (negative.attribute, negative.kind, negative.original, negative.instead, posterior[1 + best].item())
        row |= zip(contradiction, change, strict=True)
    return row


def _words(own: Tensor, without: Tensor, words: list[str], probes: Probes) -> list[dict]:
    """log p(x|y) - log p(x|y without the word) of each word, nats."""
    if not words:
        return []
    values, standard_errors = pmi(own.expand_as(without), without, probes)
    return [
        {"word": word, "value": value, "standard_error": finite(standard_error)}
        for word, value, standard_error in zip(words, values.tolist(), standard_errors.tolist(), strict=True)
    ]


def finite(value: float) -> float | None:
    """The value, or None if it is NaN or infinite."""
    return value if math.isfinite(value) else None
