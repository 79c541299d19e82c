"""The pointwise estimators, compared with distributions with a known density and optimal denoiser."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.special import stdtrit

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import PipelineDenoiser
from mi_ray.diffusion.families import FAMILIES
from mi_ray.diffusion.flows import FlowSchedule
from mi_ray.diffusion.schedules import (
    NoiseSchedule,
    alpha_sigma_at,
    epsilon_from_flow,
    prediction_from,
    x0_from_epsilon,
)
from mi_ray.diffusion.sizes import Sizes
from mi_ray.information import pointwise
from mi_ray.information.closed_form import SCHEDULE, JointGaussian, LabelledMixture
from mi_ray.information.probes import Design, adaptive_logistic, draw_probes, effective_sample_size

BAND = (-11.0, 11.0)
LOGISTIC = {"loc": 0.7, "scale": 1.5}
UNBIASED = {
    "random": Design(levels="random"),
    "jittered": Design(levels="jittered"),
    "jittered, antithetic": Design(levels="jittered", antithetic=True),
    "logistic": Design(**LOGISTIC, levels="random"),
    "logistic, jittered": Design(**LOGISTIC, levels="jittered"),
    "logistic, jittered, antithetic": Design(**LOGISTIC, levels="jittered", antithetic=True),
}
DESIGNS = UNBIASED | {
    "midpoints": Design(),
    "midpoints, antithetic": Design(antithetic=True),
    "logistic, midpoints": Design(**LOGISTIC),
}


def statistics(world, x, prompts, probes, batch_size=2**14):
    """Errors and distances (n, 2, K) of each x under its own prompt and the null prompt."""
    probes = replace(probes, noise_seeds=probes.noise_seeds.expand(len(x), -1))
    branches = pointwise.beside(prompts, world.null)
    return pointwise.denoising_statistics(
        world.predict_epsilon, SCHEDULE, x, torch.arange(len(x)), *branches, probes, batch_size, reference=1
    )


def estimates(world, x, prompts, design, num_samples, replicates, band=BAND):
    """i_s and its standard error of n candidates in `replicates` independent draws: (replicates, n) each."""
    count, found = len(x), []
    each = 10  # number of noise sets per set of levels
    x, prompts = x.repeat(each, 1), Conditioning.cat([prompts] * each)
    for seed in range(replicates // each):
        seeds = [1000 * seed + i // count for i in range(each * count)]
        probes = draw_probes(seeds, num_samples, *band, x.shape[1:], design, level_seed=seed)
        errors, _ = statistics(world, x, prompts, probes)
        found.append(torch.stack(pointwise.pmi(*errors.unbind(1), probes)).view(2, each, count))
    return torch.cat(found, 1)


# ------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("design", UNBIASED)
@pytest.mark.parametrize(("dim", "correlation"), [(1, 0.95), (8, 0.6), (32, 0.3)])
def test_pmi_is_unbiased_for_any_number_of_probes(dim, correlation, design):
    """With only four probes, the mean over draws equals the analytic value of the band."""
    world = JointGaussian(dim, correlation)
    x, prompts = world.draw(4)
    band = (-6.0, 5.0)
    draws, _ = estimates(world, x, prompts, UNBIASED[design], 4, 400, band)
    # noise sets with the same levels are not independent, so the spread is that of their means
    means = draws.view(40, 10, -1).mean(1).double()
    deviation = means.mean(0) - world.pmi(x, prompts, *band)
    assert (deviation.abs() < 3 * means.std(0) / 40**0.5 + 1e-3).all()


@pytest.mark.parametrize(
    ("labels", "dim", "distance", "design"),
    [(3, 8, 0.5, design) for design in DESIGNS]
    + [(*world, design) for world in [(2, 1, 1.0), (5, 32, 0.3)] for design in ("jittered", "logistic, midpoints")],
)
def test_pmi_of_a_mixture_equals_the_analytic_value(labels, dim, distance, design):
    world = LabelledMixture(labels, dim, distance)
    x = world.draw(0, 4)
    for label in (0, 1):
        draws, _ = estimates(world, x, world.embed(label).expand(4), DESIGNS[design], 64, 120)
        means = draws.view(12, 10, -1).mean(1)
        deviation = means.mean(0) - world.pmi(x, label)
        assert (deviation.abs() < 3.5 * means.std(0) / 12**0.5 + 0.01).all()


@pytest.mark.parametrize(("dim", "correlation"), [(4, 0.5), (8, 0.9), (16, 0.8)])
def test_averages_agree_with_the_analytic_information(dim, correlation):
    """Both estimators over draws of (x, y). The analytic i_s is a control variate that removes their variance."""
    world = JointGaussian(dim, correlation)
    x, prompts = world.draw(4000)
    probes = draw_probes(list(range(4000)), 16, *BAND, (dim,), Design(loc=1.0, scale=2.0, antithetic=True))
    errors, distances = statistics(world, x, prompts, probes)
    direct, _ = pointwise.pmi(*errors.unbind(1), probes)
    orthogonal, _ = pointwise.pmi_orthogonal(distances[:, 0], probes)
    drawn = world.pmi(x, prompts).mean() - world.information
    assert (direct.mean() - drawn).item() == pytest.approx(world.information, rel=0.02)
    assert orthogonal.mean().item() == pytest.approx(world.information, rel=0.02)
    assert (orthogonal >= 0).all()
    assert (direct < 0).any()  # i_s is signed: some y make their x less likely
    assert (distances[:, 1] == 0).all()


@pytest.mark.parametrize(("labels", "dim", "distance"), [(3, 4, 0.7), (4, 16, 0.4)])
def test_averages_over_a_mixture_agree_with_the_analytic_information(labels, dim, distance):
    """The same for a mixture with equally likely labels. The analytic pointwise values are the control variate."""
    world, each = LabelledMixture(labels, dim, distance), 1200
    x = torch.cat([world.draw(label, each) for label in range(labels)])
    prompts = Conditioning.cat(world.embed(label).expand(each) for label in range(labels))
    truth = torch.cat([world.pmi(x[label * each :][:each], label) for label in range(labels)])
    probes = draw_probes(list(range(len(x))), 16, *BAND, (dim,), Design(loc=1.0, scale=2.0, antithetic=True))
    errors, distances = statistics(world, x, prompts, probes)
    direct, _ = pointwise.pmi(*errors.unbind(1), probes)
    orthogonal, _ = pointwise.pmi_orthogonal(distances[:, 0], probes)
    many = torch.cat([world.pmi(world.draw(label, 200_000), label) for label in range(labels)])
    information = many.mean().item()
    assert (direct.mean() - truth.mean()).item() == pytest.approx(0, abs=0.02 * information)
    assert orthogonal.mean().item() == pytest.approx(information, rel=0.02)


@pytest.mark.parametrize("world", [JointGaussian(8, 0.0), LabelledMixture(1, 8, 1.0)], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("design", DESIGNS)
def test_pmi_is_zero_for_an_uninformative_prompt(world, design):
    x, prompts = world.draw(3) if isinstance(world, JointGaussian) else (world.draw(0, 3), world.embed(0, 0, 0))
    probes = draw_probes([0], 50, *BAND, x.shape[1:], DESIGNS[design])
    errors, distances = statistics(world, x, prompts, probes)
    for value, _ in (
        pointwise.pmi(*errors.unbind(1), probes),
        pointwise.pmi_orthogonal(distances[:, 0], probes),
    ):
        torch.testing.assert_close(value, torch.zeros(3), atol=1e-3, rtol=0)


def test_contrastive_equals_the_analytic_value():
    world = LabelledMixture(4, 8, 0.4)
    x = world.draw(2, 4)
    draws, branches = [], (world.embed(2, 0, 1, 3), torch.arange(4)[None])
    for seed in range(24):
        probes = draw_probes([seed], 200, *BAND, (8,))
        errors = pointwise.denoising_errors(
            world.predict_epsilon, SCHEDULE, x, torch.zeros(4).long(), *branches, probes, 4096
        )
        draws.append(pointwise.pmi_contrastive(errors[:, 0], errors[:, 1:], probes).value)
    draws = torch.stack(draws)
    logits = world.log_likelihood(x)
    truth = logits[:, 2] - logits[:, [0, 1, 3]].logsumexp(1) + math.log(3)
    assert ((draws.mean(0) - truth).abs() < 3.5 * draws.std(0) / 24**0.5 + 0.05).all()


# ------------------------------------------------------------------------------------------ parameterisations
class Predicting(torch.nn.Module):
    """A model in place of a UNet: the closed-form prediction, converted to this prediction_type."""

    def __init__(self, world, prediction_type: str):
        super().__init__()
        self.world, self.prediction_type = world, prediction_type
        self.config, self.dtype = {"in_channels": 2}, torch.float32

    def forward(self, x_t, timesteps, encoder_hidden_states):
        conditioning = Conditioning({"embeds": encoder_hidden_states})
        epsilon = self.world.predict_epsilon(x_t.flatten(1), timesteps, conditioning).view_as(x_t)
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in alpha_sigma_at(SCHEDULE.log_snr.float(), timesteps))
        x0 = x0_from_epsilon(epsilon, x_t, alpha, sigma)
        return SimpleNamespace(sample=prediction_from(self.prediction_type, x0, epsilon, alpha, sigma))


class Unused(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(force_upcast=False, max_position_embeddings=1)


def denoiser_of(family: str, network, schedule):
    pipeline = SimpleNamespace(
        tokenizer=SimpleNamespace(model_max_length=1), text_encoder=Unused(), vae=Unused(), unet=None
    )
    parts = FAMILIES[family], network, pipeline, schedule
    return PipelineDenoiser(*parts, Sizes((2, 2), 1, 1), (2, 2), torch.float32, torch.device("cpu"))


def of_unet(world, kind):
    """A UNet of this prediction type; "zero snr": one that predicts v on a schedule that ends without signal."""
    prediction_type, abar = kind, SCHEDULE.alphas_cumprod
    if kind == "zero snr":
        prediction_type, abar = "v_prediction", torch.cat([abar[:-1], abar.new_zeros(1)])
    schedule = NoiseSchedule(abar, prediction_type=prediction_type)
    network = Predicting(world, prediction_type)
    return denoiser_of("StableDiffusionPipeline", network, schedule).predict_epsilon, schedule


class PredictingVelocity(torch.nn.Module):
    """Stands for a transformer: the closed-form world's u = epsilon - x0 at x_s = (1 - s) x0 + s epsilon."""

    def __init__(self, world, flow_schedule, negated: bool):
        super().__init__()
        self.world, self.schedule, self.negated = world, flow_schedule, negated
        self.config, self.dtype = {"in_channels": 2}, torch.float32

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=False, **others):
        s = 1 - timestep if self.negated else timestep / 1000
        log_snr = 2 * torch.logit(1 - s)
        scale = (log_snr.sigmoid().sqrt() + (-log_snr).sigmoid().sqrt()).view(-1, 1, 1, 1)
        conditioning = Conditioning({"embeds": encoder_hidden_states})
        x_alpha = (hidden_states * scale).flatten(1)
        epsilon = self.world.predict_epsilon(x_alpha, SCHEDULE.timestep_at(log_snr), conditioning)
        epsilon, s = epsilon.view_as(hidden_states), s.view(-1, 1, 1, 1)
        velocity = (epsilon - hidden_states) / (1 - s)
        return (-velocity if self.negated else velocity,)


