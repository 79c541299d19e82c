"""VQAScore (Lin et al., ECCV 2024, arXiv 2404.01291) on a chat model."""

import numpy as np

from mi_ray.alignment.chat_judge import ChatJudge
from mi_ray.alignment.metric import Column


class VqaScore(ChatJudge):
    """P("Yes" | image, question), equation 1 of the paper, with the question of the released code for Qwen3-VL.

    It is the probability of the single token Yes. The paper's own numbers are by CLIP-FlanT5, and GenEval 2 words the
    question differently: compare values of the same model and template only.
    """

    template = 'Does this figure show "{}"? Please answer Yes or No.'
    declared = (Column("vqa_score", "VQAScore: probability that the model answers Yes", "share", 0, 1),)

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float]]:
        questions = [self.template.format(prompt) for prompt in prompts]
        return {"vqa_score": self.probabilities(images, questions, [("Yes",)] * len(prompts))}
