"""Pre-training of the embedded denoisers without Ray: the flow loss against the stock pipeline, resuming, saving."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.folders import resolve_model
from mi_ray.diffusion.sampling import sampling_steps, solver_plan
from mi_ray.shapes import flow
from mi_ray.shapes.model import MAX_TOKENS, build_tokenizer
from mi_ray.training import pretrain_denoiser
from mi_ray.training.pretrain import save_pipeline
from mi_ray.training.pretrain_denoiser import DenoiserTraining, FlowObjective, PretrainConfig

CAPTIONS = ["a red circle", "a blue star above a green square", "two red squares"]
MOST_BYTES = 16 * 2**20  # of the flow model, so that it can be part of the package


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """Also on a CPU with AMX, for comparisons."""
    monkeypatch.setattr(pretrain_denoiser, "fast_bfloat16", lambda: False)


def settings(**changes) -> PretrainConfig:
    return PretrainConfig(**{"architecture": "flow", "batch_size": 4, "steps": 4, "learning_rate": 1e-3, **changes})


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    ids = build_tokenizer()(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(len(ids), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"ids": ids.short(), "latents": latents.half()}


def perturb(modules: torch.nn.Module):
    """Change all weights, because some are zero at the start."""
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


# ---------------------------------------------------------------------------------------------- the flow loss
@torch.no_grad()
def test_a_repeated_text_token_gives_the_result_of_as_many_equal_tokens():
    torch.manual_seed(0)
    transformer = flow.build_transformer().eval()
    perturb(transformer)
    x, pooled, timesteps = torch.randn(2, 16, 8, 8), torch.randn(2, 160), torch.tensor([300.0, 900.0])
    text = torch.randn(2, MAX_TOKENS, 160)

    def output(zeros: int) -> torch.Tensor:
        return transformer(x, torch.cat([text, torch.zeros(2, zeros, 160)], dim=1), pooled, timesteps).sample

    one, all_of_them = output(1), output(flow.T5_TOKENS)
    transformer.set_attn_processor(flow.RepeatedTokenAttention(flow.T5_TOKENS))
    torch.testing.assert_close(output(1), all_of_them, rtol=1e-4, atol=1e-5)
    assert (one - all_of_them).abs().max() > 1e-3  # the number of tokens matters


@torch.no_grad()
def test_flow_loss_is_the_squared_error_of_the_velocity_that_the_stock_pipeline_predicts(data):
    training = DenoiserTraining(settings(prompt_dropout=0.0), data)
    perturb(training.objective)
    ids, noised, timesteps, target = training.draw(0)
    s = (timesteps / 1000).view(-1, 1, 1, 1)
    x0, noise = noised - s * target, noised + (1 - s) * target
    rows = torch.cdist(x0.flatten(1), data["latents"].float().flatten(1)).argmin(1)
    torch.testing.assert_close(x0, data["latents"][rows].float(), rtol=1e-3, atol=1e-3)
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert ids.equal(data["ids"][rows].long())

    stock = training.objective.pipeline(copy.deepcopy(training.objective.parts), AutoencoderKL())
    transformer = flow.build_transformer()
    transformer.load_state_dict(training.objective.parts["transformer"].state_dict())
    embeds, _, pooled, _ = stock.encode_prompt([CAPTIONS[row] for row in rows], None, None, device="cpu")
    assert embeds.shape == (4, MAX_TOKENS + flow.T5_TOKENS, 160)
    velocity = transformer(noised, embeds, pooled, timesteps).sample
    expected = (velocity - (noise - x0)).square().mean()
    torch.testing.assert_close(training.loss(ids, noised, timesteps, target), expected, rtol=1e-4, atol=1e-5)


def test_times_of_a_flow_are_logit_normal():
    objective = FlowObjective(settings(logit_mean=0.5, logit_std=0.6))
    latents, generator = torch.zeros(20_000, 1, 1, 1), torch.Generator().manual_seed(0)
    _, timesteps, _ = objective.noised(latents, latents, generator)
    logit = torch.logit(timesteps.double() / 1000)
    assert logit.mean() == pytest.approx(0.5, abs=0.02)
    assert logit.std() == pytest.approx(0.6, abs=0.02)
    quantiles = torch.distributions.Normal(0.5, 0.6).cdf(logit)  # uniform
    assert (quantiles.sort().values - torch.linspace(0, 1, len(quantiles))).abs().max() < 0.015


def test_prompts_are_dropped_at_the_given_rate(data):
    training = DenoiserTraining(settings(prompt_dropout=0.25, batch_size=2000), data)
    ids, *_ = training.draw(0)
    assert (ids == training.null_ids).all(1).float().mean() == pytest.approx(0.25, abs=0.04)


# ---------------------------------------------------------------------------------------------- steps and folders
@pytest.mark.parametrize("architecture", ["unet", "flow"])
def test_training_resumes_bit_for_bit(architecture, data):
    config = settings(architecture=architecture)

    def after(training: DenoiserTraining, steps: range) -> dict:
        for step in steps:
            training.step(step)
        return {name: part.state_dict() for name, part in training.parts.items()}

    whole = after(DenoiserTraining(config, data), range(4))
    stored = io.BytesIO()
    torch.save(after(DenoiserTraining(config, data), range(2)), stored)
    stored.seek(0)
    resumed = DenoiserTraining(config, data)
    for name, state in torch.load(stored, weights_only=True).items():
        resumed.parts[name].load_state_dict(state)
    continued = after(resumed, range(2, 4))
    for name in ("modules", "average"):
        assert all(value.equal(continued[name][key]) for key, value in whole[name].items())
    first = DenoiserTraining(config, data).parts["modules"].state_dict()
    assert sum(not value.equal(first[key]) for key, value in whole["modules"].items()) > 0.9 * len(first)


def test_loss_of_the_flow_model_falls(data):
    training = DenoiserTraining(settings(steps=15, learning_rate=5e-3), data)
    losses = torch.stack([training.step(step)[0] for step in range(15)])
    assert losses[-3:].mean() < 0.9 * losses[:3].mean()


def test_saved_flow_model_is_loaded_by_the_denoiser_and_the_stock_pipeline(data, tmp_path):
    training = DenoiserTraining(settings(ema_decay=0.5), data)
    perturb(training.parts["average"].module)
    training.step(0)
    shapes = AutoencoderKL.from_pretrained(resolve_model("shapes"), subfolder="vae")
    shapes.save_pretrained(tmp_path / "vae")
    save_pipeline(training, tmp_path)
    folder = tmp_path / "model"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < MOST_BYTES

    stock = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    denoiser = load_denoiser(str(folder), device="cpu")
    for name, module in training.parts["average"].module.items():
        saved = getattr(stock, name).state_dict()
        assert all(
            torch.allclose(value, saved[key], rtol=1e-3, atol=1e-6) for key, value in module.state_dict().items()
        )
    latents = torch.randn(2, *denoiser.latent_shape)
    call = {"guidance_scale": 3.0, "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    expected = stock(prompt=CAPTIONS[:2], latents=latents, **call).images
    plan = solver_plan(denoiser.schedule, "ddim", 2)
    conditioning, null = denoiser.encode_prompts(CAPTIONS[:2]), denoiser.encode_prompts([""])
    *_, last = sampling_steps(denoiser, plan, conditioning, null, latents, 3.0)
    torch.testing.assert_close(last.latents, expected, rtol=1e-4, atol=1e-4)
    assert denoiser.decode(last.latents).shape == (2, 64, 64, 3)


def test_flow_model_starts_with_the_text_encoder_of_the_embedded_model(data):
    shapes = load_denoiser("shapes", device="cpu").pipeline
    parts = DenoiserTraining(settings(), data, shapes).objective.parts
    ids = data["ids"].long()
    own = shapes.text_encoder(ids).last_hidden_state
    assert parts["text_encoder"](ids).last_hidden_state.equal(own)
    flow_pipeline = SimpleNamespace(**dict(parts.items()))
    perturb(parts)
    for name, part in DenoiserTraining(settings(seed=1), data, flow_pipeline).objective.parts.items():
        assert all(value.equal(parts[name].state_dict()[key]) for key, value in part.state_dict().items())
