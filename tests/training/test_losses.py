"""The losses compared with closed forms, and the module compared with PEFT."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.distributions import Normal
from torch.nn.functional import logsigmoid

from mi_ray.config import FinetuneConfig
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.training.losses import METHODS, Batch, Objective, Predictions, weights_of


def config(method: str, **settings) -> FinetuneConfig:
    return FinetuneConfig(method=method, **settings)


@pytest.fixture
def batch() -> Batch:
    """Two prompts with three candidates each."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 4, 3, 3, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([0.5, -0.75, 0.25, -0.1, 1.0, -0.9], dtype=torch.float64)
    conditioning, group = Conditioning({"embeds": torch.zeros(6, 1, 1)}), torch.tensor([0, 0, 0, 1, 1, 1])
    rewards, timesteps = (advantages + 1) / 2, torch.full((6,), 500)
    return Batch(x0, noise, timesteps, conditioning, torch.ones(6), advantages, rewards, group)


@pytest.fixture
def predictions() -> Predictions:
    generator = torch.Generator().manual_seed(1)
    return Predictions(*torch.randn(4, 6, 4, 3, 3, generator=generator, dtype=torch.float64))


def mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().flatten(1).mean(1)


def test_nft_is_the_advantage_times_the_slope_plus_a_proximal_term(batch, predictions):
    """(r l(old + b d) + (1 - r) l(old - b d)) / b = l(old) / b + 2 A <old - target, d> + b |d|^2."""
    p, beta = predictions, 0.3
    d, error = p.new - p.old, p.old - p.target
    slope = 2 * batch.advantages * (error * d).flatten(1).mean(1)
    expected = mean_square(error) / beta + slope + beta * mean_square(d)
    torch.testing.assert_close(METHODS["nft"].loss(p, batch, config("nft", beta=beta)), expected)


def test_awm_starts_with_the_gradient_of_the_weighted_error(batch, predictions):
    new = predictions.old.clone().requires_grad_()
    p = Predictions(predictions.target, new, predictions.old, None)
    (ours,) = torch.autograd.grad(METHODS["awm"].loss(p, batch, config("awm")).sum(), new)
    (expected,) = torch.autograd.grad((batch.advantages * mean_square(new - p.target)).sum(), new)
    torch.testing.assert_close(ours, expected)


def test_dgpo_of_two_candidates_is_diffusion_dpo(batch, predictions):
    """Wallace et al. 2023, eq. 14, for two candidates with advantages 1 and -1."""
    pair = Batch(
        batch.x0[:2], batch.noise[:2], batch.timesteps[:2], batch.conditioning.rows(slice(2)), batch.weights[:2],
        torch.tensor([1.0, -1.0], dtype=torch.float64), None, torch.tensor([0, 0]),
    )  # fmt: skip
    p = Predictions(
        *(values[:2] for values in (predictions.target, predictions.new, predictions.old, predictions.reference))
    )
    gained = mean_square(p.new - p.target) - mean_square(p.reference - p.target)
    expected = -logsigmoid(-7 * (gained[0] - gained[1])) / 7
    torch.testing.assert_close(METHODS["dgpo"].loss(p, pair, config("dgpo", beta=7)), expected.expand(2))


def test_crd_is_zero_if_implied_rewards_equal_the_advantages(batch, predictions):
    p = predictions
    implied = 36 * (mean_square(p.old - p.target) - mean_square(p.new - p.target))
    centred = implied - implied.view(2, 3).mean(1).repeat_interleave(3)
    agreeing = Batch(**(vars(batch) | {"advantages": 2 * centred}))
    assert METHODS["crd"].loss(p, agreeing, config("crd", beta=2)).abs().max() < 1e-12
    assert METHODS["crd"].loss(p, batch, config("crd", beta=2)).min() > 0


def test_gors_weights_better_candidates_by_their_rewards(batch, predictions):
    error = mean_square(predictions.new - predictions.target)
    expected = torch.where(batch.advantages > 0, batch.rewards * error, 0.0)
    torch.testing.assert_close(METHODS["gors"].loss(predictions, batch, config("gors")), expected)


def test_hn_itm_gradient_of_the_worst_candidate_is_limited(batch, predictions):
    p = predictions
    error = mean_square(p.new - p.target)
    best, worst = error[[0, 4]], error[[1, 5]]
    expected = (best - torch.minimum(best, worst)).repeat_interleave(3)
    torch.testing.assert_close(METHODS["hn-itm"].loss(p, batch, config("hn-itm")), expected)
    far = p.new.clone()
    far[1] += 100
    far.requires_grad_()
    value = METHODS["hn-itm"].loss(Predictions(p.target, far, None, None), batch, config("hn-itm"))[0]
    (gradient,) = torch.autograd.grad(value, far)
    assert gradient[1].abs().max() == 0  # the minimum is the error of the best one, without a gradient
    assert gradient[0].abs().max() > 0


