"""Guidance methods: their formulas, the stock pipelines and released codes, and that the model stays as it is."""

from types import SimpleNamespace

import diffusers
import pytest
import tiny_families
import torch

from mi_ray.config import GUIDANCE_METHODS, GuidanceConfig, SamplerConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import PipelineDenoiser, load_denoiser
from mi_ray.diffusion.families import FAMILIES
from mi_ray.diffusion.sampling import candidate_noise, sampling_steps, solver_plan
from mi_ray.guidance.contrastive import Contrastive
from mi_ray.guidance.guide import Guide, Setting
from mi_ray.guidance.methods import METHODS, family_fault, guide_maker
from mi_ray.language.negatives import chosen
from mi_ray.language.sources import negatives_by
from mi_ray.scoring.sampler import Sampler
from mi_ray.scoring.work import Work

PROMPTS = ["a red circle and a blue square", "a green star", "nothing but light"]
SEEDS = [[1, 2], [3], [4]]
SCALE, STEPS = 3.0, 4


@pytest.fixture(scope="module")
def denoiser(tiny_pipeline) -> PipelineDenoiser:
    return load_denoiser(str(tiny_pipeline), device="cpu")


def settings(method=None, **guidance) -> SamplerConfig:
    guidance = {"refine_steps": 2} | guidance
    return SamplerConfig(
        solver="ddim",
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        guidance_method=method,
        guidance_settings=guidance,
    )


def setting(denoiser, **guidance) -> Setting:
    plan = solver_plan(denoiser.schedule, "ddim", STEPS)
    return Setting(denoiser, plan, denoiser.encode_prompts([""]), SCALE, GuidanceConfig(**guidance))


def guide(method, denoiser, prompts=PROMPTS, **guidance) -> Guide:
    return guide_maker(method, setting(denoiser, **guidance))(prompts, denoiser.encode_prompts(prompts))


