"""Maps and word scores: sums, closed forms per pixel, and the embedded model."""

import pytest
import torch
from pixel_world import BAND, SCHEDULE, PixelGaussians, embedded

from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.information.maps import information_maps, upsampled, without_each_word
from mi_ray.information.pointwise import beside, denoising_errors, pmi
from mi_ray.information.probes import draw_probes

PLACE = (slice(None), slice(1, 3), slice(4, 7))  # rows and columns that depend on the prompt


@pytest.fixture(scope="module")
def world():
    """Label 1 differs from label 0 only in one region."""
    means = torch.zeros(2, 3, 8, 8)
    means[1][PLACE] = 0.6
    return PixelGaussians(means)


def maps_of(world, x, num_samples, seed=0, batch_size=4096):
    probes = draw_probes([seed], num_samples, *BAND, x.shape[1:])
    index = torch.zeros(len(x), dtype=torch.long)
    return information_maps(
        world.predict_epsilon, SCHEDULE, x, index, embedded(1), embedded(0), probes, batch_size
    ), probes


def test_direct_map_equals_the_log_likelihood_ratio_of_each_pixel(world):
    x = torch.cat([world.draw(1, 2), world.draw(0, 2, seed=1)])
    draws = torch.stack([maps_of(world, x, 300, seed)[0].direct for seed in range(20)])
    error = draws.std(0) / 20**0.5
    assert ((draws.mean(0) - world.log_ratio(x, 1, 0)).abs() < 4.5 * error + 0.01).all()


def test_maps_are_zero_outside_the_prompted_pixels(world):
    maps, _ = maps_of(world, world.draw(1, 3), 40)
    elsewhere = torch.ones(8, 8, dtype=torch.bool)
    elsewhere[PLACE[1:]] = False
    assert (maps.orthogonal[:, ~elsewhere] > 0.05).all()
    for values in (maps.direct, maps.orthogonal):
        torch.testing.assert_close(values[:, elsewhere], torch.zeros_like(values[:, elsewhere]), atol=1e-4, rtol=0)
    assert maps.direct[:, ~elsewhere].sum() > 0


def test_wrong_prompt_has_negative_pixels(world):
    maps, _ = maps_of(world, world.means[[0]], 100)
    assert (maps.direct[0][PLACE[1:]] < 0).all()
    assert (maps.orthogonal >= 0).all()


def test_maps_do_not_depend_on_batches(world):
    x = world.draw(1, 3)
    whole, pieces = (maps_of(world, x, 7, batch_size=size)[0] for size in (4096, 5))
    torch.testing.assert_close(whole.direct, pieces.direct)
    torch.testing.assert_close(whole.orthogonal, pieces.orthogonal)


def test_upsampled_keeps_sums_and_positions():
    maps = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    large = upsampled(maps, (64, 64))
    assert large.shape == (2, 64, 64)
    torch.testing.assert_close(large.sum((1, 2)), maps.sum((1, 2)), rtol=1e-4, atol=1e-4)
    spot = torch.zeros(1, 8, 8)
    spot[0, 2, 5] = 1
    peak = upsampled(spot, (64, 64))[0]
    assert peak[16:24, 40:48].max() == peak.max()


def test_without_each_word_leaves_out_content_words():
    assert without_each_word("A red circle, left of a blue square.") == [
        ("red", "A circle, left of a blue square."),
        ("circle", "A red , left of a blue square."),
        ("left", "A red circle, of a blue square."),
        ("blue", "A red circle, left of a square."),
        ("square", "A red circle, left of a blue ."),
    ]
    assert without_each_word("a red, red rose")[1] == ("red", "a red, rose")
    assert without_each_word("") == without_each_word("a , the") == []


class TestOnTheEmbeddedModel:
    @pytest.fixture(scope="class")
    def denoiser(self):
        return load_denoiser("shapes")

    @pytest.fixture(scope="class")
    def case(self, denoiser):
        prompts = ["a red circle left of a blue square", "two hearts"]
        latents = torch.randn(3, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
        index = torch.tensor([0, 1, 0])
        probes = draw_probes([1, 2], 5, -5.0, -1.0, denoiser.latent_shape)
        return latents, index, denoiser.encode_prompts(prompts), denoiser.encode_prompts([""]), probes

    def test_maps_have_the_shape_of_the_latents_and_sum_to_pmi(self, denoiser, case):
        latents, index, conditioning, null, probes = case
        maps = information_maps(
            denoiser.predict_epsilon, denoiser.schedule, latents, index, conditioning, null, probes, 16
        )
        branches = beside(conditioning, null)
        errors = denoising_errors(denoiser.predict_epsilon, denoiser.schedule, latents, index, *branches, probes, 16)
        value, _ = pmi(errors[:, 0], errors[:, 1], probes)
        assert maps.direct.shape == maps.orthogonal.shape == (3, *denoiser.latent_shape[1:])
        torch.testing.assert_close(maps.direct.sum((1, 2)), value, rtol=1e-3, atol=1e-3)
        assert (maps.orthogonal.sum((1, 2)) > 0).all()