def of_flow_model(world, family: str):
    """The whole path of a flow model: its schedule, its time, its sign."""
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    schedule = FlowSchedule.from_config(config, FAMILIES[family].flow, (2, 2, 2))
    denoiser = denoiser_of(family, PredictingVelocity(world, schedule, family == "Lumina2Pipeline"), schedule)

    def predict_epsilon(x_t, timesteps, conditioning):
        others = dict.fromkeys(("pooled", "mask"), conditioning["embeds"])  # not read
        return denoiser.predict_epsilon(x_t, timesteps, Conditioning({"embeds": conditioning["embeds"], **others}))

    return predict_epsilon, schedule


def of_rectified_flow(world):
    """u = epsilon - x0 at x_t = (1 - t) x0 + t epsilon, converted to epsilon at a log SNR."""

    def velocity(x_t, t, conditioning):
        log_snr = 2 * torch.logit(1 - t)
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        x_alpha = x_t * (alpha + sigma)
        epsilon = world.predict_epsilon(x_alpha.flatten(1), SCHEDULE.timestep_at(log_snr[:, 0, 0, 0]), conditioning)
        epsilon = epsilon.view_as(x_t)
        return epsilon - x0_from_epsilon(epsilon, x_alpha, alpha, sigma)

    def predict_epsilon(x_alpha, timesteps, conditioning):
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in alpha_sigma_at(SCHEDULE.log_snr.float(), timesteps))
        t, x_t = sigma / (alpha + sigma), x_alpha / (alpha + sigma)
        return epsilon_from_flow(velocity(x_t, t, conditioning), x_alpha, alpha, sigma)

    return predict_epsilon


