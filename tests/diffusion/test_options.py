"""Options that make sampling and training cheaper: their effect, and that results do not change otherwise."""

import pytest
import torch
from pydantic import ValidationError

from mi_ray.config import FinetuneConfig, RunConfig
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.sampling import candidate_noise, sample, sampling_steps, solver_plan
from mi_ray.training.losses import Batch, Objective

PROMPTS = ["a red circle", "a blue star and a green square", "two hearts"]
INTERVAL = (-3.0, 1.0)


@pytest.fixture
def denoiser(tiny_pipeline):
    return load_denoiser(str(tiny_pipeline), device="cpu")


def _watched(denoiser) -> list[int]:
    """Records the batch sizes of the UNet's calls."""
    sizes = []
    denoiser.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


def _arguments(denoiser, solver="ddim", steps=8):
    latents, step_noise = candidate_noise([3, 1, 2], denoiser.latent_shape)
    plan = solver_plan(denoiser.schedule, solver, steps)
    return denoiser, plan, denoiser.encode_prompts(PROMPTS), denoiser.encode_prompts([""]), latents, 4.0, step_noise


# ---------------------------------------------------------------------------------------------- guidance interval
def test_guidance_interval_evaluates_one_branch_outside(denoiser):
    arguments = _arguments(denoiser)
    plan, conditioning, null, latents = arguments[1:5]
    log_snr = denoiser.schedule.log_snr[plan.timesteps]
    guided = ((log_snr >= INTERVAL[0]) & (log_snr <= INTERVAL[1])).tolist()
    assert plan.guided(INTERVAL) == guided
    assert 0 < sum(guided) < len(guided)
    assert plan.guided(None) == [True] * 8

    x_t = latents
    for i, t in enumerate(plan.timesteps):  # from the formulas, with guidance 1 outside the interval
        epsilon = denoiser.predict_epsilon(x_t, t.expand(3), conditioning)
        if guided[i]:
            without = denoiser.predict_epsilon(x_t, t.expand(3), null.expand(3))
            epsilon = without + 4.0 * (epsilon - without)
        keep, clean, _, _, alpha, sigma = plan.coefficients[i].float()
        x_t = keep * x_t + clean * (x_t - sigma * epsilon) / alpha
    sizes = _watched(denoiser)
    ours = sample(*arguments, guidance_interval=INTERVAL)
    torch.testing.assert_close(ours.latents, x_t, rtol=1e-4, atol=1e-4)
    assert sizes == [6 if both else 3 for both in guided]
    assert ours.delta_sq.isnan().tolist() == ours.cross.isnan().tolist() == [[not both for both in guided]] * 3


def _run_config(**sections) -> RunConfig:
    required = {
        "run_dir": "unused",
        "prompts": {"file": "unused"},
        "score": {"names": ["pmi"]},
        "select": {"by": "pmi"},
    }
    return RunConfig.model_validate(required | sections)


def test_guidance_interval_is_refused_with_scores_of_both_branches():
    interval = {"guidance_interval": INTERVAL}
    _run_config(sampler=interval)
    banded = {"names": ["trajectory_banded"], "log_snr_min": -3.0, "log_snr_max": -1.0}
    _run_config(sampler=interval, score=banded, select={"by": "trajectory_banded"})
    with pytest.raises(ValidationError, match="mitune needs both branches"):
        _run_config(sampler=interval, score={"names": ["pmi", "mitune"]})
    with pytest.raises(ValidationError, match="trajectory_banded needs both branches"):
        _run_config(sampler=interval, score=banded | {"log_snr_min": -4.0}, select={"by": "trajectory_banded"})
    with pytest.raises(ValidationError, match="asd needs both"):
        _run_config(sampler=interval, prune={"by": "asd"})
    with pytest.raises(ValidationError, match="swap them"):
        _run_config(sampler={"guidance_interval": (1.0, -3.0)})


