"""Attend-and-Excite (Chefer et al. 2023, arXiv 2301.13826)."""

import math

import torch
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.guidance.attention import captured, smoothed, unet_layers
from mi_ray.guidance.guide import Guide, Setting
from mi_ray.guidance.words import noun_spans, phrase_finder

_SHARPER = 100  # factor of the attention before its softmax over the tokens, released code


class AttendAndExcite(Guide):
    """Gradient steps on the latents, so that every noun of the prompt gets attention somewhere in the image.

    The loss of a candidate is the largest 1 - max attention of its nouns (eq. 1 and 2). In the first half of the steps
    the latents move against its gradient (eq. 3); at some steps this is repeated until all nouns have enough attention.
    The step follows with classifier-free guidance.

    As in the released code (163efdf). The maps are those of the second coarsest resolution, of Stable Diffusion 16 x 16
    for images of 512 x 512. They are normalised over all tokens but the first and the last, or, if the tokenizer pads
    with another token than that of the end (Stable Diffusion 2), over those before the end. Difference: there, the user
    names the tokens; here, they are the last tokens of the noun phrases. A prompt without any has no gradient steps.

    Args:
        conditioning: of the candidates' prompts, n rows.
        nouns: (n, tokens) bool, the tokens that need attention.
        counted: (n, tokens) bool, the tokens over which attention is normalised.
    """

    def __init__(self, setting: Setting, conditioning: Conditioning, nouns: Tensor, counted: Tensor):
        super().__init__(setting, conditioning)
        self.nouns, self.counted = nouns, counted
        steps, config = len(setting.plan.timesteps), setting.config
        self.altered = range(round(config.altered_share * steps))
        at = [round(share * steps) for share in config.refine_at]
        self.refined = dict(zip(at, config.refine_until, strict=True))
        layers = unet_layers(setting.denoiser.network, cross=True)
        self.factor = sorted(layers)[-2:][0]
        self.layers = layers[self.factor]

    @classmethod
    def of_prompts(cls, setting: Setting, prompts: list[str], conditioning: Conditioning) -> "AttendAndExcite":
        denoiser, find = setting.denoiser, phrase_finder(setting.config.phrases)
        tokenizer, device = denoiser.tokenizer, denoiser.device
        nouns = torch.zeros(len(prompts), denoiser.max_tokens, dtype=torch.bool)
        counted = torch.zeros_like(nouns)
        to_end = tokenizer.pad_token_id != tokenizer.eos_token_id
        for row, prompt in enumerate(prompts):
            nouns[row, [span.noun for span in noun_spans(denoiser, prompt, find)]] = True
            end = min(len(denoiser.token_ids(prompt)), denoiser.max_tokens) - 1
            counted[row, 1 : end if to_end else -1] = True
        return cls(setting, conditioning, nouns.to(device), counted.to(device))

    def rows(self, index: Tensor) -> "AttendAndExcite":
        return self._of(self.conditioning.rows(index), index)

    def _of(self, conditioning: Conditioning, index: Tensor) -> "AttendAndExcite":
        masks = (mask[index.to(mask.device)] for mask in (self.nouns, self.counted))
        return AttendAndExcite(self.setting, conditioning, *masks)

    # ------------------------------------------------------------------------------------------ a step
    def moved(self, step: int, x_t: Tensor) -> Tensor:
        wanted = self.refined.get(step)
        if step not in self.altered and wanted is None:
            return x_t
        decay = 1 - 0.5 * step / max(1, len(self.setting.plan.timesteps) - 1)  # from 1 to 0.5 over all steps
        size = self.setting.config.step_size * math.sqrt(decay)
        with torch.inference_mode(False), torch.enable_grad():
            x_t = x_t.clone()
            loss, gradient = self.loss(step, x_t)
            if wanted is not None:
                x_t, loss, gradient = self._refined(step, x_t, loss, gradient, wanted, size)
        return x_t - size * gradient if step in self.altered else x_t

    def _refined(self, step: int, x_t: Tensor, loss: Tensor, gradient: Tensor, wanted: float, size: float):
        """Repeat gradient steps for each candidate until its loss before the step was small enough.

        Returns:
            The latents, and loss and gradient at them.
        """
        left = (loss > 1 - wanted).nonzero()[:, 0]
        for _ in range(self.setting.config.refine_steps):
            if not len(left):
                break
            before = loss[left]
            x_t = x_t.index_add(0, left, gradient[left], alpha=-size)
            again = self._of(self.conditioning.rows(left), left)
            found, slope = again.loss(step, x_t[left])
            self.evaluations += again.evaluations
            loss, gradient = loss.index_copy(0, left, found), gradient.index_copy(0, left, slope)
            left = left[before > 1 - wanted]
        return x_t, loss, gradient

    def loss(self, step: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each candidate, (n,) fp32, and its gradient by the latents, (n, *latent_shape) fp32."""
        latents = x_t.detach().clone().requires_grad_()
        # Tensors of inference mode cannot be part of a backward pass; their clones can.
        conditioning, nouns, counted = self.conditioning.map(torch.clone), self.nouns.clone(), self.counted.clone()
        with captured(self.layers) as maps:
            self.predict(step, latents, conditioning)
        self.evaluations += len(x_t)
        size = tuple(side // self.factor for side in x_t.shape[-2:])
        attention = torch.cat([maps[layer] for layer in self.layers], 1).float().mean(1)
        loss = noun_loss(attention.mT.unflatten(2, size), nouns, counted)
        (gradient,) = torch.autograd.grad(loss.sum(), latents)
        return loss.detach(), gradient


def noun_loss(attention: Tensor, nouns: Tensor, counted: Tensor) -> Tensor:
    """The largest 1 - max of the smoothed attention of the nouns, at least 0: (n,).

    Args:
        attention: (n, tokens, h, w), mean over heads and layers.
        nouns, counted: (n, tokens) bool, as in `AttendAndExcite`.
    """
    sharp = (_SHARPER * attention).masked_fill(~counted[..., None, None], -torch.inf).softmax(1)
    peaks = smoothed(sharp.flatten(0, 1)).view_as(sharp).amax((2, 3))
    return (1 - peaks).masked_fill(~nouns, 0).clamp(min=0).amax(1)
