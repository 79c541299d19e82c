"""Where in an image the information about its prompt lies, and in which words.

The integrands of i_s and i_o (arXiv 2310.07972, eq. 7 and 8) are squared norms over latent pixels, so that each pixel's
part is a map: summed over channels and noise levels per pixel, summed over pixels the value itself, in nats. A word's
part takes the prompt without that word in place of the null prompt: log p(x|y) - log p(x|y without the word).
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information.pointwise import PredictEpsilon, beside, predictions
from mi_ray.information.probes import Probes

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_FUNCTION_WORDS = "a an the and or of to in on at is are there with by as it its"


@dataclass(frozen=True)
class InformationMaps:
    """Of N images, (N, h, w) fp32 over the latents' pixels, in nats; sums over pixels are i_s and i_o.

    direct: signed, negative where the prompt misinforms. orthogonal: never negative, how much it changes the
    prediction.
    """

    direct: Tensor
    orthogonal: Tensor


@torch.inference_mode()
def information_maps(
    predict_epsilon: PredictEpsilon,
    schedule: NoiseSchedule,
    latents: Tensor,
    prompt_index: Tensor,
    conditioning: Conditioning,
    reference: Conditioning,
    probes: Probes,
    batch_size: int,
) -> InformationMaps:
    """The maps of what each image's prompt says beyond a reference: the null prompt, or the prompt without a word.

    Args:
        predict_epsilon: (x_t, timesteps, conditioning) -> epsilon, each with a leading batch dimension.
        latents: (N, channels, h, w) clean latents.
        prompt_index: (N,) the prompt of each, an index into conditioning, reference and the probes' noise.
        conditioning: of the prompts, P rows.
        reference: of what each is held against, P rows, or one for all.
        batch_size: denoiser evaluations at a time, two for each noised latent; memory does not depend on N or K.
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
    """Maps (N, h, w) in nats a latent pixel -> (N, *size) in nats an image pixel, bilinear; sums stay the same.

    They do exactly where `size` is a whole multiple, as it is for an autoencoder.
    """
    scale = maps.shape[-2] * maps.shape[-1] / (size[0] * size[1])
    return scale * interpolate(maps[:, None], size, mode="bilinear")[:, 0]


# ---------------------------------------------------------------------------------------------- words
def without_each_word(prompt: str) -> list[tuple[str, str]]:
    """(word, the prompt without it) of every word that says something: no articles, conjunctions and the like."""
    words = [match for match in _WORD.finditer(prompt) if match.group().lower() not in _FUNCTION_WORDS.split()]
    return [(m.group(), " ".join((prompt[: m.start()] + prompt[m.end() :]).split())) for m in words]