# ---------------------------------------------------------------------------------------------- the denoiser
def test_guidance_scale_per_candidate(denoiser):
    denoiser, plan, conditioning, null, latents, _, noise = _arguments(denoiser, "dpm++2m")
    scales = torch.tensor([1.5, 3.0, 7.5])
    ours = sample(denoiser, plan, conditioning, null, latents, scales, noise)
    for i, scale in enumerate(scales.tolist()):
        alone = sample(denoiser, plan, conditioning.rows(slice(i, i + 1)), null, latents[i : i + 1], scale, noise)
        torch.testing.assert_close(ours.latents[i], alone.latents[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["ddpm", "dpm++2m", "dpm++2m-sde"])
def test_sampling_can_continue_from_a_state(denoiser, solver):
    whole = sample(*_arguments(denoiser, solver))
    denoiser, plan, conditioning, null, latents, scale, noise = _arguments(denoiser, solver)
    *_, state = sampling_steps(denoiser, plan, conditioning, null, latents, scale, noise, steps=range(3))
    rest = {"steps": range(3, 8), "previous_x0": state.x0}
    *_, last = sampling_steps(denoiser, plan, conditioning, null, state.latents, scale, noise, **rest)
    torch.testing.assert_close(last.latents, whole.latents, rtol=1e-5, atol=1e-5)
    assert state.delta_sq[:, 3:].isnan().all()
    assert last.delta_sq[:, :3].isnan().all()
    torch.testing.assert_close(last.delta_sq[:, 3:], whole.delta_sq[:, 3:], rtol=1e-4, atol=1e-6)


def test_channels_last_does_not_change_outputs(denoiser, tiny_pipeline):
    plain = sample(*_arguments(denoiser, "ddpm"))
    other = load_denoiser(str(tiny_pipeline), device="cpu")
    other.specialise(channels_last=True, compiled=None, rows=())
    ours = sample(*_arguments(other, "ddpm"))
    torch.testing.assert_close(ours.latents, plain.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.delta_sq, plain.delta_sq, rtol=1e-3, atol=1e-6)


def test_compiled_batches_are_padded(denoiser, monkeypatch):
    """Only the shapes are tested, without the compiler."""
    plain = sample(*_arguments(denoiser), guidance_interval=INTERVAL)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    denoiser.specialise(channels_last=False, compiled="default", rows=(4, 8))
    sizes = _watched(denoiser)
    ours = sample(*_arguments(denoiser), guidance_interval=INTERVAL)
    assert set(sizes) == {4, 8}
    torch.testing.assert_close(ours.latents, plain.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.delta_sq, plain.delta_sq, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_options_for_gpus_are_refused_without_a_gpu():
    for option, chosen in (("kernel", "triton"), ("compile", "cuda-graphs")):
        with pytest.raises(ValidationError, match=f"model.{option} is {chosen}"):
            _run_config(model={option: chosen})
        _run_config(model={option: chosen}, resources={"gpus_per_actor": 1})


def test_speed_options_are_not_in_the_hash():
    fast = {"kernel": "eager", "channels_last": True, "compile": "default"}
    assert _run_config(model=fast, finetune={"activation_checkpointing": True}).hash() == _run_config().hash()
    assert _run_config(prune={"by": "pmi"}).hash() != _run_config().hash()


# ---------------------------------------------------------------------------------------------- fine-tuning
def test_activation_checkpointing_gives_the_same_gradients(tiny_pipeline):
    def gradients(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        denoiser = load_denoiser(str(tiny_pipeline), device="cpu")
        torch.manual_seed(0)
        model = attach_adapter(denoiser.network, rank=4, alpha=4, target_modules=("to_q", "to_v"))
        if checkpointing:
            denoiser.network.enable_gradient_checkpointing()
        calls = []
        denoiser.network.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda *_: calls.append(1))
        objective = Objective(model, denoiser.schedule, FinetuneConfig())
        x0, noise = torch.randn(2, 3, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
        timesteps = torch.tensor([10, 400, 900])
        objective(Batch(x0, noise, timesteps, denoiser.encode_prompts(PROMPTS), torch.ones(3))).backward()
        return [p.grad for p in model.parameters() if p.requires_grad], len(calls)

    (plain, once), (again, twice) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)
    assert any(gradient.abs().max() > 0 for gradient in plain)
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
