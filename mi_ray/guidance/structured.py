"""Structured diffusion guidance (Feng et al. 2023, arXiv 2212.05032)."""

import torch
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.guidance.attention import unet_layers, values_from
from mi_ray.guidance.guide import Guide, Setting
from mi_ray.guidance.words import noun_spans, phrase_finder


class Structured(Guide):
    """The cross-attention of the prompt is the mean over i of softmax(Q K^T) V_i (eq. 5): V_0 is of the prompt, and V_i
    of the prompt with the tokens of its i-th noun phrase from the phrase encoded alone. The unconditional prediction is
    the model's own.

    As in the released code (773b2ba) without --conjunction: one key. The value projection is linear, so this is the
    attention with the values of the mean embedding, and costs nothing. Differences: the noun phrases come from rules or
    spaCy and are not nested; there, from a constituency parse. The prompt keeps its capitals and final full stop.

    Args:
        conditioning: of the candidates' prompts, n rows.
        values: (n, tokens, d), the mean embedding of each prompt.
    """

    raw = False

    def __init__(self, setting: Setting, conditioning: Conditioning, values: Tensor):
        super().__init__(setting, conditioning)
        self.values = values

    @classmethod
    def of_prompts(cls, setting: Setting, prompts: list[str], conditioning: Conditioning) -> "Structured":
        denoiser, find = setting.denoiser, phrase_finder(setting.config.phrases)
        embeds = conditioning["embeds"].to(denoiser.device)
        means = []
        for prompt, whole in zip(prompts, embeds, strict=True):
            spans = [span for span in noun_spans(denoiser, prompt, find) if len(span.text.split()) > 1]
            spans = [span for span in spans if span.text != prompt]
            alone = denoiser.encode_prompts([span.text for span in spans])["embeds"] if spans else ()
            means.append(torch.stack([whole, *map(spliced, [whole] * len(spans), alone, spans)]).mean(0))
        return cls(setting, conditioning, torch.stack(means))

    def rows(self, index: Tensor) -> "Structured":
        return Structured(self.setting, self.conditioning.rows(index), self.values[index.to(self.values.device)])

    def predictions(self, step: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        both = self.both
        values = torch.cat([self.values, both["embeds"][len(x_t) :]])
        layers = [layer for of_factor in unet_layers(self.network, cross=True).values() for layer in of_factor]
        with values_from(layers, values):
            conditional, unconditional = self.predict(step, x_t, both).chunk(2)
        return conditional, unconditional

    @property
    def network(self):
        return self.setting.denoiser.network


def spliced(whole: Tensor, phrase: Tensor, span) -> Tensor:
    """The embedding of a prompt (tokens, d) with the tokens of a span from the embedding of the phrase alone, whose
    first token is that of the start."""
    changed = whole.clone()
    changed[span.start : span.end] = phrase[1 : 1 + span.end - span.start]
    return changed
