"""Images of candidates, encoded for tables."""

import io

import numpy as np
from PIL import Image


def encode_png(image: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