@pytest.mark.parametrize(
    "kind",
    ["epsilon", "v_prediction", "sample", "zero snr", "flow", "StableDiffusion3Pipeline", "Lumina2Pipeline"],
)
def test_every_parameterisation_gives_the_same_values(kind):
    world = JointGaussian(8, 0.7)
    x, prompts = world.draw(5)
    probes = draw_probes([0], 40, -8.0, 8.0, (2, 2, 2))
    flat = draw_probes([0], 40, -8.0, 8.0, (8,))
    errors, distances = statistics(world, x, prompts, flat)
    if kind == "flow":
        predict_epsilon, schedule = of_rectified_flow(world), SCHEDULE
    else:
        predict_epsilon, schedule = of_flow_model(world, kind) if "Pipeline" in kind else of_unet(world, kind)
    branches = pointwise.beside(prompts, world.null)
    probes = replace(probes, noise_seeds=probes.noise_seeds.expand(5, -1))
    found_errors, found_distances = pointwise.denoising_statistics(
        predict_epsilon, schedule, x.view(5, 2, 2, 2), torch.arange(5), *branches, probes, 64, reference=1
    )
    for truth, found in (
        (pointwise.pmi(*errors.unbind(1), flat), pointwise.pmi(*found_errors.unbind(1), probes)),
        (pointwise.pmi_orthogonal(distances[:, 0], flat), pointwise.pmi_orthogonal(found_distances[:, 0], probes)),
    ):
        torch.testing.assert_close(found.value, truth.value, rtol=1e-3, atol=2e-3)


