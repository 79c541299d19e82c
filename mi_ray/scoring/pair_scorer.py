"""What one actor does with pairs of image and caption: admit the images, score them, say which way they are wrong."""

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

CLEAR = 2.0  # standard errors by which an alternative must lead


# ---------------------------------------------------------------------------------------------- images
class _Encoded(NamedTuple):
    """n pairs, ready for the denoiser."""

    latents: Tensor  # (n, *latent_shape)
    conditioning: Conditioning  # n rows
    index: Tensor  # (n,), each pair is its own prompt
    probes: Probes


class PairScorer:
    """Scores pairs: i_s, the log odds against hard negatives with the contradicted words, and the words' shares.

    A pair's scores depend on the pair, the configuration and the seed, not on the pairs beside it.
    """

    def __init__(self, denoiser: Denoiser, config: ScoreConfig, batch_size: int, seed: int, words: bool):
        self.denoiser, self.config, self.batch_size, self.seed, self.words = denoiser, config, batch_size, seed, words
        self.null = denoiser.encode_prompts([""])
        self.negatives = negatives_by(config.negatives)

    def __call__(self, images: np.ndarray, prompts: list[str], work: Work) -> list[dict]:
        """Score images (n, h, w, 3) uint8 with their prompts: a row of the scored columns for each."""
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
            row |= _verdict(own[i], errors[i, 1], others.errors[i], likely, encoded.probes)
            rows.append(row | {"words": _words(own[i], without[i], [word for word, _ in words], encoded.probes)})
        return rows

    def maps(self, images: np.ndarray, prompts: list[str]) -> InformationMaps:
        """Where in the images the information lies, with the probes of the scores."""
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


def _verdict(own: Tensor, null: Tensor, against: Tensor, negatives: list[Negative], probes: Probes) -> dict:
    """The lead over the likeliest alternative, one of the negatives or the empty prompt; the log odds against the
    negatives; and what the image contradicts. Errors: own (K,), null (K,), against (J, K).

    The empty prompt is among the alternatives since a caption may be wrong in a way that no negative mends. The image
    contradicts what the likeliest negative changes, if that leads the prompt by more than `CLEAR` standard errors of
    the difference.
    """
    names = ("score_pmi_negatives", "score_pmi_negatives_se", "posterior")
    told = ("contradicted_attribute", "contradicted_kind", "contradicted", "instead", "instead_posterior")
    row = dict.fromkeys((*names, *told))
    lead, uncertainty = margin(own[None], torch.cat([null[None], against])[None], probes)
    row |= {"score_margin": lead.item(), "score_margin_se": finite(uncertainty.item())}
    if not negatives:
        return row
    value, standard_error = log_odds(own[None], against[None], probes)
    posterior = posteriors(own[None], against[None], probes)[0]
    row |= zip(names, (value.item(), finite(standard_error.item()), posterior[0].item()), strict=True)
    lead, uncertainty = margin(own[None], against[None], probes)
    best = int(posterior[1:].argmax())
    if lead < 0 and not -lead <= CLEAR * uncertainty:  # of a single probe the uncertainty is nan
        negative = negatives[best]
        change = (negative.attribute, negative.kind, negative.said, negative.instead, posterior[1 + best].item())
        row |= zip(told, change, strict=True)
    return row


def _words(own: Tensor, without: Tensor, words: list[str], probes: Probes) -> list[dict]:
    """log p(x|y) - log p(x|y without the word) of each word."""
    if not words:
        return []
    values, standard_errors = pmi(own.expand_as(without), without, probes)
    return [
        {"word": word, "value": value, "standard_error": finite(standard_error)}
        for word, value, standard_error in zip(words, values.tolist(), standard_errors.tolist(), strict=True)
    ]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
