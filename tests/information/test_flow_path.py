"""Pointwise scores through the whole path of a flow family, for mixture data: equal to the analytic values.

The network in place of the transformer knows only the mixture and the flow's own definition, x_s = (1 - s) x0 +
s epsilon. How the network is called, the sign of its output, the level that its time means, and the conversion of its
velocity to epsilon are those of the package.
"""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from test_pointwise import BAND, denoiser_of

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families import FAMILIES
from mi_ray.diffusion.families.family import pack, unpack
from mi_ray.diffusion.flows import FlowSchedule
from mi_ray.information import pointwise
from mi_ray.information.closed_form import SCHEDULE, LabelledMixture
from mi_ray.information.probes import Design, draw_probes

SHAPE = (2, 2, 2)  # of the latents, 8 numbers
WORLD = LabelledMixture(3, 8, 0.5)
SHIFT = 3.0  # of the noise levels
# What each network is told for the level s, its inverse, and the sign of its output.
TOLD = {
    "StableDiffusion3Pipeline": (lambda t: t / 1000, 1),  # 1000 s
    "Lumina2Pipeline": (lambda t: 1 - t, -1),  # 1 - s
    "CogView4Pipeline": (lambda t: SHIFT * t / (1000 + (SHIFT - 1) * t), 1),  # 1000 times s before the shift
    "ChromaPipeline": (lambda t: t.bfloat16().double(), 1),  # s, rounded by the network
}


class MixtureVelocity(torch.nn.Module):
    """E[epsilon - x0 | x_s, label], or without a label for the null prompt, in float64."""

    dtype = torch.float32

    def __init__(self, family: str):
        super().__init__()
        self.level, self.sign = TOLD[family]
        self.packed = family == "ChromaPipeline"
        self.config = {"in_channels": 8 if self.packed else 2}

    def forward(self, hidden_states, timestep, encoder_hidden_states, **others):
        x = unpack(hidden_states, (len(hidden_states), *SHAPE)) if self.packed else hidden_states
        s, means = self.level(timestep.double())[:, None, None], WORLD.means.double()
        residual = x.flatten(1).double()[:, None] - (1 - s) * means  # (n, labels, 8)
        total = ((1 - s) * WORLD.spread).square() + s.square()
        likelihood = (-residual.square().sum(-1) / (2 * total[..., 0])).softmax(1)
        label = encoder_hidden_states.flatten(1)[:, :1].long()
        known = (label - 1 == torch.arange(len(means))).double()
        weights = torch.where(label > 0, known, likelihood)[..., None]
        epsilon = s / total * residual
        clean = means + (1 - s) * WORLD.spread**2 / total * residual
        velocity = self.sign * (weights * (epsilon - clean)).sum(1).view_as(x).float()
        return (pack(velocity) if self.packed else velocity,)


def flow_model(family: str, dtype=torch.bfloat16):
    """predict_epsilon and schedule of a model of the family, for `pointwise`.

    Args:
        dtype: in which a network of a family that rounds the time takes it.
    """
    shift = {"shift": SHIFT}
    if family == "CogView4Pipeline":  # its shift by size is SHIFT for this size
        shift = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": SHIFT - 1, "max_shift": 1.0}
        shift["base_image_seq_len"] = math.prod(SHAPE[1:]) // 4
    config = FlowMatchEulerDiscreteScheduler(**shift).config | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    schedule = FlowSchedule.from_config(config, FAMILIES[family].flow, SHAPE).rounded_to(dtype)
    denoiser = denoiser_of(family, MixtureVelocity(family), schedule)

    def predict_epsilon(x_t, timesteps, conditioning):
        label = conditioning["embeds"][:, None]  # one token
        ones = torch.ones(len(label), 1)
        others = {"pooled": ones, "mask": ones, "length": torch.ones(len(label)).long(), "size": ones.expand(-1, 6)}
        return denoiser.predict_epsilon(x_t, timesteps, Conditioning({"embeds": label, **others}))

    return predict_epsilon, schedule


def statistics(model, x, prompt_index, branches, probes, reference=None):
    predict_epsilon, schedule = model
    latents = x.view(len(x), *(SHAPE if isinstance(schedule, FlowSchedule) else (8,)))
    return pointwise.denoising_statistics(
        predict_epsilon, schedule, latents, prompt_index, *branches, probes, 2**14, reference
    )


