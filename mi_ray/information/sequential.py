"""Sequential choice of the best candidates: probes are added in rounds until the top k are separated from the rest."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from mi_ray.information.pointwise import degrees_of_freedom, integrate
from mi_ray.information.probes import Probes


@dataclass(frozen=True, eq=False)
class Choice:
    """The result of the choice from a pool of N candidates."""

    chosen: Tensor  # (k,) indices into the pool, the best first
    value: Tensor  # (N,) i_s in nats, mean over the rounds in which the candidate was evaluated
    standard_error: Tensor  # (N,) of the values; differences between candidates have smaller standard errors
    rounds: Tensor  # (N,) long, number of rounds in which each candidate was evaluated
    separated: bool  # whether the confidence was reached; if not, `chosen` is the best guess
    evaluations: int  # number of denoiser evaluations


def choose(
    evaluate: Callable[[int, Tensor], tuple[Tensor, Probes]],
    count: int,
    top_k: int,
    confidence: float,
    max_rounds: int,
) -> Choice:
    """Choose the top_k of a prompt's `count` candidates by i_s in rounds. A decided candidate is not evaluated again.

    After each round, all pairs of undecided candidates are compared by their difference under the same noise samples.
    Let m be the number of places that are still free. A candidate is rejected if it is significantly worse than m or
    more others. It is accepted if it is significantly better than all but m. The test uses Student's t quantile with a
    Bonferroni correction for the top_k (N - top_k) relevant comparisons and the max_rounds rounds, so the probability
    of a wrong decision is at most 1 - confidence.

    Args:
        evaluate: (round 0, 1, ..., candidates (n,)) -> their denoising errors under the prompt and the null prompt,
            (n, 2, K), and the round's K probes, independent of those of other rounds.

    Raises:
        ValueError: top_k is not between 1 and N - 1.
    """
    if not 0 < top_k < count:
        raise ValueError(
            f"top_k is {top_k}: with {count} candidates there is nothing to choose; set a value from 1 to {count - 1}"
        )
    total, variance = torch.zeros(2, count)
    pair_total, pair_variance = torch.zeros(2, count, count)
    rounds = torch.zeros(count, dtype=torch.long)
    level = (1 - confidence) / (top_k * (count - top_k) * max_rounds)
    undecided, winners, evaluations, freedom = torch.arange(count), [], 0, 0
    for number in range(max_rounds):
        errors, probes = evaluate(number, undecided)
        evaluations += errors.numel()
        freedom += degrees_of_freedom(probes)
        gain = 0.5 * (errors[:, 1] - errors[:, 0]).cpu()
        estimate, pairs = integrate(gain, probes), integrate(gain[:, None] - gain, probes)
        total[undecided] += estimate.value
        variance[undecided] += estimate.standard_error.square()
        block = undecided[:, None], undecided
        pair_total[block] += pairs.value
        pair_variance[block] += pairs.standard_error.square()
        rounds[undecided] += 1
        quantile = stdtrit(freedom, 1 - level)
        beats = pair_total[block] > quantile * pair_variance[block].sqrt()  # false for NaN
        places = top_k - len(winners)
        loses, wins = beats.sum(0) >= places, beats.sum(1) >= len(undecided) - places
        winners += undecided[wins].tolist()
        undecided = undecided[~(wins | loses)]
        if len(winners) == top_k:
            break
    separated = len(winners) == top_k
    value = total / rounds
    if not separated:
        order = value[undecided].argsort(descending=True)
        winners += undecided[order][: top_k - len(winners)].tolist()
    winners = torch.tensor(winners)
    return Choice(
        chosen=winners[value[winners].argsort(descending=True)],
        value=value,
        standard_error=variance.sqrt() / rounds,
        rounds=rounds,
        separated=separated,
        evaluations=evaluations,
    )
