"""The sampling steps that DPOK trains on, from the actor's table to the rows of the loss."""

import pytest
import torch
from online_run import INNER, FakeBoard, batch_of, generator_of, run_config, some_policy, stored_prompts

from mi_ray import storage
from mi_ray.config import FinetuneConfig, RunConfig, SamplerConfig
from mi_ray.diffusion.adapters import attach_adapter, load_adapter_state
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.sampling import CandidateNoise
from mi_ray.diffusion.schedules import NoiseSchedule, epsilon_from_x0, prediction_from
from mi_ray.inputs.online_plan import plan_of
from mi_ray.training.losses import Objective, Predictions
from mi_ray.training.online import OnlineSource
from mi_ray.training.transitions import Transitions

ONLINE = {
    "lag": 0,
    "decay": (0, 0, 0),
    "stored_steps": 2,
    "held_share": 0.0,
    "noise_levels": 1,
    "validation_prompts": 0,
}
BY_PMI = {"score": {"names": ["pmi"], "num_samples": 2}, "select": {"by": "pmi"}}  # defined without guidance, too


@pytest.mark.parametrize(("solver", "scale"), [("ddpm", 3.0), ("ddpm", 1.0), ("dpm++2m-sde", 3.0)])
def test_error_of_the_sampling_policy_is_the_noise_of_its_steps(tiny_pipeline, tmp_path, solver, scale):
    """precision * sum of (prediction - target)^2 = ||z||^2 with the noise z of the candidate's own generator, with
    guidance at some of the steps."""
    config = run_config(tiny_pipeline, tmp_path, finetune={"method": "dpok"}, online=ONLINE)
    sampler = {"solver": solver, "num_inference_steps": 6, "guidance_scale": scale, "guidance_interval": (-20.0, -1.0)}
    config = RunConfig.model_validate(config.model_dump() | {"sampler": sampler} | BY_PMI)
    source, board, policy = stored_prompts(tmp_path), FakeBoard(), some_policy(config, 1)
    plan, generator = plan_of(config, source), generator_of(config, source, tmp_path, board)
    board.publish(1, policy)
    for index in plan.of_update(1):
        generator(batch_of(plan.row(index)))
    tables = [storage.read_table(str(tmp_path / "candidates" / plan.name(index))) for index in plan.of_update(1)]
    rows = [row for table in tables for row in table.to_pylist() if row["advantage"] is not None]
    assert {len(row["transition_steps"]) for row in rows} == {2}

    tuning, denoiser = config.finetune, load_denoiser(config.model.path)
    model = attach_adapter(denoiser.network, rank=tuning.rank, alpha=tuning.alpha, target_modules=tuning.target_modules)
    null = denoiser.encode_prompts([""]) if scale > 1 else None
    objective = Objective(model, denoiser.schedule, tuning, null=null)
    load_adapter_state(model, policy)
    objective.old = [p.detach().clone() for p in objective.parameters_trained]
    learned = OnlineSource(config, plan, str(tmp_path), board, denoiser, objective, range(10, 900))
    assert learned.open(INNER)
    steps, seen = learned.transitions.plan, set()
    assert steps.noisy(None).tolist() == list(range(5))
    for inner in range(12):
        batch = learned._draw(learned.groups, inner)
        with torch.no_grad():
            error = (objective.guided(batch, 1) - target_of(objective, batch)).square().flatten(1).sum(1)
        found = batch.precision * error
        guidance = [1.0] * len(rows) if batch.guidance is None else batch.guidance.tolist()
        for row, timestep, w, value in zip(rows, batch.timesteps, guidance, found.tolist(), strict=True):
            number = steps.timesteps.tolist().index(int(timestep))
            assert number in row["transition_steps"]
            noise = CandidateNoise([row["seed"]], denoiser.latent_shape)
            z = [noise.draw() for _ in range(number + 2)][-1]  # the first one is the initial latents
            assert value == pytest.approx(z.square().sum().item(), rel=1e-2)
            assert w == (scale if steps.guided((-20.0, -1.0))[number] else 1)
            seen.add(number)
    assert len(seen) == 2
    loss = objective(batch)  # the ratio is 1 before the first step
    assert loss.item() == pytest.approx(-batch.advantages.mean().item(), abs=1e-3)
    loss.backward()
    assert sum(p.grad.norm() for p in objective.parameters_trained) > 0


