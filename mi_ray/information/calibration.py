"""Calibration: find the band of log SNR in which the contrastive score best ranks the candidates of a prompt.

With labels, a band is judged by its AUC within prompts. Without labels, it is judged by the model alone:

- An image must score higher with its own prompt than with similar prompts (neighbours). Otherwise the band does not
  measure what the prompt says.
- Two independent halves of the noise samples must both give this result. Otherwise the band measures the noise samples
  and not the images.

The agreement of the two halves on the order of a prompt's candidates is reported, but no band is chosen by it. At low
noise the model sees every detail of an image, right or wrong, so the agreement is highest where the score says least
about the prompt.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True)
class Band:
    """The quality of a band of log SNR; `auc` is None without labels."""

    log_snr_min: float
    log_snr_max: float
    agreement: float  # correlation of the two halves within a prompt, mean over prompts, in [-1, 1]
    contrast: float  # share of neighbours that score below the own prompt, in [0, 1]
    label_free: float  # share of neighbours that score below the own prompt in both halves, minus those above in both
    auc: float | None  # within prompts: how often the score and the labels order two candidates the same way


def judge_bands(
    errors: Tensor, log_snr_edges: Tensor, prompt_index: Tensor, labels: Tensor | None = None
) -> list[Band]:
    """Judge every band of consecutive noise levels.

    Args:
        errors: (N, 1 + J, K, 2) denoising errors of N candidates under their own prompt (first) and J neighbours. Each
            of the K noise levels represents the interval between two edges. The last dimension holds two independent
            noise samples.
        log_snr_edges: (K + 1,) increasing.
        prompt_index: (N,) prompt of each candidate.
        labels: (N,) how well each image shows its prompt, in any unit, higher is better: 1 or 0, or a metric. NaN:
            unknown.

    Raises:
        ValueError: labels are given, but no prompt has candidates with different labels.
    """
    log_likelihood = -0.5 * errors.double() * torch.diff(log_snr_edges.double())[:, None]
    up_to = torch.nn.functional.pad(log_likelihood.cumsum(2), (0, 0, 1, 0))  # (N, 1 + J, K + 1, 2)
    pairs = None if labels is None else _ordered_pairs(prompt_index, labels)
    bands = []
    for first, last in combinations(range(len(log_snr_edges)), 2):
        inside = up_to[:, :, last] - up_to[:, :, first]  # (N, 1 + J, 2)
        wins = (inside[:, :1] > inside[:, 1:]).double()  # (N, J, 2)
        halves = inside[:, 0] - torch.logsumexp(inside[:, 1:], 1)  # a constant of the prompt does not change the order
        both = inside.mean(2)
        score = both[:, 0] - torch.logsumexp(both[:, 1:], 1)
        bands.append(
            Band(
                float(log_snr_edges[first]),
                float(log_snr_edges[last]),
                _agreement(halves, prompt_index),
                float((both[:, :1] > both[:, 1:]).double().mean()),
                float((wins.prod(2) - (1 - wins).prod(2)).mean()),
                None if pairs is None else _auc(score, *pairs),
            )
        )
    return bands


def _agreement(halves: Tensor, prompt_index: Tensor) -> float:
    """Correlation of two columns (N, 2) within prompts, averaged over prompts."""
    correlations = []
    for prompt in prompt_index.unique():
        centred = halves[prompt_index == prompt]
        centred = centred - centred.mean(0)
        norms = centred.norm(dim=0).prod()
        correlations.append(float(centred.prod(1).sum() / norms) if norms > 0 else 0.0)
    return sum(correlations) / len(correlations)


def _ordered_pairs(prompt_index: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs (better, worse) of candidates of one prompt, and the weight of each pair in the mean over prompts."""
    better, worse, share = [], [], []
    for prompt in prompt_index.unique():
        mine = (prompt_index == prompt).nonzero()[:, 0]
        pairs = (labels[mine][:, None] > labels[mine]).nonzero()  # a comparison with NaN is false
        better.append(mine[pairs[:, 0]])
        worse.append(mine[pairs[:, 1]])
        share.append(torch.full((len(pairs),), 1 / max(len(pairs), 1), dtype=torch.float64))
    shares = torch.cat(share)
    if not len(shares):
        raise ValueError(
            "no prompt has candidates with different labels, so bands cannot be compared; give more labels"
        )
    return torch.cat(better), torch.cat(worse), shares / shares.sum()


def _auc(score: Tensor, better: Tensor, worse: Tensor, share: Tensor) -> float:
    """AUC within prompts, mean over prompts; a tie counts as one half."""
    wins = (score[better] > score[worse]).double() + 0.5 * (score[better] == score[worse]).double()
    return float((wins * share).sum())
