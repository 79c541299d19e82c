"""PickScore (Kirstain et al., NeurIPS 2023, arXiv 2305.01569)."""

import numpy as np

from mi_ray.alignment.clip_judge import ClipJudge
from mi_ray.alignment.metric import Column


class PickScore(ClipJudge):
    """s(x, y) = exp(logit scale) · cos(x, y) (section 4, equation 1), on the scale of the released code.

    The text is the prompt, cut at 77 tokens. The image's short side is resized to 224 pixels, bicubic, and the central
    square is read. Other ports divide the value by 26 or 100.
    """

    default = "yuvalkirstain/PickScore_v1"
    template = "{}"
    declared = (Column("pick_score", "PickScore: human preference, cosine times the model's logit scale"),)

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float]]:
        cosines = self.cosines(images, prompts)
        return {"pick_score": (self.clip.logit_scale.exp().item() * cosines).tolist()}
