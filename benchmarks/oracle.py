"""Accuracy of the oracle on rendered images: python benchmarks/oracle.py [--out FILE.json] [--check] [--smoke]"""

from collections import defaultdict

import numpy as np
from gates import Benchmark, Findings, Gate, main
from pydantic import Field, PositiveInt

from mi_ray.config.paths import ModelPath
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.shapes.grammar import CATEGORIES, SceneSpec, draw_scene, sample_spec
from mi_ray.shapes.oracle import score
from mi_ray.shapes.scenes import render

SEED = 20_000  # different from the seeds of training
SMOKE_RENDERS = 60


class OracleBenchmark(Benchmark):
    """How often does the oracle detect exactly what was drawn, on rendered images and after the model's autoencoder?"""

    model: ModelPath = Field("shapes", description="the embedded model (shapes) or a folder; its autoencoder is tested")
    renders: PositiveInt = Field(1000, description="number of scenes, taking the categories in turn")

    def answer(self) -> Findings:
        try:
            denoiser = load_denoiser(self.model)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        specs, images = draw(SMOKE_RENDERS if self.smoke else self.renders)
        decoded = denoiser.decode(denoiser.encode_images(images))
        if decoded.shape != images.shape:
            raise ValueError(
                f"model: the autoencoder of {self.model!r} turns images of shape {images.shape[1:]} into"
                f" {decoded.shape[1:]}; give a model for images of {images.shape[1]} pixels"
            )
        fresh, after = shares_exact(specs, images), shares_exact(specs, decoded)
        rows = [{"images": "fresh", **fresh}, {"images": "after the autoencoder", **after}]
        gates = {"exact_fresh": Gate(fresh["all"], minimum=0.99), "exact_decoded": Gate(after["all"], minimum=0.97)}
        return Findings(rows, gates)


def draw(count: int) -> tuple[list[tuple[str, SceneSpec]], np.ndarray]:
    """(category, specification) of each scene, and images (count, 64, 64, 3) uint8. Unseen combinations are allowed."""
    rng = np.random.default_rng(SEED)
    categories = [CATEGORIES[i % len(CATEGORIES)] for i in range(count)]
    specs = [(category, sample_spec(category, rng)) for category in categories]
    return specs, np.stack([render(draw_scene(spec, rng, unseen=True)) for _, spec in specs])


def shares_exact(specs: list[tuple[str, SceneSpec]], images: np.ndarray) -> dict[str, int | float]:
    """Share of the images that exactly match their specification: over all images, and by category."""
    exact = defaultdict(list)
    for (category, spec), image in zip(specs, images, strict=True):
        right = score(image, spec).exact
        exact["all"].append(right)
        exact[category].append(right)
    return {"n": len(images), **{name: float(np.mean(values)) for name, values in exact.items()}}


if __name__ == "__main__":
    main(OracleBenchmark)
