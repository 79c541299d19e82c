"""CLIPScore (Hessel et al., EMNLP 2021, arXiv 2104.08718)."""

import numpy as np

from mi_ray.alignment.clip_judge import ClipJudge
from mi_ray.alignment.metric import Column

WEIGHT = 2.5  # w of the paper's equation 1


class ClipScore(ClipJudge):
    """CLIP-S(c, v) = w · max(cos(c, v), 0), w = 2.5 (section 3, equation 1), without references.

    As in the released code, the text is "A photo depicts " and the prompt, cut at 77 tokens. The image's short side is
    resized to 224 pixels, bicubic, and the central square is read.
    """

    default = "openai/clip-vit-base-patch32"
    template = "A photo depicts {}"
    declared = (
        Column("clip_score", "CLIPScore: 2.5 times the cosine of prompt and image, at least 0", low=0, high=2.5),
    )

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float]]:
        return {"clip_score": (WEIGHT * self.cosines(images, prompts).clip(0)).tolist()}
