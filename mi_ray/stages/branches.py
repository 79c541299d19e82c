"""Denoising errors under texts whose number differs from prompt to prompt: hard negatives, prompts without a word."""

import torch
from torch import Tensor

from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.information.pointwise import Probes, denoising_errors


def branch_errors(
    denoiser: Denoiser, latents: Tensor, index: Tensor, texts: list[list[str]], probes: Probes, batch_size: int
) -> list[Tensor]:
    """||eps - eps_hat||^2 of every candidate under each of its prompt's texts, at the probes of the prompt itself.

    Prompts with equally many texts go together, so that no evaluation is spent on filling up.

    Args:
        latents: (N, *latent_shape) clean latents.
        index: (N,) the prompt of each.
        texts: of each of the P prompts.

    Returns:
        For each candidate (J, K) fp32 on the latents' device, J the number of its prompt's texts.
    """
    levels, index = len(probes.log_snr), index.cpu()
    errors = [torch.empty(0, levels, device=latents.device)] * len(latents)
    for count in sorted({len(of_prompt) for of_prompt in texts} - {0}):
        prompts = [p for p, of_prompt in enumerate(texts) if len(of_prompt) == count]
        encoded = denoiser.encode_prompts([text for p in prompts for text in texts[p]]).unflatten(0, (-1, count))
        embeddings = encoded.new_zeros(len(texts), *encoded.shape[1:])  # the others' places stay empty
        embeddings[prompts] = encoded
        rows = torch.isin(index, torch.tensor(prompts)).nonzero()[:, 0]
        chosen = latents[rows.to(latents.device)]
        of_group = denoising_errors(
            denoiser.predict_epsilon, denoiser.schedule, chosen, index[rows], embeddings, probes, batch_size
        )
        for row, of_candidate in zip(rows.tolist(), of_group, strict=True):
            errors[row] = of_candidate
    return errors
