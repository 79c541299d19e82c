"""The exact oracle of the embedded world as a metric. It uses no model. It reads only prompts of the shapes grammar."""

from dataclasses import asdict

import numpy as np

from mi_ray.alignment.metric import Column, Metric
from mi_ray.shapes.grammar import draw_scene, parse
from mi_ray.shapes.oracle import score
from mi_ray.shapes.scenes import IMAGE_SIZE, render


class Oracle(Metric):
    """Reads the objects in an image and compares them with its prompt."""

    columns = (
        Column("exact", "1 if everything in the prompt is right and nothing is extra", "yes/no", 0, 1),
        Column("objects", "share of the named objects that are present with all their attributes", "share", 0, 1),
        Column("attributes", "share of the named shapes, colours and textures that are right", "share", 0, 1),
        Column("count", "share of the named kinds of objects whose number is right", "share", 0, 1, selects=False),
        Column(
            "relation", "1 if the named relation holds; null if the prompt names none", "yes/no", 0, 1, nullable=True
        ),
    )
    reads_only = "prompts of the shapes grammar"
    image_size = (IMAGE_SIZE, IMAGE_SIZE)

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
        """A correct image of a prompt, (64, 64, 3) uint8."""
        return render(draw_scene(parse(prompt), np.random.default_rng(seed), unseen=True))
