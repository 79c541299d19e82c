"""Which of a prompt and its hard negatives an image shows, by the model's own likelihoods, in nats.

A hard negative y_j is the prompt y changed in one thing. With log p(x|y) of `pointwise` (up to a constant of x, which
cancels), the score

    log p(x|y) - logsumexp_j log p(x|y_j)

is the log odds that x shows y and not one of its J negatives, all 1 + J held equally likely before: above zero, y is
more likely than all of them together (`pointwise.log_odds`). The negative with the highest posterior says which way the
prompt is wrong.
"""

import torch
from torch import Tensor

from mi_ray.information.pointwise import Estimate, integrate, log_density
from mi_ray.information.probes import Probes


def margin(errors: Tensor, negative_errors: Tensor, probes: Probes) -> Estimate:
    """log p(x|y) - max_j log p(x|y_j), the lead over the likeliest alternative: (N, K), (N, J, K) -> (N,).

    It falls less with the number of negatives than the log odds. But the alternative is the likeliest by the same draws
    that it is then judged by: of J whose errors agreed in nothing but their mean, the lead would be too low by 0.7
    standard errors for J = 4 and by 1.4 for J = 24. Hard negatives are nearly the prompt and meet the same noise, so
    it is less; how often two standard errors mislead is measured in `benchmarks/wrong_captions.py`.
    """
    likeliest = log_density(negative_errors, probes).argmax(-1)
    strongest = negative_errors[torch.arange(len(errors), device=errors.device), likeliest]
    return integrate(0.5 * (strongest - errors), probes)


def posteriors(errors: Tensor, negative_errors: Tensor, probes: Probes) -> Tensor:
    """Of the prompt (first) and each negative, all equally likely before: (N, K), (N, J, K) -> (N, 1 + J)."""
    return log_density(torch.cat([errors[:, None], negative_errors], 1), probes).softmax(-1)
