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

from mi_ray.information.pointwise import Estimate, Probes, integrate, log_density


def margin(errors: Tensor, negative_errors: Tensor, probes: Probes) -> Estimate:
    """log p(x|y) - max_j log p(x|y_j), the lead over the likeliest alternative: (N, K), (N, J, K) -> (N,).

    Unlike the log odds it does not fall with the number of negatives, so that prompts with few and with many compare.
    Below zero by several standard errors, the image contradicts what that negative changes.
    """
    likeliest = log_density(negative_errors, probes).argmax(-1)
    strongest = negative_errors[torch.arange(len(errors), device=errors.device), likeliest]
    return integrate(0.5 * (strongest - errors), probes)


def posteriors(errors: Tensor, negative_errors: Tensor, probes: Probes) -> Tensor:
    """Of the prompt (first) and each negative, all equally likely before: (N, K), (N, J, K) -> (N, 1 + J)."""
    return log_density(torch.cat([errors[:, None], negative_errors], 1), probes).softmax(-1)