@pytest.mark.parametrize("family", TOLD)
def test_pmi_of_a_mixture_equals_the_analytic_value(family):
    """For each image, under its own prompt and under a wrong one."""
    x, replicates, model = WORLD.draw(0, 4), 60, flow_model(family)
    seeds = [1000 + i // len(x) for i in range(replicates * len(x))]
    for label in (0, 1):
        probes = draw_probes(seeds, 64, *BAND, SHAPE, Design(antithetic=True))
        branches = pointwise.beside(WORLD.embed(label).expand(len(seeds)), WORLD.null)
        errors, _ = statistics(model, x.repeat(replicates, 1), torch.arange(len(seeds)), branches, probes)
        found = pointwise.pmi(*errors.unbind(1), probes).value.view(replicates, len(x))
        truth, error = WORLD.pmi(x, label), found.std(0) / replicates**0.5
        assert ((found.mean(0) - truth).abs() < 3.5 * error + 0.01).all()
        assert (error < 0.02 * truth.abs() + 0.05).all()  # the values are up to 18 nats


@pytest.mark.parametrize("family", TOLD)
def test_contrast_between_the_labels_of_a_mixture_equals_the_analytic_value(family):
    x, replicates, model = WORLD.draw(2, 4), 40, flow_model(family)
    branches, found = (WORLD.embed(2, 0, 1), torch.arange(3)[None]), []
    for seed in range(replicates):
        probes = draw_probes([seed], 128, *BAND, SHAPE)
        errors, _ = statistics(model, x, torch.zeros(4).long(), branches, probes)
        found.append(pointwise.pmi_contrastive(errors[:, 0], errors[:, 1:], probes).value)
    found, logits = torch.stack(found), WORLD.log_likelihood(x)
    truth = logits[:, 2] - logits[:, :2].logsumexp(1) + math.log(2)
    assert ((found.mean(0) - truth).abs() < 3.5 * found.std(0) / replicates**0.5 + 0.05).all()


@pytest.mark.parametrize("family", TOLD)
def test_averages_over_a_mixture_agree_with_the_analytic_information(family):
    """Of both estimators, over draws of image and label. The analytic pointwise values are the control variate."""
    each, labels = 600, len(WORLD.means)
    x = torch.cat([WORLD.draw(label, each) for label in range(labels)])
    prompts = Conditioning.cat(WORLD.embed(label).expand(each) for label in range(labels))
    drawn = torch.cat([WORLD.pmi(x[label * each :][:each], label) for label in range(labels)]).mean().item()
    information = torch.cat([WORLD.pmi(WORLD.draw(label, 200_000), label) for label in range(labels)]).mean().item()
    probes = draw_probes(list(range(len(x))), 16, *BAND, SHAPE, Design(loc=1.0, scale=2.0, antithetic=True))
    branches = pointwise.beside(prompts, WORLD.null)
    errors, distances = statistics(flow_model(family), x, torch.arange(len(x)), branches, probes, reference=1)
    direct = pointwise.pmi(*errors.unbind(1), probes).value.mean().item()
    orthogonal = pointwise.pmi_orthogonal(distances[:, 0], probes).value.mean().item()
    assert direct - drawn == pytest.approx(0, abs=0.03 * information)
    assert orthogonal == pytest.approx(information, rel=0.03)


@pytest.mark.parametrize("family", TOLD)
def test_every_error_is_that_of_the_variance_preserving_path_at_the_level_the_network_is_told(family):
    """Where the network rounds its time, the noise is mixed at the rounded level; otherwise the errors would differ."""
    x = WORLD.draw(1, 6)
    branches = pointwise.beside(WORLD.embed(1).expand(6), WORLD.null)
    probes = draw_probes([0], 40, -8.0, 8.0, SHAPE)
    probes = replace(probes, noise_seeds=probes.noise_seeds.expand(6, -1))

    def apart(model):
        """Relative distance between the errors of the two paths, at the levels of the flow's schedule."""
        found, _ = statistics(model, x, torch.arange(6), branches, probes)
        _, alpha, sigma = model[1].levels_at(probes.log_snr)
        flat = replace(probes, log_snr=2 * (alpha / sigma).log(), latent_shape=(8,))
        truth, _ = statistics((WORLD.predict_epsilon, SCHEDULE), x, torch.arange(6), branches, flat)
        return ((found - truth).norm() / truth.norm()).item()

    assert apart(flow_model(family)) < 1e-5
    if FAMILIES[family].flow.rounds:
        assert apart(flow_model(family, torch.float32)) > 1e-4
