"""The image sizes that a model can generate, and the messages for other sizes."""

import json
import shutil

import pytest

from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.folders import check_model, load_sizes
from mi_ray.diffusion.sizes import Sizes


def test_sizes_are_read_from_the_configs(tiny_pipeline):
    """The autoencoder has 4 blocks and the UNet 2."""
    assert load_sizes(str(tiny_pipeline)) == Sizes(own=(64, 64), scale=8, multiple=16)
    assert load_sizes("shapes").own == (64, 64)


def test_stable_diffusion_needs_multiples_of_64():
    blocks = {"block_out_channels": (320, 640, 1280, 1280)}
    sizes = Sizes.of_unet({"sample_size": 96}, {"block_out_channels": (128, 256, 512, 512)})
    assert sizes == Sizes.of_unet({"sample_size": 96} | blocks, blocks) == Sizes((768, 768), 8, 64)
    assert Sizes.of_unet({"sample_size": [64, 96]}, blocks).own == (512, 768)
    assert sizes.image(None, None) == (768, 768)
    assert sizes.image(512, None) == (512, 768)
    assert sizes.latent((512, 768)) == (64, 96)


def test_invalid_size_is_reported_with_the_nearest_valid_sizes():
    sizes = Sizes((512, 512), 8, 64)
    assert sizes.faults(640, None) == []
    assert sizes.faults(500, 30) == [
        "height: 500 pixels are not a multiple of 64, which this model needs; take 448 or 512",
        "width: 30 pixels are not a multiple of 64, which this model needs; take 64",
    ]
    with pytest.raises(ValueError, match="take 448 or 512\nwidth"):
        sizes.image(500, 30)


def test_denoiser_with_an_invalid_size_is_not_loaded(tiny_pipeline):
    with pytest.raises(ValueError, match="width: 40 pixels are not a multiple of 16, which this model needs; take 32"):
        load_denoiser(str(tiny_pipeline), size=(None, 40))


def test_model_without_sample_size_is_refused(tiny_pipeline, tmp_path):
    copy = shutil.copytree(tiny_pipeline, tmp_path / "model")
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": None}))
    for check in (check_model, load_sizes):
        with pytest.raises(ValueError, match=r"has in unet/config\.json no sample_size") as error:
            check(str(copy))
        assert str(error.value).count(str(copy)) == 1
