"""Choosing the best of a pool with no more probes than it takes: rounds, until the top-k is separated from the rest."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information.pointwise import PredictEpsilon, degrees_of_freedom, denoising_errors, integrate
from mi_ray.information.probes import Probes


@dataclass(frozen=True, eq=False)
class Choice:
    """What a pool of N candidates came to."""

    chosen: Tensor  # (k,) indices into the pool, the best first
    value: Tensor  # (N,) i_s in nats, from the rounds that the candidate took part in
    standard_error: Tensor  # (N,) of the values; differences between candidates are tighter
    rounds: Tensor  # (N,) long, in which each took part
    separated: bool  # whether the confidence was reached; if not, `chosen` is the best guess
    evaluations: int  # of the denoiser


def choose(
    predict_epsilon: PredictEpsilon,
    schedule: NoiseSchedule,
    latents: Tensor,
    conditioning: Conditioning,
    draw_round: Callable[[int], Probes],
    top_k: int,
    confidence: float,
    max_rounds: int,
    batch_size: int,
) -> Choice:
    """The top_k of a pool by i_s, probed in rounds; a candidate leaves as soon as its fate is decided.

    After each round all pairs of undecided candidates are compared by their paired difference, common noise and all. A
    candidate that loses significantly against as many as there are places is out; one that wins significantly
    against all but as many is in. The level is Bonferroni's over the top_k (N - top_k) comparisons that matter and
    the max_rounds looks, with Student's quantile, so that the chance of a wrong decision is at most 1 - confidence.

    Args:
        latents: (N, *latent_shape) the candidates of one prompt.
        conditioning: of the prompt and the null prompt, two rows.
        draw_round: round 0, 1, .. -> its probes, for one prompt; independent of the other rounds'.

    Raises:
        ValueError: if top_k leaves nothing to choose.
    """
    count = len(latents)
    if not 0 < top_k < count:
        raise ValueError(f"top_k is {top_k}, which leaves nothing to choose from {count} candidates")
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
        beats = pair_total[block] > quantile * pair_variance[block].sqrt()  # never true of nan
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
