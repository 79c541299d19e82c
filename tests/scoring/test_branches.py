"""Branches: their number depends on the prompt, and only the likeliest are evaluated at all probes."""

import pytest
import torch

from mi_ray.config import ScoreConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information.pointwise import denoising_errors, log_density, pmi_contrastive
from mi_ray.information.probes import Design, draw_probes
from mi_ray.scoring.branches import branch_errors, encode_each, likeliest_errors
from mi_ray.scoring.scorer import probed_band

TEXTS = [["a red circle", "a blue circle", "two hearts", "a star"], [], ["a cross", "a heart"]]
INDEX = torch.tensor([0, 0, 1, 2, 2])


@pytest.fixture(scope="module")
def world(tiny_pipeline):
    denoiser = load_denoiser(str(tiny_pipeline))
    latents = torch.randn(len(INDEX), *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    return denoiser, latents, *encode_each(denoiser, TEXTS)


def probes(denoiser, count=8, **design):
    return draw_probes([1, 2, 3], count, -5.0, 1.0, denoiser.latent_shape, Design(**design))


def test_candidates_are_evaluated_under_the_branches_of_their_prompt(world):
    denoiser, latents, conditioning, branches = world
    found = branch_errors(denoiser, latents, INDEX, conditioning, branches, probes(denoiser), 5)
    assert [len(errors) for errors in found] == [4, 4, 0, 2, 2]
    for row, prompt in enumerate(INDEX.tolist()):
        if TEXTS[prompt]:
            one = denoising_errors(
                denoiser.predict_epsilon,
                denoiser.schedule,
                latents[row : row + 1],
                torch.tensor([0]),
                conditioning,
                branches[prompt][None],
                probes(denoiser).of(torch.tensor([prompt])),
                5,
            )
            torch.testing.assert_close(found[row], one[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("antithetic", [False, True])
def test_likeliest_branches_are_chosen_by_the_first_probes(world, antithetic):
    denoiser, latents, conditioning, branches = world
    drawn = probes(denoiser, antithetic=antithetic)
    whole = branch_errors(denoiser, latents, INDEX, conditioning, branches, drawn, 5)
    errors, kept, spent = likeliest_errors(denoiser, latents, INDEX, conditioning, branches, drawn, 5, count=2, first=4)
    early, late = drawn.spread(4)
    assert spent == sum(4 * len(TEXTS[p]) + 4 * min(2, len(TEXTS[p])) for p in INDEX.tolist())
    for all_of_them, likeliest, which in zip(whole, errors, kept, strict=True):
        best = log_density(all_of_them[:, early], drawn.at(early)).topk(min(2, len(all_of_them))).indices
        torch.testing.assert_close(likeliest, all_of_them[best], rtol=1e-4, atol=1e-3)
        assert torch.equal(which, best)
    assert sorted([*early.tolist(), *late.tolist()]) == list(range(8))


def test_all_branches_are_kept_if_all_probes_are_first(world):
    denoiser, latents, conditioning, branches = world
    drawn = probes(denoiser, 3)
    whole = branch_errors(denoiser, latents, INDEX, conditioning, branches, drawn, 5)
    left, kept, spent = likeliest_errors(denoiser, latents, INDEX, conditioning, branches, drawn, 5, count=1, first=3)
    assert spent == sum(errors.numel() for errors in whole)
    assert all(torch.equal(a, b) for a, b in zip(whole, left, strict=True))
    assert [len(which) for which in kept] == [len(errors) for errors in whole]


def test_first_probes_are_spread_in_antithetic_pairs(world):
    denoiser, *_ = world
    assert probes(denoiser).spread(3)[0].tolist() == [2, 4, 6]
    assert probes(denoiser).spread(1)[0].tolist() == [4]
    assert probes(denoiser, antithetic=True).spread(2)[0].tolist() == [4, 5]


def test_marginal_of_a_shortlist_counts_all_prompts(world):
    drawn = probes(world[0])
    own, others = torch.rand(2, 8), torch.rand(2, 3, 8)
    far = torch.full((2, 5, 8), 1e4)  # impossible
    whole = pmi_contrastive(own, torch.cat([others, far], 1), drawn)
    torch.testing.assert_close(pmi_contrastive(own, others, drawn, total=8), whole)


def test_band_is_limited_to_the_noise_levels_of_the_model():
    schedule = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", "clip_sample": False})
    noisiest, clearest = schedule.log_snr[[-1, 0]].tolist()
    assert probed_band(ScoreConfig(log_snr_min=-99, log_snr_max=0), schedule) == (noisiest, 0)
    assert probed_band(ScoreConfig(log_snr_min=1, log_snr_max=99), schedule) == (1, clearest)
    with pytest.raises(ValueError, match="is outside the model's noise levels"):
        probed_band(ScoreConfig(log_snr_min=-99, log_snr_max=-98), schedule)
