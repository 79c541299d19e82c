"""Does an image show its prompt or a hard negative of it? Decided by the model's own likelihoods, in nats.

A hard negative y_j is the prompt y with one change. With log p(x|y) of `pointwise` (up to a constant of x, which
cancels), the score

    log p(x|y) - logsumexp_j log p(x|y_j)

is the log odds that x shows y and not one of its J negatives, with equal prior probabilities. Above zero, y is more
likely than all negatives together (`pointwise.log_odds`). The negative with the highest posterior tells what is wrong
in the prompt.
"""

import torch
from torch import Tensor

from mi_ray.information.pointwise import Estimate, integrate, log_density
from mi_ray.information.probes import Probes


def margin(errors: Tensor, negative_errors: Tensor, probes: Probes) -> Estimate:
    """log p(x|y) - max_j log p(x|y_j), the margin over the most likely negative: (N, K), (N, J, K) -> (N,).

    The margin falls less with the number of negatives than the log odds. But it is biased: the same noise samples
    select the most likely negative and estimate its likelihood. For J negatives with independent errors and the same
    mean, the margin is too low by 0.7 standard errors at J = 4 and by 1.4 at J = 24. Hard negatives are similar to the
    prompt and use the same noise samples, so the bias is smaller. `benchmarks/wrong_captions.py` measures how often a
    threshold of two standard errors gives a wrong result.
    """
    likeliest = log_density(negative_errors, probes).argmax(-1)
    strongest = negative_errors[torch.arange(len(errors), device=errors.device), likeliest]
    return integrate(0.5 * (strongest - errors), probes)


def posteriors(errors: Tensor, negative_errors: Tensor, probes: Probes) -> Tensor:
    """Posteriors of the prompt (first) and each negative, with equal priors: (N, K), (N, J, K) -> (N, 1 + J)."""
    return log_density(torch.cat([errors[:, None], negative_errors], 1), probes).softmax(-1)
