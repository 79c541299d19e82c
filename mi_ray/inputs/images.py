"""Reads images in the form that a model needs, and encodes images for tables.

The pixels decide, not the metadata: an image is turned by its orientation, values of more than 8 bits are scaled to 8,
and metadata that is too large or damaged is left out.
"""

import io
import struct

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

from mi_ray import storage
from mi_ray.inputs import text
from mi_ray.inputs.pair_config import Fit

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(("AVIF",) if features.check("avif") else ()))
_MAX_THUMBNAIL = 256  # pixels
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")  # chunks of metadata, whose size Pillow limits


def encode_png(image: np.ndarray) -> dict:
    """An image (h, w, 3) uint8 as a value of a table's image column: {"bytes", "path"}."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def thumbnail(image: np.ndarray) -> dict:
    """A small form of an image (h, w, 3) uint8 as a value of a table's image column."""
    step = -(-max(image.shape[:2]) // _MAX_THUMBNAIL)
    if step > 1:  # average whole blocks of pixels
        height, width = (side // step * step for side in image.shape[:2])
        blocks = image[:height, :width].reshape(height // step, step, width // step, step, 3)
        image = blocks.mean((1, 3)).round().astype(np.uint8)
    return encode_png(image)


def load_image(uri: str, size: tuple[int, int], fit: Fit) -> np.ndarray:
    """Read and decode an image file, as `read_image`.

    Raises:
        OSError: it cannot be read, or its store does not answer within seconds.
        ValueError: with the reason why it cannot be used.
    """
    storage.check_reachable(uri)
    return read_image(storage.read_bytes(uri), size, fit)


def read_image(content: bytes, size: tuple[int, int], fit: Fit) -> np.ndarray:
    """Decode an image in the form that the model needs: (*size, 3) uint8. It is turned by its EXIF orientation.

    Args:
        fit: "exact": the image must have this size and be RGB. "crop": the image is put on white if it is transparent,
            converted to RGB, scaled, and cropped around its centre.

    Raises:
        ValueError: with the reason why the image cannot be used.
    """
    height, width = size
    image = _opened(content)
    if fit == "exact" and image.size != (width, height):
        raise ValueError(f"the image has {image.width}x{image.height} pixels, not {width}x{height}; use --fit crop")
    if fit == "exact" and image.mode != "RGB":
        raise ValueError(f"the image's mode is {image.mode}, not RGB; use --fit crop")
    if fit == "exact":
        return np.array(image)
    return np.array(ImageOps.fit(_as_rgb(image), (width, height), Image.Resampling.LANCZOS))


def _opened(content: bytes) -> Image.Image:
    """The decoded image, upright.

    Raises:
        ValueError: with the reason why it cannot be decoded.
    """
    try:
        try:
            return _upright(content)
        except ValueError:  # Pillow's limit on metadata; a second try without it
            if not content.startswith(_PNG):
                raise
            return _upright(_without_texts(content))
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"the image is corrupt, or its format is not one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image has too many pixels ({text.reason(error)}); scale it") from error
    except Exception as error:  # a decoder may raise anything on an untrusted file
        raise ValueError(f"the image is corrupt: {text.reason(error)}") from error


def _upright(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        image.load()
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # EXIF that cannot be read
            orientation = 1
        plain = image.copy()
    # Only what the pixels need: other tags may be damaged, and Pillow writes them all again when it turns an image.
    plain.info = {name: plain.info[name] for name in ("transparency",) if name in plain.info}
    plain.getexif().clear()
    plain.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(plain)


def _without_texts(png: bytes) -> bytes:
    """A PNG file without its colour profile and texts."""
    kept, at = [png[: len(_PNG)]], len(_PNG)
    while at + 8 <= len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        chunk = png[at : at + length + 12]
        kept += [] if chunk[4:8] in _PNG_TEXTS else [chunk]
        at += len(chunk)
    return b"".join(kept)


def _as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, on white if it is transparent.

    Raises:
        ValueError: the range of its values is not known, or it has no conversion.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_as_bytes(np.asarray(image), image.mode))
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"the image's mode {image.mode} cannot be converted; save it as RGB") from error


def _as_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values as uint8. Integers have 16 bits, floating-point numbers are between 0 and 1.

    Raises:
        ValueError: there are other values.
    """
    most = 1.0 if mode == "F" else 65535.0
    values = values.astype(np.float64)
    if not (values.min() >= 0 and values.max() <= most):  # also if they are not finite
        known = f"values from {values.min():g} to {values.max():g}, and only 0 to {most:g} can be scaled"
        raise ValueError(f"the image's mode {mode} has {known}; save it with 8 bits")
    return (values / most * 255).round().astype(np.uint8)
