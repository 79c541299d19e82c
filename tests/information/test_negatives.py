"""The log odds against hard negatives, where every likelihood is known."""

import pytest
import torch
from pixel_world import BAND, SCHEDULE, PixelGaussians, embedded

from mi_ray.information.negatives import margin, posteriors
from mi_ray.information.pointwise import denoising_errors, log_odds
from mi_ray.information.probes import draw_probes


@pytest.fixture(scope="module")
def world():
    return PixelGaussians(0.35 * torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1)))


def errors_of(world, x, labels, num_samples, seed=0):
    probes = draw_probes([seed], num_samples, *BAND, x.shape[1:])
    index = torch.zeros(len(x), dtype=torch.long)
    branches = embedded(*labels), torch.arange(len(labels))[None]
    errors = denoising_errors(world.predict_epsilon, SCHEDULE, x, index, *branches, probes, 4096)
    return errors[:, 0], errors[:, 1:], probes


def truth(world, x, label, others):
    against = torch.stack([world.log_ratio(x, other, label).sum((1, 2)) for other in others], 1)
    return -against.logsumexp(1)


def test_log_odds_equal_the_analytic_value(world):
    x = torch.cat([world.draw(0, 3), world.draw(2, 3, seed=1)])
    draws = torch.stack([log_odds(*errors_of(world, x, (0, 1, 2, 3), 400, seed))[0] for seed in range(24)])
    deviation = (draws.mean(0) - truth(world, x, 0, (1, 2, 3))).abs()
    assert (deviation < 3.5 * draws.std(0) / 24**0.5 + 0.05).all()


def test_standard_error_equals_the_spread_over_draws(world):
    x = world.draw(0, 3)
    draws = [log_odds(*errors_of(world, x, (0, 1, 2), 100, seed)) for seed in range(40)]
    spread = torch.stack([value for value, _ in draws]).std(0)
    claimed = torch.stack([error for _, error in draws]).mean(0)
    assert (spread < 1.35 * claimed).all()
    assert (spread > 0.5 * claimed).all()


def test_highest_posterior_belongs_to_the_shown_prompt(world):
    for shown in range(4):
        x = world.means[[shown]]
        posterior = posteriors(*errors_of(world, x, (0, 1, 2, 3), 400))
        torch.testing.assert_close(posterior.sum(1), torch.ones(1))
        assert posterior.argmax() == shown


def test_posterior_agrees_with_log_odds(world):
    errors = errors_of(world, world.draw(0, 5), (0, 1, 2, 3), 50)
    value, _ = log_odds(*errors)
    torch.testing.assert_close(value.sigmoid(), posteriors(*errors)[:, 0])


def test_margin_is_the_difference_to_the_likeliest_negative(world):
    x = torch.cat([world.draw(0, 3), world.draw(2, 3, seed=1)])
    draws = torch.stack([margin(*errors_of(world, x, (0, 1, 2, 3), 400, seed)).value for seed in range(24)])
    leads = torch.stack([world.log_ratio(x, 0, other).sum((1, 2)) for other in (1, 2, 3)]).amin(0)
    assert ((draws.mean(0) - leads).abs() < 3.5 * draws.std(0) / 24**0.5 + 0.05).all()


def test_single_probe_has_no_standard_error(world):
    value, error = log_odds(*errors_of(world, world.draw(0, 2), (0, 1), 1))
    assert value.isfinite().all()
    assert error.isnan().all()
