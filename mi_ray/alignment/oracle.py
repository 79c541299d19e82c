"""Alignment by the embedded world's exact oracle: no model's opinion in it. For prompts of the shapes grammar only."""

from dataclasses import asdict

import numpy as np

from mi_ray.shapes.grammar import parse
from mi_ray.shapes.oracle import score
from mi_ray.shapes.scenes import IMAGE_SIZE

METRICS = ("exact", "objects", "attributes", "count", "relation")


def foreign_prompts(prompts: list[str]) -> list[str]:
    """Those prompts that the oracle cannot read."""
    foreign = []
    for prompt in prompts:
        try:
            parse(prompt)
        except ValueError:
            foreign.append(prompt)
    return foreign


def check_image_size(size: tuple[int, int]):
    """Check that images of a height and width are as large as the scenes that the oracle knows.

    Raises:
        ValueError: they are not.
    """
    if size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"the oracle reads images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, and the model makes {size[0]} x {size[1]};"
            " set it to none, or the size to the model's own"
        )


def measure(images: np.ndarray, prompts: list[str]) -> dict[str, list[float | None]]:
    """Hold images (n, 64, 64, 3) uint8 against their prompts: {metric: n values in [0, 1] or None}."""
    scores = [asdict(score(image, prompt)) for image, prompt in zip(images, prompts, strict=True)]
    return {metric: [s[metric] for s in scores] for metric in METRICS}
