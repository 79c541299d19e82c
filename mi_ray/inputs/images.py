"""Images: read as a model takes them, and encoded for tables."""

import io

import numpy as np
from PIL import Image, ImageOps

from mi_ray.inputs.pair_config import Fit

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def encode_png(image: np.ndarray) -> dict:
    """An image (h, w, 3) uint8 as a table's image column holds it: {"bytes", "path"}."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def read_image(content: bytes, size: tuple[int, int], fit: Fit) -> np.ndarray:
    """An encoded image as the model takes it: (*size, 3) uint8.

    Args:
        fit: "exact": it must have the size and be RGB. "crop": turned upright, transparency on white, converted to
            RGB, scaled and cropped about its centre.

    Raises:
        ValueError: with the reason why it will not do.
    """
    height, width = size
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if fit == "exact" and image.size != (width, height):
                raise ValueError(f"the image has {image.width}x{image.height} pixels, not {width}x{height}; --fit crop")
            if fit == "exact" and image.mode != "RGB":
                raise ValueError(f"the image's mode is {image.mode}, not RGB; --fit crop")
            if fit == "exact":
                return np.array(image)
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return np.array(ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.LANCZOS))
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"the image is corrupt, or none of {', '.join(_FORMATS)}") from error
    except ValueError:
        raise
    except Exception as error:  # whatever a decoder comes upon in a file that anyone may have written
        raise ValueError(f"the image is corrupt: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------------------------------------- scores