# ------------------------------------------------------------------------------------------ standard errors
def covered(estimate, truth, claimed, freedom):
    """Share of the nominal 95 % intervals that contain the true value."""
    return ((estimate - truth).abs() < stdtrit(freedom, 0.975) * claimed).float().mean()


@pytest.mark.parametrize(
    "design",
    ["random", "jittered", "jittered, antithetic", "midpoints", "logistic", "logistic, jittered, antithetic"],
)
def test_standard_errors_are_calibrated(design):
    """Their mean square equals the variance over draws; the nominal 95 % interval contains the true value."""
    world = JointGaussian(8, 0.6)
    x, prompts = world.draw(2, seed=3)
    band = (-6.0, 5.0)
    value, claimed = estimates(world, x, prompts, DESIGNS[design], 96, 150, band)
    assert 0.75 < claimed.square().mean() / value.var(0).mean() < 1.35
    freedom = pointwise.degrees_of_freedom(draw_probes([0], 96, *band, (8,), DESIGNS[design]))
    assert 0.9 < covered(value, world.pmi(x, prompts, *band), claimed, freedom) < 0.99


@pytest.mark.parametrize("design", ["random", "jittered", "logistic, jittered, antithetic"])
def test_paired_differences_are_tighter_than_the_values_and_calibrated(design):
    """Candidates of a prompt share their noise, so their difference has a smaller error than each value."""
    world = JointGaussian(16, 0.6)
    x, prompts = world.draw(1, seed=2)
    pair = torch.cat([x, x + 0.3 * torch.randn(1, 16, generator=torch.Generator().manual_seed(5))])
    prompts = prompts.expand(2)
    found = []
    for seed in range(150):
        probes = draw_probes([seed], 96, *BAND, (16,), DESIGNS[design], level_seed=seed)
        errors, _ = statistics(world, pair, prompts, probes)
        difference = pointwise.pmi(*(errors[0] - errors[1]), probes)
        value = pointwise.pmi(*errors.unbind(1), probes)
        torch.testing.assert_close(difference.value, value.value[0] - value.value[1], atol=1e-3, rtol=1e-3)
        found.append(torch.stack([*difference, value.standard_error[0]]))
    difference, claimed, of_value = torch.stack(found).T
    assert 0.75 < claimed.square().mean() / difference.var() < 1.35
    truth = world.pmi(pair, prompts, *BAND) @ torch.tensor([1.0, -1.0]).double()
    assert 0.88 < covered(difference, truth, claimed, pointwise.degrees_of_freedom(probes)) < 0.99
    assert claimed.mean() < 0.5 * of_value.mean()


def test_single_draw_has_no_standard_error():
    for design in (Design(), Design(levels="random")):
        probes = draw_probes([0], 1, *BAND, (3,), design)
        assert pointwise.integrate(torch.ones(2, 1), probes).standard_error.isnan().all()
    pair = draw_probes([0], 2, *BAND, (3,), Design(antithetic=True))
    assert pointwise.integrate(torch.ones(2, 2), pair).standard_error.isnan().all()


