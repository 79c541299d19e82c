"""Images of candidates: encoded for tables, measured against their prompts."""

import io

import numpy as np
from PIL import Image

from mi_ray.alignment import oracle


def encode_png(image: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def measured(images: np.ndarray, prompts: list[str], alignment: str | None) -> dict[str, list]:
    """Alignment metrics as columns; None where nothing is measured."""
    if alignment == "oracle":
        return oracle.measure(images, prompts)
    return {metric: [None] * len(prompts) for metric in oracle.METRICS}
