"""Alignment by the embedded world's exact oracle: no model's opinion in it. For prompts of the shapes grammar only."""

from dataclasses import asdict

import numpy as np

from mi_ray.shapes.grammar import parse
from mi_ray.shapes.oracle import score

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


def measure(images: np.ndarray, prompts: list[str]) -> dict[str, list[float | None]]:
    """Hold images (n, 64, 64, 3) uint8 against their prompts: {metric: n values in [0, 1] or None}."""
    scores = [asdict(score(image, prompt)) for image, prompt in zip(images, prompts, strict=True)]
    return {metric: [s[metric] for s in scores] for metric in METRICS}