@pytest.mark.parametrize("draws", [2, 3, 4, 7, 9])
def test_stratified_estimate_of_a_linear_integrand_has_no_variance(draws):
    probes = draw_probes([0], draws, 0.0, float(draws), (1,))  # weights of 1
    noise = torch.randn(20_000, draws, generator=torch.Generator().manual_seed(0))
    claimed = pointwise.integrate(noise, probes).standard_error.square().mean()
    assert claimed.item() == pytest.approx(draws, rel=0.05)
    for noisy in range(draws):  # each alone counts about once
        alone = torch.zeros_like(noise)
        alone[:, noisy] = noise[:, noisy]
        assert 0.4 < pointwise.integrate(alone, probes).standard_error.square().mean() < 1.6
    straight = pointwise.integrate(3 * probes.log_snr + 2, probes).standard_error
    assert (straight < 1e-4) == (draws >= 4)


@pytest.mark.parametrize("design", DESIGNS)
def test_degrees_of_freedom_are_those_of_the_squared_standard_error(design):
    """For normal draws the squared error has a chi-squared distribution: mean^2 / variance = freedom / 2."""
    probes = draw_probes([0], 36, 0.0, 36.0, (1,), DESIGNS[design])
    probes = replace(probes, weight=torch.ones(36))
    draws = 18 if DESIGNS[design].antithetic else 36
    noise = torch.randn(20_000, draws, generator=torch.Generator().manual_seed(0)).repeat_interleave(36 // draws, 1)
    squared = pointwise.integrate(noise, probes).standard_error.square()
    freedom = 2 * squared.mean().square() / squared.var()
    assert freedom.item() == pytest.approx(pointwise.degrees_of_freedom(probes), rel=0.1)


# ------------------------------------------------------------------------------------------ designs
@pytest.mark.parametrize("design", DESIGNS)
def test_weights_integrate_the_band(design):
    """A constant is integrated exactly, a smooth function up to the noise of the levels."""
    probes = draw_probes([0], 4000, -4.0, 5.0, (1,), DESIGNS[design])
    assert (probes.log_snr >= -4).all()
    assert (probes.log_snr <= 5).all()
    assert probes.weight.sum().item() == pytest.approx(9.0, rel=0.05)
    value, _ = pointwise.integrate(probes.log_snr.square(), probes)
    assert value.item() == pytest.approx((5**3 + 4**3) / 3, rel=0.05)


def test_logistic_weights_equal_the_published_ones():
    """Kong et al.: weight = scale tanh(c / 2) / (sigmoid(z) sigmoid(-z)) on loc -+ c scale."""
    loc, scale, clip = 1.0, 2.0, 3.0
    band = loc - clip * scale, loc + clip * scale
    probes = draw_probes([0], 50, *band, (1,), Design(loc=loc, scale=scale, levels="random"))
    z = (probes.log_snr - loc) / scale
    published = scale * math.tanh(clip / 2) / (z.sigmoid() * (-z).sigmoid())
    torch.testing.assert_close(50 * probes.weight, published, rtol=1e-4, atol=1e-4)
    share = (draw_probes([0], 4000, *band, (1,), Design(loc=loc, scale=scale, levels="random")).log_snr < loc).float()
    assert share.mean().item() == pytest.approx(0.5, abs=0.03)


def test_antithetic_pairs_have_one_level_and_opposite_noise():
    probes = draw_probes([3, 4], 6, *BAND, (5,), Design(antithetic=True))
    torch.testing.assert_close(probes.noise[:, ::2], -probes.noise[:, 1::2])
    torch.testing.assert_close(probes.log_snr[::2], probes.log_snr[1::2])
    assert len(probes.log_snr.unique()) == 3
    assert not torch.equal(probes.noise[0], probes.noise[1])
    with pytest.raises(ValueError, match="num_samples is 5"):
        draw_probes([3], 5, *BAND, (5,), Design(antithetic=True))


def test_each_probe_design_reduces_the_variance():
    """At equal evaluations, over the whole range of log SNR."""
    world = JointGaussian(8, 0.6)
    x, prompts = world.draw(4, seed=1)

    def variance(**design):
        return estimates(world, x, prompts, Design(**design), 16, 200)[0].var(0).mean()

    uniform = variance(levels="random")
    importance = variance(**LOGISTIC, levels="random")
    assert importance < 0.7 * uniform
    assert variance(levels="jittered") < 0.9 * uniform
    assert variance(**LOGISTIC, levels="jittered", antithetic=True) < 0.9 * importance


@pytest.mark.parametrize(("correlation", "loc"), [(0.0, 0.0), (0.9, -math.log(1 - 0.81))])
def test_adaptive_location_is_at_half_the_error(correlation, loc):
    """x|y ~ N(., v I): the MMSE of epsilon is d sigmoid(alpha + log v), so loc = -log v and scale = 1."""
    world = JointGaussian(64, correlation)
    x, prompts = world.draw(32)
    pilot = draw_probes(list(range(32)), 30, *BAND, (64,))
    errors, _ = statistics(world, x, prompts, pilot)
    found = adaptive_logistic(errors[:, 0], pilot.log_snr, 64)
    assert found == (pytest.approx(loc, abs=0.2), pytest.approx(1.0, abs=0.2))


def test_adaptive_location_is_at_the_end_if_the_error_does_not_cross():
    low = adaptive_logistic(torch.full((3, 5), 0.1), torch.arange(5.0), 1)
    assert low == (4.0, 1.0)
    assert adaptive_logistic(torch.full((3, 5), 0.9), torch.arange(5.0), 1) == (0.0, 1.0)


def test_effective_sample_size():
    assert effective_sample_size(torch.full((7,), 0.3)) == pytest.approx(7)
    assert effective_sample_size(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    probes = draw_probes([0], 40, -8.0, 8.0, (1,), Design(loc=0.0, scale=1.0))
    assert 1 < effective_sample_size(probes.weight) < 20


# ------------------------------------------------------------------------------------------ probing
def test_errors_do_not_depend_on_batches():
    world = LabelledMixture(3, 8, 0.5)
    x = world.draw(0, 5)
    index = torch.tensor([0, 1, 0, 1, 1])
    branches = Conditioning.cat([world.embed(0, 1), world.null]), torch.tensor([[0, 1, 2]] * 2)
    probes = draw_probes([7, 8], 7, *BAND, (8,), Design(antithetic=False))
    sizes = []

    def counting(x_t, timesteps, prompts):
        sizes.append(len(x_t))
        return world.predict_epsilon(x_t, timesteps, prompts)

    whole = pointwise.denoising_errors(counting, SCHEDULE, x, index, *branches, probes, 4096)
    assert whole.shape == (5, 3, 7)
    assert sizes == [5 * 3 * 7]
    for batch_size in (16, 4, 2):  # the last one has fewer rows than one candidate has branches
        sizes.clear()
        pieces = pointwise.denoising_errors(counting, SCHEDULE, x, index, *branches, probes, batch_size)
        torch.testing.assert_close(whole, pieces)
        assert max(sizes) <= batch_size
        assert sum(sizes) == 5 * 3 * 7


def test_candidates_of_a_prompt_have_the_same_probes():
    world = LabelledMixture(3, 8, 0.5)
    x = world.draw(0, 1).expand(4, -1)
    probes = draw_probes([0, 1], 6, *BAND, (8,))
    branches = world.embed(0), torch.zeros(2, 1).long()
    index = torch.tensor([0, 0, 0, 1])
    errors = pointwise.denoising_errors(world.predict_epsilon, SCHEDULE, x, index, *branches, probes, 5)
    torch.testing.assert_close(errors[:3], errors[:1].expand(3, -1, -1))
    assert not torch.allclose(errors[3], errors[0])


def test_memory_does_not_depend_on_the_number_of_samples():
    """Noise is drawn in chunks, so the batches and the memory do not grow with K."""
    world = LabelledMixture(2, 2, 0.5)
    probes = draw_probes([0], 30_000, *BAND, (2,))
    held = sum(t.numel() for t in vars(probes).values() if isinstance(t, torch.Tensor))
    assert held == 3 * 30_000  # only a level, a weight and a seed per probe
    branches = world.embed(0, 1), torch.tensor([[0, 1]])
    chunks = pointwise.predictions(
        world.predict_epsilon, SCHEDULE, world.draw(0, 1), torch.zeros(1).long(), *branches, probes, 64
    )
    first = next(iter(chunks))
    assert (first.noise.shape, first.predicted.shape) == ((32, 2), (32, 2, 2))
