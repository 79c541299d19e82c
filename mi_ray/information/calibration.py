"""Calibration: the band of log SNR in which the contrastive score ranks the candidates of a prompt best.

With labels a band is judged by its AUC within prompts. Without, by what the model alone can tell: an image must score
higher with the prompt that it was made for than with the prompts next to it, or the band does not hear what the prompt
says, and independent halves of the noise draws must say so both, or the band measures the draws and not the images.

How far the halves agree on the order of a prompt's candidates is told too, but nothing is chosen by it: low noise shows
every detail of an image, right or wrong, so that there they agree best and on the least.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True)
class Band:
    """How a band of log SNR does; `auc` is None without labels."""

    log_snr_min: float
    log_snr_max: float
    agreement: float  # mean correlation of the two halves within prompts, in [-1, 1]
    contrast: float  # mean chance that the own prompt outscores a neighbour, in [0, 1]
    label_free: float  # share of neighbours that both halves put below the own prompt, less those both put above
    auc: float | None  # within prompts: how often the score orders two candidates as their labels do


def judge_bands(
    errors: Tensor, log_snr_edges: Tensor, prompt_index: Tensor, labels: Tensor | None = None
) -> list[Band]:
    """Judge every band of neighbouring levels.

    Args:
        errors: (N, 1 + J, K, 2) denoising errors of N candidates under the own prompt and J neighbours, at K levels
            that stand for the intervals between the edges, from two independent draws of noise each.
        log_snr_edges: (K + 1,) increasing.
        prompt_index: (N,) whose candidate each is.
        labels: (N,) how well each image shows its prompt, in any unit: 1 where it does and 0 elsewhere, or a metric;
            NaN: not known.

    Raises:
        ValueError: labels are given, and no prompt has candidates with different ones.
    """
    log_likelihood = -0.5 * errors.double() * torch.diff(log_snr_edges.double())[:, None]
    up_to = torch.nn.functional.pad(log_likelihood.cumsum(2), (0, 0, 1, 0))  # (N, 1 + J, K + 1, 2)
    pairs = None if labels is None else _ordered_pairs(prompt_index, labels)
    bands = []
    for first, last in combinations(range(len(log_snr_edges)), 2):
        inside = up_to[:, :, last] - up_to[:, :, first]  # (N, 1 + J, 2)
        wins = (inside[:, :1] > inside[:, 1:]).double()  # (N, J, 2)
        halves = inside[:, 0] - torch.logsumexp(inside[:, 1:], 1)  # constants of a prompt do not matter here
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
    """Every (better, worse) pair of candidates of one prompt, and each pair's share in the mean over prompts."""
    better, worse, share = [], [], []
    for prompt in prompt_index.unique():
        mine = (prompt_index == prompt).nonzero()[:, 0]
        pairs = (labels[mine][:, None] > labels[mine]).nonzero()  # nothing is above or below NaN
        better.append(mine[pairs[:, 0]])
        worse.append(mine[pairs[:, 1]])
        share.append(torch.full((len(pairs),), 1 / max(len(pairs), 1), dtype=torch.float64))
    shares = torch.cat(share)
    if not len(shares):
        raise ValueError("no prompt has candidates with different labels: they cannot tell one band from another")
    return torch.cat(better), torch.cat(worse), shares / shares.sum()


def _auc(score: Tensor, better: Tensor, worse: Tensor, share: Tensor) -> float:
    """AUC within prompts, averaged over prompts; ties count half."""
    wins = (score[better] > score[worse]).double() + 0.5 * (score[better] == score[worse]).double()
    return float((wins * share).sum())