CLIP = FinetuneConfig().ratio_clip
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def clean_of(x_t, alpha):
    """The x0 that the sampling policy predicts: that of standard normal data, and a part that is not linear."""
    return alpha * x_t + 0.1 * torch.sin(3 * x_t)


def ratios(transitions: Transitions, step: int, stored: torch.Tensor, kind: str) -> torch.Tensor:
    """DPOK's likelihood ratios of stored steps under a policy whose log-ratios have the standard deviation CLIP."""
    rows = transitions.rows(torch.tensor([step]), stored, 0.0)
    alpha, sigma = (values[rows.timestep] for values in transitions.table)
    x_t = alpha * rows.x0 + sigma * rows.noise
    target = prediction_from(kind, rows.x0, rows.noise, alpha, sigma)
    clean = clean_of(x_t, alpha)
    old = prediction_from(kind, clean, epsilon_from_x0(clean, x_t, alpha, sigma), alpha, sigma)
    change = torch.cos(2 * x_t.roll(1, -1)) + torch.sin(x_t.roll(1, -2))
    change = CLIP * (x_t[0].numel() / rows.precision) ** 0.5 * change / change.square().mean().sqrt()
    p = Predictions(target, old + change, old, None)
    return (rows.precision / 2 * (p.error(p.old) - p.error(p.new))).double().exp()


@pytest.mark.parametrize(
    ("solver", "count", "kind"),
    [("ddpm", 50, "epsilon"), ("ddpm", 20, "v_prediction"), ("ddpm", 500, "epsilon"), ("dpm++2m-sde", 20, "epsilon")],
)
def test_half_precision_of_the_stored_steps_hardly_moves_the_ratio(solver, count, kind):
    """By less than 2 % of ratio_clip at all steps, for ratios within about ratio_clip of 1: others are clipped. Latents
    have the size and scale of Stable Diffusion's."""
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"prediction_type": kind})
    transitions = Transitions(schedule, SamplerConfig(solver=solver, num_inference_steps=count, guidance_scale=1.0))
    plan, generator, moved, spread = transitions.plan, torch.Generator().manual_seed(0), [], []
    steps = plan.noisy(None)
    for step in steps[torch.linspace(0, len(steps) - 1, min(len(steps), 20)).long()].tolist():
        keep, of_x0, of_previous, added, alpha, sigma = plan.coefficients[step].tolist()
        x0, noise, z = torch.randn(3, 4, 4, 64, 64, generator=generator)
        x_t = alpha * x0 + sigma * noise
        found = clean_of(x_t, alpha)
        following = keep * x_t + (of_x0 + of_previous) * found + added * z
        stored = torch.stack([x_t, plan.target(step, x_t, found, following)], 1)[:, None]  # (4, 1, 2, 4, 64, 64)
        exact, rounded = (ratios(transitions, step, values, kind) for values in (stored, stored.half().float()))
        moved.append((rounded - exact).abs().max().item())
        spread.append((exact - 1).square().mean().sqrt().item())
    assert 0.3 * CLIP < sum(spread) / len(spread) < 3 * CLIP
    assert max(moved) < 0.02 * CLIP


def target_of(objective: Objective, batch) -> torch.Tensor:
    """The noise that a model of epsilon would predict for the rows."""
    assert objective.prediction_type == "epsilon"
    return batch.noise


def test_dpok_refuses_settings_without_a_likelihood_ratio(tiny_pipeline, tmp_path):
    config = run_config(tiny_pipeline, tmp_path).model_dump()
    config["finetune"] |= {"method": "dpok", "anchor_guidance": 4}
    config["sampler"] |= {"solver": "dpm++2m"}
    with pytest.raises(ValueError, match=r"sampler\.solver is dpm") as refused:
        RunConfig.model_validate(config)
    for field in ("online.lag is 1", "online.decay is", "finetune.anchor_guidance is 4"):
        assert field in str(refused.value)
