"""Reads images in the form that a model needs, and encodes images for tables."""

import io

import numpy as np
from PIL import Image, ImageOps

from mi_ray.inputs.pair_config import Fit

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def encode_png(image: np.ndarray) -> dict:
    """An image (h, w, 3) uint8 as a value of a table's image column: {"bytes", "path"}."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def read_image(content: bytes, size: tuple[int, int], fit: Fit) -> np.ndarray:
    """Decode an image in the form that the model needs: (*size, 3) uint8.

    Args:
        fit: "exact": the image must have this size and be RGB. "crop": the image is rotated by its EXIF orientation,
            put on white if it is transparent, converted to RGB, scaled, and cropped around its centre.

    Raises:
        ValueError: with the reason why the image cannot be used.
    """
    height, width = size
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if fit == "exact" and image.size != (width, height):
                raise ValueError(
                    f"the image has {image.width}x{image.height} pixels, not {width}x{height}; use --fit crop"
                )
            if fit == "exact" and image.mode != "RGB":
                raise ValueError(f"the image's mode is {image.mode}, not RGB; use --fit crop")
            if fit == "exact":
                return np.array(image)
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return np.array(ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.LANCZOS))
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"the image is corrupt, or its format is not one of {', '.join(_FORMATS)}") from error
    except ValueError:
        raise
    except Exception as error:  # a decoder may raise anything on an untrusted file
        raise ValueError(f"the image is corrupt: {' '.join(str(error).split())}") from error
