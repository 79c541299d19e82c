"""The non-spatial metric of T2I-CompBench (Huang et al., NeurIPS 2023, arXiv 2307.06350)."""

import numpy as np

from mi_ray.alignment.clip_judge import ClipJudge
from mi_ray.alignment.metric import Column


class ClipCosine(ClipJudge):
    """The cosine of a prompt and an image by CLIP ViT-B/32, which T2I-CompBench calls CLIPScore.

    As in the released code (1b70949), the text is the prompt itself, the value is not scaled, and negative values stay.
    The image's short side is resized to 224 pixels, bicubic, and the central square is read. There, a prompt of more
    than 77 tokens is an error; here it is cut.
    """

    default = "openai/clip-vit-base-patch32"
    template = "{}"
    declared = (Column("clip_cosine", "cosine of prompt and image by CLIP", low=-1, high=1),)

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float]]:
        return {"clip_cosine": self.cosines(images, prompts).tolist()}
