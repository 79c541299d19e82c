import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.kernels import guided_step
from mi_ray.diffusion.sampling import candidate_noise, sample, sampling_steps, solver_plan
from mi_ray.diffusion.schedules import NoiseSchedule

SCHEDULERS = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 4, 4, 4)


def _scheduler(solver: str, **settings):
    unused = {"ddpm": ("set_alpha_to_one",), "ddim": ()}.get(solver, ("set_alpha_to_one", "clip_sample"))
    settings = {"clip_sample": False, **SCALED_LINEAR, **settings}
    scheduler, options = SCHEDULERS[solver]
    return scheduler(**options, **{key: value for key, value in settings.items() if key not in unused})


def _prediction(x_t: torch.Tensor, t: int) -> torch.Tensor:
    """A smooth function in place of the network, for both implementations."""
    return torch.sin(1.3 * x_t + t / 300) + 0.2 * x_t.roll(1, 0)


def _theirs(scheduler, steps: int, latents: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """The latents after each step of diffusers."""
    scheduler.set_timesteps(steps)
    generator = {} if isinstance(scheduler, DDIMScheduler) else {"generator": torch.Generator().manual_seed(seed)}
    states, x_t = [], latents
    for t in scheduler.timesteps:
        x_t = scheduler.step(_prediction(x_t, t), t, x_t, **generator).prev_sample
        states.append(x_t)
    return states


def _ours(schedule, plan, latents: torch.Tensor, seed: int) -> list[torch.Tensor]:
    states, x_t, x0 = [], latents, None
    unused, generator = torch.empty(2, len(latents), 1), torch.Generator().manual_seed(seed)
    table = plan.table(schedule.prediction_type).float()
    for i, t in enumerate(plan.timesteps):
        prediction = _prediction(x_t, t)
        noise = torch.randn(latents.shape, generator=generator)
        x_t, x0 = guided_step(prediction, prediction, x_t, x0, noise, table[i : i + 1], 3.0, unused)
        states.append(x_t)
    return states


def _assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]):
    """Equal up to fp32 rounding; diffusers' own tables are rounded too."""
    ours, theirs = torch.stack(ours), torch.stack(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_each_step_from_zero_snr_equals_diffusers(solver):
    settings = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = _scheduler(solver, **settings)
    schedule = NoiseSchedule.from_config(scheduler.config)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    plan = solver_plan(schedule, solver, 10)
    assert plan.coefficients[0, 4] == 0  # the first step has no signal
    _assert_same(_ours(schedule, plan, latents, 1), _theirs(scheduler, 10, latents, 1))


def test_every_solver_is_finite_at_zero_snr():
    config = SCALED_LINEAR | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_config(config)
    for solver in SCHEDULERS:
        assert solver_plan(schedule, solver, 10, "trailing").table("v_prediction").isfinite().all()


@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_each_step_equals_diffusers(solver, spacing, prediction_type):
    generator = torch.Generator().manual_seed(0)
    for steps in (4, 5, 7, 10, 14, 15, 16, 30, 50, 77, 100):
        for offset, to_one in ((0, True), (0, False), (1, True), (1, False)):
            settings = {
                "timestep_spacing": spacing,
                "steps_offset": offset,
                "prediction_type": prediction_type,
                "set_alpha_to_one": to_one,
            }
            scheduler = _scheduler(solver, **settings)
            schedule = NoiseSchedule.from_config({**SCALED_LINEAR, **settings})
            plan = solver_plan(schedule, solver, steps)
            latents = torch.randn(SHAPE, generator=generator)
            theirs = _theirs(scheduler, steps, latents, steps)
            assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
            _assert_same(_ours(schedule, plan, latents, steps), theirs)


@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_other_beta_schedules_equal_diffusers(solver, beta_schedule):
    settings = {"beta_schedule": beta_schedule, "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "leading"}
    schedule = NoiseSchedule.from_config(settings)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    theirs = _theirs(_scheduler(solver, **settings), 20, latents, 1)
    _assert_same(_ours(schedule, solver_plan(schedule, solver, 20), latents, 1), theirs)


@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_equal_diffusers_for_every_count(solver, spacing):
    schedule = NoiseSchedule.from_config(SCALED_LINEAR)
    scheduler = _scheduler(solver, timestep_spacing=spacing)
    for steps in range(1, 200):
        scheduler.set_timesteps(steps)
        # for some counts (61, 103, ...) diffusers' trailing spacing adds a step at t = -1 by rounding
        theirs = [t for t in scheduler.timesteps.tolist() if t >= 0]
        assert solver_plan(schedule, solver, steps, spacing).timesteps.tolist() == theirs


def test_stochastic_solvers_add_noise_except_at_the_last_step():
    schedule = NoiseSchedule.from_config(SCALED_LINEAR)
    plans = {solver: solver_plan(schedule, solver, 10) for solver in SCHEDULERS}
    assert [solver for solver, plan in plans.items() if plan.stochastic] == ["ddpm", "dpm++2m-sde"]
    for solver in ("ddpm", "dpm++2m-sde"):
        assert (plans[solver].coefficients[:, 3] != 0).tolist() == [True] * 9 + [False]


@pytest.mark.parametrize(
    ("solver", "steps", "spacing", "named"),
    [
        ("euler", 10, None, "euler"),
        ("ddim", 10, "karras", "karras"),
        ("ddim", 0, None, "0"),
        ("ddim", 1001, None, "1001"),
        ("dpm++2m", 1000, None, "1000"),
        ("ddpm", 1000, "leading", "steps_offset"),
    ],
)
def test_solver_plan_refuses_invalid_arguments(solver, steps, spacing, named):
    schedule = NoiseSchedule.from_config({**SCALED_LINEAR, "steps_offset": 1})
    with pytest.raises(ValueError, match=named):
        solver_plan(schedule, solver, steps, spacing)


# ---------------------------------------------------------------------------------------------- with a model
PROMPTS = ["a red circle", "a blue star and a green square", ""]
SEEDS = [3, 1, 2]


@pytest.fixture(scope="module", params=["tiny_pipeline", "tiny_v_pipeline"])
def folder(request):
    return str(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def denoiser(folder):
    return load_denoiser(folder, device="cpu")


def _sample(denoiser, solver: str, prompts: list[str], seeds: list[int], steps: int = 8):
    latents, step_noise = candidate_noise(seeds, denoiser.latent_shape)
    conditioning, null = denoiser.encode_prompts(prompts), denoiser.encode_prompts([""])
    plan = solver_plan(denoiser.schedule, solver, steps)
    return sample(denoiser, plan, conditioning, null, latents, 4.0, step_noise)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_sampling_equals_the_diffusers_pipeline(folder, denoiser, solver):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scheduler, options = SCHEDULERS[solver]
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    theirs = pipeline(
        PROMPTS,
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    ours = _sample(denoiser, solver, PROMPTS, SEEDS).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_sampling_at_another_size_equals_the_diffusers_pipeline(folder):
    height, width = 96, 48
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 8, "guidance_scale": 4.0, "height": height, "width": width}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(PROMPTS, generator=generators, output_type="latent", **settings).images
    denoiser = load_denoiser(folder, device="cpu", size=(height, width))
    assert denoiser.image_size == (height, width)
    ours = _sample(denoiser, "ddim", PROMPTS, SEEDS).latents
    assert ours.shape[1:] == denoiser.latent_shape == (4, 12, 6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    images = denoiser.decode(ours)
    assert images.shape == (3, height, width, 3)
    assert denoiser.encode_images(images).shape == ours.shape


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_candidate_does_not_depend_on_its_batch(denoiser, solver):
    together = _sample(denoiser, solver, PROMPTS, SEEDS)
    for i in range(len(SEEDS)):
        alone = _sample(denoiser, solver, PROMPTS[i : i + 1], SEEDS[i : i + 1])
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.delta_sq[0], together.delta_sq[i], rtol=1e-4, atol=1e-6)


def test_noise_of_a_candidate_depends_only_on_its_seed():
    latents, step_noise = candidate_noise([5, 6, 7], (4, 8, 8))
    alone, alone_step = candidate_noise([6], (4, 8, 8))
    assert torch.equal(latents[1], alone[0])
    for step in range(3):
        noise = step_noise(step)
        assert torch.equal(noise[1], alone_step(step)[0])
        assert not torch.equal(noise[0], noise[1])


def test_statistics_equal_those_of_the_branches(denoiser):
    conditioning, null = denoiser.encode_prompts(PROMPTS), denoiser.encode_prompts([""])
    plan = solver_plan(denoiser.schedule, "ddim", 6)
    latents, _ = candidate_noise(SEEDS, denoiser.latent_shape)
    x_t = latents
    for state in sampling_steps(denoiser, plan, conditioning, null, latents, 4.0):
        t = plan.timesteps[state.step].expand(3)
        conditional = denoiser.predict_epsilon(x_t, t, conditioning).double()
        delta = conditional - denoiser.predict_epsilon(x_t, t, null.expand(3)).double()
        of_step = state.delta_sq[:, state.step].double(), state.cross[:, state.step].double()
        torch.testing.assert_close(of_step[0], delta.square().flatten(1).sum(1), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(of_step[1], (conditional * delta).flatten(1).sum(1), rtol=1e-3, atol=1e-4)
        x_t = state.latents
    assert (state.delta_sq[:2] > 0).all()
    assert np.allclose(state.delta_sq[2], 0, atol=1e-6)  # the prompt is empty


def test_ddpm_without_noise_is_refused(denoiser):
    conditioning = denoiser.encode_prompts([""])
    plan = solver_plan(denoiser.schedule, "ddpm", 4)
    with pytest.raises(ValueError, match="step_noise"):
        sample(denoiser, plan, conditioning, conditioning, torch.zeros(1, *denoiser.latent_shape), 4.0)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_sampling_never_waits_for_the_device(folder, solver):
    elsewhere = load_denoiser(folder, device="meta")  # tensors without values: reading one raises an error
    trajectory = _sample(elsewhere, solver, PROMPTS, SEEDS)
    assert trajectory.latents.shape == (3, *elsewhere.latent_shape)
    assert trajectory.latents.is_meta
    with pytest.raises(RuntimeError):
        trajectory.delta_sq[0, 0].item()
