"""Denoising errors under branches: other prompts, hard negatives, or the prompt without a word.

The number of branches can differ between prompts. If only the most likely branches matter, the others are dropped after
a few probes. The branches of P prompts are a conditioning of all texts and, for each prompt, the indices of its rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.information.pointwise import denoising_errors, log_density
from mi_ray.information.probes import Probes
from mi_ray.language.negatives import Negative, chosen
from mi_ray.language.sources import MakeNegatives


def hard_negatives(denoiser: Denoiser, make: MakeNegatives, prompt: str, limit: int) -> list[Negative]:
    """At most `limit` negatives of a prompt that the text encoder can distinguish from it.

    If the prompt is truncated to `max_tokens`, negatives that change only the truncated part are dropped.
    """
    made, last = make(prompt), denoiser.max_tokens - 1  # position of the end token
    tokens = denoiser.token_ids(prompt)
    if len(tokens) > denoiser.max_tokens:
        made = [negative for negative in made if denoiser.token_ids(negative.prompt)[:last] != tokens[:last]]
    return chosen(made, limit)


def encode_each(denoiser: Denoiser, texts: list[list[str]]) -> tuple[Conditioning, list[Tensor]]:
    """Encode the texts of each prompt as its branches: the conditioning of all, and the rows (J,) of each prompt."""
    flat = [text for of_prompt in texts for text in of_prompt]
    rows = torch.arange(len(flat)).split([len(of_prompt) for of_prompt in texts])
    return denoiser.encode_prompts(flat or [""]), list(rows)  # a conditioning has at least one row


def branch_errors(
    denoiser: Denoiser,
    latents: Tensor,
    index: Tensor,
    conditioning: Conditioning,
    branches: list[Tensor],
    probes: Probes,
    batch_size: int,
) -> list[Tensor]:
    """||eps - eps_hat||^2 of every candidate under each branch of its prompt, at the probes of the prompt.

    Prompts with the same number of branches are evaluated together, so no evaluation is wasted on padding.

    Args:
        latents: (N, *latent_shape) clean latents.
        index: (N,) prompt of each candidate.
        conditioning: of all texts, one row per text.
        branches: for each of the P prompts, the rows (J,) that are its branches.

    Returns:
        For each candidate (J, K) fp32 on the latents' device, where J is the number of branches of its prompt.
    """
    levels, index = len(probes.log_snr), index.cpu()
    errors = [torch.empty(0, levels, device=latents.device)] * len(latents)
    for count in sorted({len(of_prompt) for of_prompt in branches} - {0}):
        prompts = torch.tensor([p for p, of_prompt in enumerate(branches) if len(of_prompt) == count])
        rows = torch.isin(index, prompts).nonzero()[:, 0]
        of_group = denoising_errors(
            denoiser.predict_epsilon,
            denoiser.schedule,
            latents[rows.to(latents.device)],
            torch.searchsorted(prompts, index[rows]),
            conditioning,
            torch.stack([branches[p] for p in prompts.tolist()]),
            probes.of(prompts),
            batch_size,
        )
        for row, of_candidate in zip(rows.tolist(), of_group, strict=True):
            errors[row] = of_candidate
    return errors


class Likeliest(NamedTuple):
    """The most likely branches of each of N candidates."""

    errors: list[Tensor]  # per candidate (at most count, K), columns in the order of the probes
    kept: list[Tensor]  # per candidate (at most count,): indices of these rows among the branches of its prompt
    evaluations: int  # number of denoiser evaluations, including those of dropped branches


def likeliest_errors(
    denoiser: Denoiser,
    latents: Tensor,
    index: Tensor,
    conditioning: Conditioning,
    branches: list[Tensor],
    probes: Probes,
    batch_size: int,
    *,
    count: int,
    first: int,
) -> Likeliest:
    """`branch_errors` of only the `count` most likely branches of each candidate.

    All branches are evaluated at `first` probes, spread over the band. The `count` branches with the highest likelihood
    at these probes are also evaluated at the other probes. A sum of likelihoods is dominated by a few large terms, and
    a few probes are enough to find them. The same number of evaluations then allows more noise levels and branches.
    """
    early, late = probes.spread(first)
    if not len(late):
        errors = branch_errors(denoiser, latents, index, conditioning, branches, probes, batch_size)
        return Likeliest(errors, [torch.arange(len(e)) for e in errors], sum(e.numel() for e in errors))
    seen = branch_errors(denoiser, latents, index, conditioning, branches, probes.at(early), batch_size)
    likely = [log_density(e, probes.at(early)).topk(min(count, len(e))).indices for e in seen]
    kept = [places.cpu() for places in likely]
    go_on = [branches[p][places] for p, places in zip(index.tolist(), kept, strict=True)]
    each = torch.arange(len(latents))
    remaining = probes.of(index.cpu()).at(late)
    rest = branch_errors(denoiser, latents, each, conditioning, go_on, remaining, batch_size)
    order = torch.cat([early, late]).argsort()
    errors = [torch.cat([a[places], b], 1)[:, order] for a, b, places in zip(seen, rest, likely, strict=True)]
    return Likeliest(errors, kept, sum(e.numel() for e in (*seen, *rest)))
