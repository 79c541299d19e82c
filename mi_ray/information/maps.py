"""Maps of the information about a prompt over the pixels of an image, for the whole prompt or for one word.

The integrands of i_s and i_o (arXiv 2310.07972, eq. 7 and 8) are squared norms over latent pixels. The contribution of
each pixel, summed over channels and noise levels, is a map in nats. The sum of the map over pixels is the estimate. For
one word, the prompt without this word replaces the null prompt: log p(x|y) - log p(x|y without the word).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import Schedule
from mi_ray.information.pointwise import PredictEpsilon, beside, predictions
from mi_ray.information.probes import Probes

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_FUNCTION_WORDS = "a an the and or of to in on at is are there with by as it its"


@dataclass(frozen=True)
class InformationMaps:
    """Maps of N images, (N, h, w) fp32 over latent pixels, in nats. Their sums over pixels are i_s and i_o.

    direct: signed; negative where the prompt makes the prediction worse.
    orthogonal: never negative; how much the prompt changes the prediction.
    """

    direct: Tensor
    orthogonal: Tensor


@torch.inference_mode()
def information_maps(
    predict_epsilon: PredictEpsilon,
    schedule: Schedule,
    latents: Tensor,
    prompt_index: Tensor,
    conditioning: Conditioning,
    reference: Conditioning,
    probes: Probes,
    batch_size: int,
) -> InformationMaps:
    """Maps of the information that each prompt adds to a reference: the null prompt, or the prompt without a word.

    Args:
        predict_epsilon: (x_t, timesteps, conditioning) -> epsilon, each with a leading batch dimension.
        latents: (N, channels, h, w) clean latents.
        prompt_index: (N,) prompt of each latent, an index into conditioning, reference and the probes' noise.
        conditioning: of the prompts, P rows.
        reference: conditioning of the references, P rows, or one row for all prompts.
        batch_size: denoiser evaluations per batch, two for each noised latent; memory does not depend on N or K.
    """
    branches = beside(conditioning, reference)
    weight = probes.weight.to(latents.device)
    direct, orthogonal = (latents.new_zeros(len(latents), *latents.shape[2:]) for _ in range(2))
    for chunk in predictions(predict_epsilon, schedule, latents, prompt_index, *branches, probes, batch_size):
        known, blind = chunk.predicted.unbind(1)
        half = 0.5 * weight[chunk.probe].view(-1, 1, 1)
        gain = (chunk.noise - blind).square() - (chunk.noise - known).square()
        direct.index_add_(0, chunk.candidate, half * gain.sum(1))
        orthogonal.index_add_(0, chunk.candidate, half * (known - blind).square().sum(1))
    return InformationMaps(direct, orthogonal)


def upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) in nats per latent pixel -> (N, *size) in nats per image pixel, bilinear, with the same sums.

    The sums are exactly the same if `size` is an integer multiple of (h, w), as it is for an autoencoder.
    """
    scale = maps.shape[-2] * maps.shape[-1] / (size[0] * size[1])
    return scale * interpolate(maps[:, None], size, mode="bilinear")[:, 0]


# ---------------------------------------------------------------------------------------------- words
def without_each_word(prompt: str) -> list[tuple[str, str]]:
    """(word, prompt without this word) for every content word. Articles, conjunctions and the like are skipped."""
    words = [match for match in _WORD.finditer(prompt) if match.group().lower() not in _FUNCTION_WORDS.split()]
    return [(m.group(), " ".join((prompt[: m.start()] + prompt[m.end() :]).split())) for m in words]
