"""Sequential choice of the best candidates: probes are added in rounds until the top k are separated from the rest."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import Schedule
from mi_ray.information.pointwise import PredictEpsilon, degrees_of_freedom, denoising_errors, integrate
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
    predict_epsilon: PredictEpsilon,
    schedule: Schedule,
    latents: Tensor,
    conditioning: Conditioning,
    draw_round: Callable[[int], Probes],
    top_k: int,
    confidence: float,
    max_rounds: int,
    batch_size: int,
) -> Choice:
    """Choose the top_k candidates of a pool by i_s in rounds. A decided candidate is not evaluated again.

    After each round, all pairs of undecided candidates are compared by their difference under the same noise samples.
    Let m be the number of places that are still free. A candidate is rejected if it is significantly worse than m or
    more others. It is accepted if it is significantly better than all but m. The test uses Student's t quantile with a
    Bonferroni correction for the top_k (N - top_k) relevant comparisons and the max_rounds rounds, so the probability
    of a wrong decision is at most 1 - confidence.

    Args:
        latents: (N, *latent_shape) candidates of one prompt.
        conditioning: of the prompt and the null prompt, two rows.
        draw_round: round number 0, 1, ... -> its probes for one prompt, independent of those of other rounds.

    Raises:
        ValueError: top_k is not between 1 and N - 1.
    """
    count = len(latents)
    if not 0 < top_k < count:
        raise ValueError(
            f"top_k is {top_k}: with {count} candidates there is nothing to choose; set a value from 1 to {count - 1}"
        )
    total, variance = torch.zeros(2, count, device=latents.device)
    pair_total, pair_variance = torch.zeros(2, count, count, device=latents.device)
    rounds = torch.zeros(count, dtype=torch.long)
    level = (1 - confidence) / (top_k * (count - top_k) * max_rounds)
    branches = torch.tensor([[0, 1]])
    undecided, winners, evaluations, freedom = torch.arange(count), [], 0, 0
    for number in range(max_rounds):
        probes = draw_round(number)
        index = torch.zeros(len(undecided), dtype=torch.long)
        errors = denoising_errors(
            predict_epsilon, schedule, latents[undecided], index, conditioning, branches, probes, batch_size
        )
        evaluations += errors.numel()
        freedom += degrees_of_freedom(probes)
        gain = 0.5 * (errors[:, 1] - errors[:, 0])
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
        loses, wins = beats.sum(0).cpu() >= places, beats.sum(1).cpu() >= len(undecided) - places
        winners += undecided[wins].tolist()
        undecided = undecided[~(wins | loses)]
        if len(winners) == top_k:
            break
    separated = len(winners) == top_k
    value = total / rounds.to(total.device)
    if not separated:
        order = value[undecided].argsort(descending=True).cpu()
        winners += undecided[order][: top_k - len(winners)].tolist()
    winners = torch.tensor(winners)
    return Choice(
        chosen=winners[value[winners].argsort(descending=True).cpu()],
        value=value,
        standard_error=variance.sqrt() / rounds.to(total.device),
        rounds=rounds,
        separated=separated,
        evaluations=evaluations,
    )
