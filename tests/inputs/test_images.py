"""Which images are read: formats, modes, orientation, metadata."""

import io

import numpy as np
import pytest
from pair_inputs import image_of
from PIL import ExifTags, Image, PngImagePlugin, features

from mi_ray.inputs.images import FORMATS, read_image

SCENE = image_of("a red circle left of a blue square")


def saved(image: Image.Image, kind: str, **more) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **more)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_every_format_is_read(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert kind in FORMATS
    read = read_image(saved(Image.fromarray(SCENE), kind), (64, 64), "crop")
    assert np.abs(read.astype(int) - SCENE).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("fit", ["exact", "crop"])
def test_exif_orientation_is_applied(kind, fit):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = Image.fromarray(SCENE).transpose(Image.Transpose.ROTATE_90)
    more = {"quality": 100} if kind in ("JPEG", "WEBP") else {}
    read = read_image(saved(turned, kind, exif=exif, **more), (64, 64), fit)
    assert np.abs(read.astype(int) - SCENE).mean() < 4


def test_an_image_that_is_turned_has_its_size_when_upright():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = saved(Image.new("RGB", (64, 32)), "JPEG", exif=exif)
    assert read_image(content, (64, 32), "exact").shape == (64, 32, 3)
    with pytest.raises(ValueError, match="has 32x64 pixels, not 64x32"):
        read_image(content, (32, 64), "exact")


RAMP = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(RAMP), "PNG"),
        (Image.fromarray(RAMP), "TIFF"),
        (Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        (Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "32-bit TIFF", "float TIFF"],
)
def test_values_of_more_than_eight_bits_are_scaled(image, kind):
    read = read_image(saved(image, kind), (64, 64), "crop")
    assert np.abs(read[..., 0].astype(float) - RAMP / 257).max() <= 1
    assert len(np.unique(read)) == 256


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 255.0], [0.0, np.nan], [0.0, np.inf]])
def test_other_ranges_are_a_reason(values):
    image = Image.fromarray(np.resize(np.array(values, np.float32), (64, 64)))
    with pytest.raises(ValueError, match="only 0 to 1 can be scaled; save it with 8 bits"):
        read_image(saved(image, "TIFF"), (64, 64), "crop")


@pytest.mark.parametrize("size", [3 << 20, 80 << 20])
def test_metadata_that_is_too_large_leaves_the_pixels(size):
    image, texts = Image.fromarray(SCENE), PngImagePlugin.PngInfo()
    texts.add_text("comment", "x" * size, zip=True)
    for content in (saved(image, "PNG", pnginfo=texts), saved(image, "PNG", icc_profile=bytes(size))):
        assert (read_image(content, (64, 64), "exact") == SCENE).all()


def test_too_many_pixels_are_not_called_corrupt(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too many pixels"):
        read_image(saved(Image.fromarray(SCENE), "PNG"), (64, 64), "exact")
