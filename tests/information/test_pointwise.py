"""The image-conditioned estimators against a world whose densities and optimal denoisers are closed-form."""

import math

import pytest
import torch

from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information import pointwise

BAND = (-11.0, 11.0)
SPREAD = 0.5  # standard deviation of each component


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule(
        alphas_cumprod=torch.linspace(12, -12, 1000, dtype=torch.float64).sigmoid(),
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=0,
        final_alpha_cumprod=1.0,
    )


class GaussianMixture:
    """x | label k ~ N(mean_k, SPREAD^2 I), labels equally likely; an embedding holds the label, or -1 for none."""

    def __init__(self, schedule: NoiseSchedule, labels: int, dim: int, distance: float):
        means = torch.randn(labels, dim, generator=torch.Generator().manual_seed(1))
        self.schedule, self.means = schedule, distance * means

    def draw(self, label: int, count: int, seed: int = 0) -> torch.Tensor:
        noise = torch.randn(count, self.means.shape[1], generator=torch.Generator().manual_seed(seed))
        return self.means[label] + SPREAD * noise

    def pmi(self, x: torch.Tensor, label: int) -> torch.Tensor:
        """log p(x|label) - log p(x)."""
        logits = -(x[:, None] - self.means).square().sum(-1) / (2 * SPREAD**2)
        return logits[:, label] - logits.logsumexp(1) + math.log(len(self.means))

    def predict_epsilon(self, x_t, timesteps, embeddings):
        """The optimal epsilon: E[eps | x_t], under the label or under the mixture."""
        lower = timesteps.long().clamp(max=998)
        log_snr = torch.lerp(
            self.schedule.log_snr[lower].float(),
            self.schedule.log_snr[lower + 1].float(),
            (timesteps - lower).float(),
        )
        signal, sigma = log_snr.sigmoid().sqrt()[:, None], (-log_snr).sigmoid().sqrt()[:, None]
        variance = signal.square() * SPREAD**2 + sigma.square()
        gain = signal * SPREAD**2 / variance
        mean_x = self.means + gain[..., None] * (x_t[:, None] - signal[..., None] * self.means)
        labels = embeddings[:, 0, 0].long()
        posterior = (-(x_t[:, None] - signal[..., None] * self.means).square().sum(-1) / (2 * variance)).softmax(1)
        known = torch.nn.functional.one_hot(labels.clamp(min=0), len(self.means)).float()
        weights = torch.where(labels[:, None] >= 0, known, posterior)
        return (x_t - signal * (weights[..., None] * mean_x).sum(1)) / sigma


def branches(*labels: int) -> torch.Tensor:
    return torch.tensor(labels, dtype=torch.float32).view(1, -1, 1, 1)


def errors_of(world, x, labels, schedule, num_samples, seed=0, batch_size=4096):
    probes = pointwise.draw_probes([seed], num_samples, *BAND, x.shape[1:])
    index = torch.zeros(len(x), dtype=torch.long)
    embeddings = branches(*labels)
    return pointwise.denoising_errors(world.predict_epsilon, schedule, x, index, embeddings, probes, batch_size), probes


@pytest.mark.parametrize(("labels", "dim", "distance"), [(2, 1, 1.0), (3, 8, 0.5), (5, 32, 0.3)])
def test_pmi_equals_the_analytic_value(schedule, labels, dim, distance):
    world = GaussianMixture(schedule, labels, dim, distance)
    x = world.draw(0, 4)
    for label in (0, 1):
        draws = []
        for seed in range(24):
            errors, probes = errors_of(world, x, (label, -1), schedule, 400, seed)
            draws.append(pointwise.pmi(errors[:, 0], errors[:, 1], probes)[0])
        draws = torch.stack(draws)
        standard_error = draws.std(0) / len(draws) ** 0.5
        deviation = (draws.mean(0) - world.pmi(x, label)).abs()
        assert (deviation < 3.5 * standard_error + 0.01).all()


def test_pmi_is_zero_where_the_prompt_says_nothing(schedule):
    world = GaussianMixture(schedule, 1, 8, 1.0)
    errors, probes = errors_of(world, world.draw(0, 3), (0, -1), schedule, 50)
    value, _ = pointwise.pmi(errors[:, 0], errors[:, 1], probes)
    torch.testing.assert_close(value, torch.zeros(3), atol=1e-3, rtol=0)


def test_standard_error_covers_the_spread_over_draws(schedule):
    world = GaussianMixture(schedule, 3, 8, 0.5)
    x = world.draw(0, 2)
    values, claimed = [], []
    for seed in range(40):
        errors, probes = errors_of(world, x, (0, -1), schedule, 64, seed)
        value, standard_error = pointwise.pmi(errors[:, 0], errors[:, 1], probes)
        values.append(value)
        claimed.append(standard_error)
    spread, claimed = torch.stack(values).std(0), torch.stack(claimed).mean(0)
    assert (spread < 1.3 * claimed).all()  # conservative: strata only reduce the spread
    assert (spread > 0.2 * claimed).all()


def test_contrastive_equals_the_analytic_value(schedule):
    world = GaussianMixture(schedule, 4, 8, 0.4)
    x = world.draw(2, 4)
    draws = []
    for seed in range(24):
        errors, probes = errors_of(world, x, (2, 0, 1, 3), schedule, 400, seed)
        draws.append(pointwise.pmi_contrastive(errors[:, 0], errors[:, 1:], probes))
    draws = torch.stack(draws)
    logits = -(x[:, None] - world.means).square().sum(-1) / (2 * SPREAD**2)
    truth = logits[:, 2] - logits[:, [0, 1, 3]].logsumexp(1) + math.log(3)
    assert ((draws.mean(0) - truth).abs() < 3.5 * draws.std(0) / 24**0.5 + 0.05).all()


def test_batches_change_nothing(schedule):
    world = GaussianMixture(schedule, 3, 8, 0.5)
    x = world.draw(0, 5)
    whole, _ = errors_of(world, x, (0, 1, -1), schedule, 7)
    pieces, _ = errors_of(world, x, (0, 1, -1), schedule, 7, batch_size=4)
    torch.testing.assert_close(whole, pieces)
    assert whole.shape == (5, 3, 7)


def test_every_candidate_of_a_prompt_meets_the_same_noise(schedule):
    world = GaussianMixture(schedule, 3, 8, 0.5)
    x = world.draw(0, 1).expand(4, -1)
    errors, _ = errors_of(world, x, (0,), schedule, 6)
    torch.testing.assert_close(errors, errors[:1].expand(4, -1, -1))
