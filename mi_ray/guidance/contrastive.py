"""Contrastive guidance: towards the prompt and away from its hard negatives."""

import torch
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.guidance.guide import Guide, Setting
from mi_ray.language.negatives import chosen
from mi_ray.language.sources import negatives_by


class Contrastive(Guide):
    """Classifier-free guidance + s (c - mean_j c_j), where c_j is the prediction for the j-th hard negative.

    It follows the gradient of the contrastive score log p(x|y) - log mean_j p(x|y_j), which is
    score(y) - sum_j pi_j score(y_j) with the posterior pi of the negatives. Here all pi_j are equal. A prompt without
    negatives has classifier-free guidance.

    Args:
        conditioning: of the candidates' prompts, n rows.
        negatives: conditioning of all negatives.
        of_prompt: for each candidate, its rows (J,) of `negatives`; J may differ.
    """

    def __init__(self, setting: Setting, conditioning: Conditioning, negatives: Conditioning, of_prompt: list[Tensor]):
        super().__init__(setting, conditioning)
        self.negatives, self.of_prompt = negatives, of_prompt
        counts = torch.tensor([len(rows) for rows in of_prompt])
        self.owner = torch.arange(len(of_prompt)).repeat_interleave(counts).to(setting.denoiser.device)
        self.share = (1 / counts)[self.owner.cpu()].to(setting.denoiser.device)  # of each negative in its mean
        chosen_rows = torch.cat(of_prompt) if len(self.owner) else torch.empty(0, dtype=torch.long)
        self.others = negatives.rows(chosen_rows).to(setting.denoiser.device)

    @classmethod
    def of_prompts(cls, setting: Setting, prompts: list[str], conditioning: Conditioning) -> "Contrastive":
        config = setting.config
        make = negatives_by(config.negatives)
        made = [[negative.prompt for negative in chosen(make(p), config.max_negatives)] for p in prompts]
        texts = [text for of_prompt in made for text in of_prompt]
        rows = torch.arange(len(texts)).split([len(of_prompt) for of_prompt in made])
        return cls(setting, conditioning, setting.denoiser.encode_prompts(texts or [""]), list(rows))

    def rows(self, index: Tensor) -> "Contrastive":
        of_prompt = [self.of_prompt[p] for p in index.tolist()]
        return Contrastive(self.setting, self.conditioning.rows(index), self.negatives, of_prompt)

    def predictions(self, step: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        n, conditioning = len(x_t), Conditioning.cat([self.both, self.others])
        timesteps = self.setting.plan.timesteps[step].to(x_t.device).expand(len(conditioning))
        latents = torch.cat([x_t, x_t, x_t[self.owner]])
        prediction = self.setting.denoiser.predict(latents, timesteps, conditioning)
        self.evaluations += len(self.owner)
        conditional, unconditional, others = prediction.split([n, n, len(self.owner)])
        column = (-1, *[1] * (x_t.ndim - 1))
        differences = conditional[self.owner].float() - others.float()
        self.away = torch.zeros(conditional.shape, device=x_t.device).index_add_(
            0, self.owner, differences * self.share.view(column)
        )
        return conditional, unconditional

    def combined(self, step: int, guided: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return guided + self.setting.config.contrastive_scale * self.away
