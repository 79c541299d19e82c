"""Denoising errors under branches whose number differs from prompt to prompt: other prompts, hard negatives, prompts
without a word. Where only the likeliest count, the others are dropped after a few probes.

The branches of P prompts are a conditioning of all their texts and, for each prompt, which of its rows are its own.
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
    """At most `limit` negatives of a prompt that the text encoder tells from it: of a prompt that is cut, what changes
    beyond the cut is none."""
    made, last = make(prompt), denoiser.max_tokens - 1  # where the token of the end comes to stand
    tokens = denoiser.token_ids(prompt)
    if len(tokens) > denoiser.max_tokens:
        made = [negative for negative in made if denoiser.token_ids(negative.prompt)[:last] != tokens[:last]]
    return chosen(made, limit)


def encode_each(denoiser: Denoiser, texts: list[list[str]]) -> tuple[Conditioning, list[Tensor]]:
    """The texts of each prompt as its branches: the conditioning of all, and which rows (J,) are each prompt's."""
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
    """||eps - eps_hat||^2 of every candidate under each of its prompt's branches, at the probes of the prompt itself.

    Prompts with equally many branches go together, so that no evaluation is spent on filling up.

    Args:
        latents: (N, *latent_shape) clean latents.
        index: (N,) the prompt of each.
        conditioning: of all texts, one row each.
        branches: of each of the P prompts, the rows (J,) that are its branches.

    Returns:
        For each candidate (J, K) fp32 on the latents' device, J the number of its prompt's branches.
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
    """What is left of each of N candidates' branches."""

    errors: list[Tensor]  # (at most count, K) of each, the columns in the probes' order
    kept: list[Tensor]  # (at most count,) of each: which of its prompt's branches the rows are
    evaluations: int  # spent on them and on those that dropped out


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
    """`branch_errors` of each candidate's `count` likeliest branches alone: all meet `first` of the probes, which are
    spread over the band, and those to which these give the highest likelihood meet the others too.

    A sum of likelihoods is that of its few largest terms, and a few probes tell which they are: so more noise levels
    are had for the same evaluations, and more branches.
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