def latents_of(denoiser, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ all methods
def test_a_guide_that_changes_nothing_is_sampling_without_one(denoiser):
    conditioning, null = denoiser.encode_prompts(PROMPTS), denoiser.encode_prompts([""])
    plan = solver_plan(denoiser.schedule, "dpm++2m", STEPS)
    noise, _ = candidate_noise([1, 2, 3], denoiser.latent_shape)
    arguments = denoiser, plan, conditioning, null, noise, SCALE
    plain = list(sampling_steps(*arguments))[-1]
    same = Guide(Setting(denoiser, plan, null, SCALE, GuidanceConfig()), conditioning)
    guided = list(sampling_steps(*arguments, guide=same))[-1]
    assert torch.equal(guided.latents, plain.latents)
    assert torch.equal(guided.statistics, plain.statistics)


@pytest.mark.parametrize("method", GUIDANCE_METHODS)
def test_a_method_changes_images_but_not_the_model(denoiser, method):
    """Its evaluations are counted, and a candidate does not depend on its batch."""
    conditioning, rows = denoiser.encode_prompts(PROMPTS), []
    watch = denoiser.network.register_forward_pre_hook(lambda network, arguments: rows.append(len(arguments[0])))
    work = Work()
    sampled = Sampler(denoiser, settings(method), 8)(conditioning, SEEDS, work, prompts=PROMPTS)
    watch.remove()
    assert work.denoiser_evaluations == sum(rows)
    single = Sampler(denoiser, settings(method), 1)(conditioning, SEEDS, Work(), prompts=PROMPTS)
    torch.testing.assert_close(single.latents, sampled.latents, rtol=1e-3, atol=1e-3)
    plain = Sampler(denoiser, settings(), 8)(conditioning, SEEDS, Work())
    assert not torch.allclose(sampled.latents[:2], plain.latents[:2], atol=1e-3)  # the first prompt has two phrases
    hooks = [module for module in denoiser.network.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks
    if METHODS[method].guide.raw:  # the scores' statistics are those of the raw predictions
        x_t, null = candidate_noise([1, 2, 3, 4], denoiser.latent_shape)[0], denoiser.encode_prompts([""])
        own = conditioning.rows(torch.tensor([0, 0, 1, 2]))
        if method == "attend-and-excite":
            moving = guide(method, denoiser, refine_steps=2).rows(torch.tensor([0, 0, 1, 2]))
            x_t = moving.moved(0, x_t)
        level = solver_plan(denoiser.schedule, "ddim", STEPS).timesteps[0].expand(4)
        delta = denoiser.predict(x_t, level, own) - denoiser.predict(x_t, level, null.expand(4))
        torch.testing.assert_close(sampled.delta_sq[:, 0], delta.square().sum((1, 2, 3)), rtol=1e-3, atol=1e-4)
    else:
        assert sampled.delta_sq.isnan().all()
        assert sampled.cross.isnan().all()


def test_steps_outside_the_guidance_interval_are_not_changed(denoiser):
    conditioning, work = denoiser.encode_prompts(PROMPTS), Work()
    nowhere = settings("contrastive").model_copy(update={"guidance_interval": (90.0, 99.0)})
    sampled = Sampler(denoiser, nowhere, 8)(conditioning, SEEDS, work, prompts=PROMPTS)
    plain = Sampler(denoiser, settings().model_copy(update={"guidance_scale": 1.0}), 8)
    assert torch.equal(sampled.latents, plain(conditioning, SEEDS, Work()).latents)
    assert work.denoiser_evaluations == STEPS * 4


def test_a_method_needs_the_texts_of_the_prompts(denoiser):
    with pytest.raises(ValueError, match="give their texts"):
        Sampler(denoiser, settings("structured"), 8)(denoiser.encode_prompts(PROMPTS), SEEDS, Work())


def test_methods_with_attention_refuse_other_families():
    sd, flow = (FAMILIES[f"StableDiffusion{version}Pipeline"] for version in ("", "3"))
    assert [m for m in GUIDANCE_METHODS if family_fault(m, sd)] == []
    refused = [m for m in GUIDANCE_METHODS if family_fault(m, flow)]
    assert refused == ["attend-and-excite", "structured", "semantic", "perturbed-attention"]
    names = "Stable Diffusion 1 and 2, Stable Diffusion XL, PixArt-Sigma"
    assert f"is implemented only for {names}, not for Stable Diffusion 3" in family_fault(refused[-1], flow)


# ------------------------------------------------------------------------------------------ CFG-Zero*
@pytest.mark.parametrize("flow", [True, False])
def test_cfg_zero_star_is_the_guider_of_diffusers(denoiser, flow):
    """Its first step is zero for a flow only; else it has the optimised scale."""
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8, generator=generator)
    ours = guide("cfg-zero-star", denoiser)
    if flow:
        place = SimpleNamespace(schedule=SimpleNamespace(prediction_type="flow_prediction"), device=denoiser.device)
        place = Setting(place, ours.setting.plan, ours.setting.null, SCALE, GuidanceConfig())
        ours = type(ours)(place, ours.conditioning)
    theirs = diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=int(flow))
    for step in range(2):
        theirs.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(1))
        guided = unconditional + SCALE * (conditional - unconditional)
        found = ours.combined(step, guided, conditional, unconditional)
        torch.testing.assert_close(found, theirs.forward(conditional, unconditional).pred)
        assert (found == 0).all() == (flow and step == 0)


# ------------------------------------------------------------------------------------------ PAG
def pag_latents(name: str, kind: type, layers: str, tmp_path, **call) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents of diffusers' own pipeline, and ours."""
    case = tiny_families.CASES[name]
    pipeline = case.build()
    pipeline.save_pretrained(tmp_path / name)
    denoiser = load_denoiser(str(tmp_path / name), "float32", "cpu")
    noise = latents_of(denoiser, 2)
    stock = kind(
        **{**pipeline.components, "scheduler": tiny_families.ddim(), **call.pop("construct", {})},
        pag_applied_layers=layers,
    )
    stock.set_progress_bar_config(disable=True)
    prompts = list(case.prompts)
    settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "pag_scale": 2.0, "output_type": "latent"}
    with torch.no_grad():
        theirs = stock(prompts, latents=noise.clone(), **settings, **call)[0]
    plan = solver_plan(denoiser.schedule, "ddim", STEPS)
    conditioning, null = denoiser.encode_prompts(prompts), denoiser.encode_prompts([""])
    parts = () if layers == "mid" else (layers,)  # mid is our default for a UNet
    place = Setting(denoiser, plan, null, SCALE, GuidanceConfig(perturbed_scale=2.0, perturbed_layers=parts))
    ours = guide_maker("perturbed-attention", place)(prompts, conditioning)
    states = list(sampling_steps(denoiser, plan, conditioning, null, noise, SCALE, guide=ours))
    return theirs, states[-1].latents


