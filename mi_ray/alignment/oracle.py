"""Alignment by the embedded world's exact oracle: no model's opinion in it. For prompts of the shapes grammar only."""

from dataclasses import asdict

import numpy as np

from mi_ray.alignment.metric import Column, Metric
from mi_ray.shapes.grammar import draw_scene, parse
from mi_ray.shapes.oracle import score
from mi_ray.shapes.scenes import render


class Oracle(Metric):
    """Reads the objects of an image back and holds them against its prompt."""

    columns = (
        Column("exact", "1 if everything said is right and nothing is extra", "yes/no", 0, 1),
        Column("objects", "share of the named objects present with all their attributes", "share", 0, 1),
        Column("attributes", "share of the named shapes, colours and textures that are right", "share", 0, 1),
        Column("count", "share of the named kinds whose number is right", "share", 0, 1, selects=False),
        Column("relation", "1 if the named relation holds; null where none is named", "yes/no", 0, 1, nullable=True),
    )
    reads_only = "prompts of the shapes grammar"

    def reads(self, prompt: str) -> bool:
        try:
            parse(prompt)
        except ValueError:
            return False
        return True

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float | None]]:
        scores = [asdict(score(image, prompt)) for image, prompt in zip(images, prompts, strict=True)]
        return {column.name: [of_image[column.name] for of_image in scores] for column in self.columns}

    def reference(self, prompt: str, seed: int) -> np.ndarray:
        """A real render of what a prompt says, (64, 64, 3) uint8."""
        return render(draw_scene(parse(prompt), np.random.default_rng(seed), unseen=True))