def test_dpok_gradient_is_that_of_the_log_probability_of_a_step(batch, predictions):
    """A step with noise of standard deviation s around the prediction. The mean over elements replaces the sum."""
    s, p, advantages = 0.7, predictions, batch.advantages
    steps = Batch(**(vars(batch) | {"precision": torch.full((6,), s**-2, dtype=torch.float64)}))
    new = p.old.clone().requires_grad_()
    log_probability = Normal(new, s).log_prob(p.target).flatten(1).mean(1)
    (expected,) = torch.autograd.grad(-(advantages * log_probability).sum(), new)
    loss = METHODS["dpok"].loss(Predictions(p.target, new, p.old, None), steps, config("dpok"))
    (ours,) = torch.autograd.grad(loss.sum(), new)
    torch.testing.assert_close(ours, expected)
    assert loss.tolist() == pytest.approx((-advantages).tolist())
    ratio = (Normal(p.new, s).log_prob(p.target) - Normal(p.old, s).log_prob(p.target)).flatten(1).mean(1).exp()
    far = METHODS["dpok"].loss(p, steps, config("dpok", ratio_clip=0.5))
    torch.testing.assert_close(far, -advantages * ratio.clamp(0.5, 1.5))
    assert ((ratio < 0.5) | (ratio > 1.5)).any()


# ---------------------------------------------------------------------------------------------- the module
@pytest.fixture
def denoiser(tiny_pipeline):
    return load_denoiser(str(tiny_pipeline), device="cpu")


def moved(objective: Objective) -> list[torch.Tensor]:
    """Other values of the trained parameters."""
    generator = torch.Generator().manual_seed(3)
    return [p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for p in objective.parameters_trained]


def rows(denoiser, count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, count, *denoiser.latent_shape, generator=generator)
    prompts = denoiser.encode_prompts([f"{n} red circles" for n in ("two", "three", "four", "five")[:count]])
    advantages = torch.linspace(-1, 1, count)
    group = torch.zeros(count, dtype=torch.long)
    return Batch(
        x0,
        noise,
        torch.linspace(100, 900, count).long(),
        prompts,
        torch.ones(count),
        advantages,
        (advantages + 1) / 2,
        group,
        precision=torch.ones(count),
    )


def objective_of(denoiser, adapter: str = "lora", **settings) -> Objective:
    torch.manual_seed(0)
    unet = copy.deepcopy(denoiser.network)
    model = attach_adapter(unet, rank=4, alpha=4, target_modules=("to_q", "to_v"), use_dora=adapter == "dora")
    objective = Objective(model, denoiser.schedule, config(**settings), None, denoiser.encode_prompts([""]))
    objective.old = [p.detach().clone() for p in objective.parameters_trained]
    return objective


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_reference_is_the_base_model_with_guidance(denoiser, adapter):
    objective, batch = objective_of(denoiser, adapter, method="nft", anchor_guidance=3.0), rows(denoiser)
    a = denoiser.schedule.alphas_cumprod[batch.timesteps].float().view(-1, 1, 1, 1)
    x_t = a.sqrt() * batch.x0 + (1 - a).sqrt() * batch.noise
    null = denoiser.encode_prompts([""]).expand(4)
    with torch.no_grad():
        prompt, empty = (denoiser.network(x_t, batch.timesteps, e["embeds"]).sample for e in (batch.conditioning, null))
        with weights_of(moved(objective), objective.parameters_trained):
            assert (objective.predict(batch) - prompt).abs().max() > 1e-3
            found = objective.reference(batch)
    torch.testing.assert_close(found, empty + 3 * (prompt - empty), atol=1e-5, rtol=1e-5)


def test_weights_of_restores_the_own_weights(denoiser):
    objective = objective_of(denoiser, method="nft")
    other, own = moved(objective), [p.detach().clone() for p in objective.parameters_trained]
    with weights_of(other, objective.parameters_trained):
        for p, value in zip(objective.parameters_trained, other, strict=True):
            assert torch.equal(p, value)
    for p, value in zip(objective.parameters_trained, own, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_held_rows_train_towards_the_base_model(denoiser, anchor):
    objective, batch = objective_of(denoiser, method="nft", anchor=anchor), rows(denoiser)
    batch = Batch(**(vars(batch) | {"held": torch.ones(4, dtype=torch.bool)}))
    assert objective(batch).item() == 0  # the adapter is new
    with weights_of(moved(objective), objective.parameters_trained), torch.no_grad():
        distance = mean_square(objective.predict(batch) - objective.reference(batch)).mean()
        assert objective(batch).item() == pytest.approx(distance.item(), rel=1e-5)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"supervised"}))
def test_every_method_prefers_the_better_candidates(denoiser, method):
    """The error of the better candidates decreases relative to that of the worse ones, on one batch."""
    objective, batch = objective_of(denoiser, method=method, anchor=0.0, ratio_clip=1.0), rows(denoiser)
    batch = Batch(**(vars(batch) | {"timesteps": torch.full((4,), 600)}))
    optimizer = torch.optim.Adam(objective.parameters_trained, lr=5e-3)

    @torch.no_grad()
    def lead() -> float:
        a = denoiser.schedule.alphas_cumprod[600].float()
        assert denoiser.schedule.prediction_type == "epsilon", a
        error = mean_square(objective.predict(batch) - batch.noise)
        return float(error[0] - error[-1])  # error of the worse minus error of the better candidate

    before = lead()
    for _ in range(20):
        optimizer.zero_grad()
        objective(batch).backward()
        optimizer.step()
    assert lead() > before + 1e-4


def test_supervised_computes_no_other_prediction(denoiser, monkeypatch):
    objective, calls = objective_of(denoiser, method="supervised"), []
    forward = UNet2DConditionModel.forward
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    objective(rows(denoiser))
    assert len(calls) == 1