def test_pag_is_the_pipeline_of_diffusers(tmp_path):
    kind, construct = diffusers.StableDiffusionPAGPipeline, {"requires_safety_checker": False}
    theirs, ours = pag_latents("StableDiffusionPipeline", kind, "mid", tmp_path, construct=construct)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pag_of_pixart_is_the_pipeline_of_diffusers(tmp_path):
    call = {"use_resolution_binning": False, "clean_caption": False, "height": 64, "width": 64}
    theirs, ours = pag_latents("PixArtSigmaPipeline", diffusers.PixArtSigmaPAGPipeline, "blocks.0", tmp_path, **call)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_unknown_layers_are_refused(denoiser):
    with pytest.raises(ValueError, match="perturbed_layers has 'nowhere'"):
        guide("perturbed-attention", denoiser, perturbed_layers=["nowhere"]).predictions(0, latents_of(denoiser, 3))


# ------------------------------------------------------------------------------------------ contrastive
def test_contrastive_guidance_moves_away_from_the_mean_of_the_negatives(denoiser):
    x_t, scale = latents_of(denoiser, 3), 0.7
    ours = guide("contrastive", denoiser, contrastive_scale=scale, max_negatives=3)
    conditional, unconditional = ours.predictions(1, x_t)
    guided = unconditional + SCALE * (conditional - unconditional)
    found = ours.combined(1, guided, conditional, unconditional)
    level = ours.setting.plan.timesteps[1:2]
    counts = []
    for row, prompt in enumerate(PROMPTS):
        negatives = [n.prompt for n in chosen(negatives_by("auto")(prompt), 3)]
        counts.append(len(negatives))
        away = 0.0
        for text in negatives:
            other = denoiser.predict(x_t[row : row + 1], level, denoiser.encode_prompts([text]))[0]
            away = away + (conditional[row] - other) / len(negatives)
        torch.testing.assert_close(found[row], guided[row] + scale * away, rtol=1e-4, atol=1e-5)
    assert counts[2] == 0
    assert min(counts[:2]) > 0
    assert ours.evaluations == sum(counts)


def test_contrastive_guidance_follows_the_gradient_of_the_contrastive_score():
    """One Gaussian per prompt with unit variance: the score of a noisy image is known. With negatives that are equally
    likely, the direction is the gradient of log p(x|y) - log mean_j p(x|y_j)."""
    means = torch.tensor([[2.0, 0.0], [0.0, 1.5], [0.0, -1.5]])  # the prompt, then two negatives
    alpha, sigma = 0.6, 0.8

    def log_density(x, mean):
        return -((x - alpha * mean) ** 2).sum(-1) / (2 * (alpha**2 + sigma**2))

    def epsilon(x, mean):  # -sigma times the score
        return sigma * (x - alpha * mean) / (alpha**2 + sigma**2)

    x = torch.tensor([0.3, 0.0], requires_grad=True)  # at the same distance from both negatives
    contrast = log_density(x, means[0]) - torch.stack([log_density(x, m) for m in means[1:]]).logsumexp(0)
    (gradient,) = torch.autograd.grad(contrast, x)
    away = epsilon(x, means[0]) - (epsilon(x, means[1]) + epsilon(x, means[2])) / 2
    torch.testing.assert_close(-away / sigma, gradient)

    class Model:
        device, latent_shape = torch.device("cpu"), (2,)

        def predict(self, x_t, timesteps, conditioning):
            return epsilon(x_t, conditioning["mean"])

    plan = type("plan", (), {"timesteps": torch.tensor([1])})
    place = Setting(Model(), plan, Conditioning({"mean": torch.zeros(1, 2)}), SCALE, GuidanceConfig())
    rows = Conditioning({"mean": means})
    ours = Contrastive(place, rows.rows(slice(0, 1)), rows, [torch.tensor([1, 2])])
    conditional, unconditional = ours.predictions(0, x.detach()[None])
    torch.testing.assert_close(ours.combined(0, torch.zeros(1, 2), conditional, unconditional)[0], away.detach())
