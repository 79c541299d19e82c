"""Every family against the stock pipeline of a tiny random model: prompts, arguments, latents, images and adapters."""

import copy
import inspect
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_families import CASES, VARIANTS

from mi_ray.config import FinetuneConfig
from mi_ray.diffusion.adapter_files import save_adapter
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.families import FAMILIES
from mi_ray.diffusion.folder_checks import folder_parts, has_weights, read_index
from mi_ray.diffusion.folders import check_model, load_schedule, load_tokenizer
from mi_ray.diffusion.sampling import sampling_steps, solver_plan
from mi_ray.diffusion.schedules import FLOW, epsilon_from
from mi_ray.diffusion.weights import weight_names
from mi_ray.information.pointwise import beside, denoising_errors, pmi
from mi_ray.information.probes import draw_probes
from mi_ray.training.losses import Batch, Objective

STEPS = 3


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name -> folder of its tiny pipeline."""

    @cache
    def of(name: str) -> str:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("families") / name
        pipeline = CASES[name].build()
        with torch.no_grad():  # layers that start at zero would hide what goes into them
            for parameter in getattr(pipeline, FAMILIES[name].network).parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        pipeline.save_pretrained(folder)
        return str(folder)

    return of


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture
def case(name):
    return CASES[name]


@pytest.fixture(scope="session")
def loaded(folders):
    """name -> its denoiser and its stock pipeline. Loading takes longer than most tests, so each test gets copies."""

    @cache
    def of(name: str):
        size = (CASES[name].size, CASES[name].size)
        stock = DiffusionPipeline.from_pretrained(folders(name))
        stock.set_progress_bar_config(disable=True)
        assert type(stock).__name__ == name
        return load_denoiser(folders(name), device="cpu", size=size), stock

    return of


@pytest.fixture
def denoiser(name, loaded):
    return copy.deepcopy(loaded(name)[0])


@pytest.fixture
def stock(name, loaded):
    return copy.deepcopy(loaded(name)[1])


def noise(denoiser, count: int) -> torch.Tensor:
    return torch.randn(count, *denoiser.latent_shape, generator=torch.Generator().manual_seed(5))


def run(stock, case, latents, w: float) -> list[torch.Tensor]:
    """What the stock pipeline's scheduler gives after each step."""
    found, step = [], stock.scheduler.step

    def recorded(*arguments, **named):
        result = step(*arguments, **named)
        found.append(result[0].clone())
        return result

    stock.scheduler.step = recorded
    settings = {"height": case.size, "width": case.size, "num_inference_steps": STEPS, "output_type": "latent"}
    stock(
        prompt=list(case.prompts),
        latents=(case.given or case.packed)(latents),
        **settings,
        **case.settings,
        **case.call(w),
    )
    stock.scheduler.step = step
    return found


def ours(denoiser, case, latents, w: float, prompts=None):
    plan = solver_plan(denoiser.schedule, case.solver, STEPS)
    conditioning = denoiser.encode_prompts(list(prompts or case.prompts))
    null = denoiser.encode_prompts([""])
    interval = (np.inf, -np.inf) if w == 1 else None
    return sampling_steps(denoiser, plan, conditioning, null, latents, w, guidance_interval=interval)


# ---------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_latents_are_those_of_the_pipeline_after_every_step(denoiser, stock, case, w):
    latents = noise(denoiser, 2)
    expected = run(stock, case, latents, w)
    found = [case.packed(state.latents) for state in ours(denoiser, case, latents, w)]
    assert len(found) == len(expected) == STEPS
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert (found[-1] - case.packed(latents)).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_checkpoints_of_a_family_too(variant, tmp_path):
    case = VARIANTS[variant]
    torch.manual_seed(0)
    case.build().save_pretrained(tmp_path)
    check_model(str(tmp_path))
    denoiser = load_denoiser(str(tmp_path), device="cpu", size=(case.size, case.size))
    absent = {part: None for part in denoiser.family.optional if getattr(denoiser.pipeline, part) is None}
    stock = type(denoiser.pipeline).from_pretrained(tmp_path, **absent)
    latents = noise(denoiser, 2)
    expected = run(stock, case, latents, 3.0)
    found = [case.packed(state.latents) for state in ours(denoiser, case, latents, 3.0)]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_the_network_receives_what_the_pipeline_gives_it(denoiser, stock, name, case):
    """The same arguments of the same shapes, times and signs, without guidance."""
    calls = {"stock": [], "ours": []}

    def recorder(calls):
        def record(module, positional, named):
            bound = inspect.signature(module.forward).bind(*positional, **named).arguments
            unset = ("return_dict", "joint_attention_kwargs", "attention_kwargs")
            calls.append({key: value for key, value in bound.items() if value is not None and key not in unset})

        return record

    for side, network in (("stock", getattr(stock, FAMILIES[name].network)), ("ours", denoiser.network)):
        network.register_forward_pre_hook(recorder(calls[side]), with_kwargs=True)
    latents = noise(denoiser, 2)
    run(stock, case, latents, 1.0)
    list(ours(denoiser, case, latents, 1.0))
    assert len(calls["ours"]) == len(calls["stock"]) == STEPS
    for mine, theirs in zip(calls["ours"], calls["stock"], strict=True):
        if name == "QwenImagePipeline":  # ours is padded to a fixed length behind the mask
            mask, length = mine["encoder_hidden_states_mask"], theirs["encoder_hidden_states"].shape[1]
            assert not mask[:, length:].any()
            mine |= {"encoder_hidden_states_mask": mask[:, :length]}
            mine |= {"encoder_hidden_states": mine["encoder_hidden_states"][:, :length]}
        same(mine, theirs)


def same(mine, theirs):
    """Equal, tensor by tensor."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.expand_as(mine) if theirs.ndim == 0 else theirs  # a UNet takes one time for all rows
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, atol=1e-5, rtol=1e-5)
    elif isinstance(theirs, dict):
        assert set(mine) == set(theirs)
        for key, value in theirs.items():
            same(mine[key], value)
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            same(a, b)
    else:
        assert mine == theirs


def test_a_row_does_not_depend_on_its_batch_mates(denoiser, case):
    latents, prompts = noise(denoiser, 3), ["a red circle", "a blue star above a green square", "a cross"]
    *_, together = ours(denoiser, case, latents, 3.0, prompts)
    for row in range(3):
        *_, alone = ours(denoiser, case, latents[row : row + 1], 3.0, prompts[row : row + 1])
        torch.testing.assert_close(together.latents[row : row + 1], alone.latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.delta_sq[row : row + 1], alone.delta_sq, atol=1e-5, rtol=1e-4)


def test_the_model_is_checked_and_told_before_it_is_loaded(denoiser, name, folders):
    check_model(folders(name))
    schedule = load_schedule(folders(name), denoiser.image_size)
    for mine, theirs in zip(
        schedule.steps(STEPS, None, False), denoiser.schedule.steps(STEPS, None, False), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert load_tokenizer(folders(name)).model_max_length == denoiser.max_tokens


# ---------------------------------------------------------------------------------------------- weights
@pytest.fixture
def parts(name, folders, tmp_path) -> dict[str, Path]:
    """part -> its file of weights, in a copy of the model."""
    folder = shutil.copytree(folders(name), tmp_path / "model")
    index = read_index(folder)
    files = {part: weight_names(folder, index, part)[0] for part in folder_parts(index) if has_weights(part)}
    return {part: folder / part / file for part, file in files.items()}


def change_weights(file: Path, reshape: bool):
    """Leave out the first weight, reshape the second if asked to, and add one of another model."""
    _, (second, value), *others = sorted(load_file(file).items())
    values = {second: value.new_zeros(3, 5, 7) if reshape else value, "other.weight": torch.zeros(3), **dict(others)}
    save_file(values, file, {"format": "pt"})


def test_weights_of_every_part_are_compared_with_its_configuration(parts, tmp_path):
    for file in parts.values():
        change_weights(file, reshape=True)
    with pytest.raises(ValueError, match="weights") as error:
        check_model(str(tmp_path / "model"))
    lines = str(error.value).split("\n")
    assert len(lines) == 2 * len(parts)
    for part, line, shapes in zip(parts, lines[::2], lines[1::2], strict=True):
        assert "lacks 1 weights (" in line
        assert f"has 1 weights (other.weight) that its configuration does not have in its {part};" in line
        assert f"has 1 weights of another shape in its {part} (" in shapes
        assert "[3, 5, 7] instead of [" in shapes


def test_what_the_loader_of_any_part_reports_is_an_error(parts, tmp_path, monkeypatch):
    """Where the check of the headers would miss it."""
    monkeypatch.setattr("mi_ray.diffusion.denoisers.fetch_model", Path)
    for part, file in parts.items():
        whole = file.read_bytes()
        change_weights(file, reshape=False)
        with pytest.raises(ValueError, match=rf"lacks 1 weights .*other\.weight.* in its {part};"):
            load_denoiser(str(tmp_path / "model"), device="cpu")
        file.write_bytes(whole)


def test_the_unused_head_of_a_language_model_is_no_fault(folders, tmp_path):
    folder = shutil.copytree(folders("ZImagePipeline"), tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(300, 16)}, file, {"format": "pt"})
    check_model(str(folder))
    load_denoiser(str(folder), device="cpu", size=(64, 64))


# ---------------------------------------------------------------------------------------------- scores
def test_curves_are_those_of_the_raw_predictions(denoiser, case):
    """Of the conditional and the unconditional one, whatever the pipeline does to the guided prediction."""
    calls, predict = [], denoiser.predict
    denoiser.predict = lambda *inputs: calls.append((inputs, predict(*inputs))) or calls[-1][1]
    *_, last = ours(denoiser, case, noise(denoiser, 2), 3.0)
    flow = denoiser.schedule.prediction_type == FLOW
    for step, ((x_t, timesteps, _), prediction) in enumerate(calls):
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in denoiser.schedule.alpha_sigma(timesteps))
        kind = denoiser.schedule.prediction_type
        values = prediction if flow else epsilon_from(kind, prediction, x_t, alpha, sigma)
        conditional, unconditional = values.flatten(1).chunk(2)
        delta = conditional - unconditional
        torch.testing.assert_close(last.delta_sq[:, step], delta.square().sum(1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(last.cross[:, step], (conditional * delta).sum(1), rtol=1e-4, atol=1e-5)
    assert last.delta_sq.min() > 0


def test_the_score_of_an_image_is_the_integral_of_its_denoising_errors(denoiser, case):
    """i_s = 1/2 sum of weight (||eps - eps_hat(null)||^2 - ||eps - eps_hat(prompt)||^2), arXiv 2310.07972, eq. 7."""
    latents, prompts = noise(denoiser, 2), list(case.prompts)
    conditioning, null = denoiser.encode_prompts(prompts), denoiser.encode_prompts([""])
    probes = draw_probes([3, 4], 4, -4.0, 2.0, denoiser.latent_shape)
    arguments = denoiser.predict_epsilon, denoiser.schedule, latents, torch.arange(2)
    errors = denoising_errors(*arguments, *beside(conditioning, null), probes, 4)
    found = pmi(errors[:, 0], errors[:, 1], probes).value
    flow, kind = denoiser.schedule.prediction_type == FLOW, denoiser.schedule.prediction_type
    expected = torch.zeros(2)
    for probe, (log_snr, weight) in enumerate(zip(probes.log_snr, probes.weight, strict=True)):
        # The model's own noise level: alpha + sigma = 1 of a flow, alpha^2 + sigma^2 = 1 of a diffusion.
        ratio = (log_snr / 2).exp()
        sigma = 1 / (1 + ratio) if flow else 1 / (1 + ratio.square()).sqrt()
        alpha, drawn = ratio * sigma, torch.stack([probes.draw(row, probe) for row in range(2)])
        x_t, timestep = alpha * latents + sigma * drawn, denoiser.schedule.levels_at(log_snr[None])[0].expand(2)
        for sign, branch in ((1, null.expand(2)), (-1, conditioning)):
            prediction = denoiser.predict(x_t, timestep, branch)
            epsilon = x_t + alpha * prediction if flow else epsilon_from(kind, prediction, x_t, alpha, sigma)
            expected += sign * weight / 2 * (drawn - epsilon).square().flatten(1).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert found.abs().min() > 0


# ---------------------------------------------------------------------------------------------- images
def test_images_are_those_of_the_pipelines_autoencoder(denoiser, stock, case):
    latents = 0.3 * noise(denoiser, 2)
    scheduled = stock.scheduler.step
    settings = {"height": case.size, "width": case.size, "num_inference_steps": 2, "output_type": "np"}

    def last(*arguments, **named):
        scheduled(*arguments, **named)
        return (case.packed(latents),)

    stock.scheduler.step = last
    theirs = stock(
        prompt=list(case.prompts),
        latents=(case.given or case.packed)(latents),
        **settings,
        **case.settings,
        **case.call(1.0),
    ).images
    mine = denoiser.decode(latents)
    assert mine.shape == (2, case.size, case.size, 3)
    assert np.abs(mine - 255 * theirs).max() <= 0.51  # rounded
    assert mine.std() > 0


def test_encoded_images_are_the_inverse_of_decoded_latents(denoiser):
    """With an autoencoder that does nothing between its normalisations."""
    family, vae, latents = denoiser.family, denoiser.vae, noise(denoiser, 2)
    vae.decode = lambda values: SimpleNamespace(sample=values)
    vae.encode = lambda values: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: values))
    decoded = family.decode(vae, latents)
    assert (decoded - latents.view_as(decoded)).abs().max() > 0.01
    torch.testing.assert_close(family.encode_image(vae, decoded), latents)


def test_images_become_latents_of_the_models_shape(denoiser):
    images = np.random.default_rng(0).integers(0, 256, (2, *denoiser.image_size, 3), dtype=np.uint8)
    latents = denoiser.encode_images(images)
    assert latents.shape == (2, *denoiser.latent_shape)
    assert latents.isfinite().all()
    assert (latents[0] - latents[1]).abs().max() > 0


# ---------------------------------------------------------------------------------------------- training
def test_training_calls_the_network_as_sampling_does_and_reaches_the_adapter(denoiser, case):
    timesteps = torch.tensor([200, 700])
    x0, drawn = noise(denoiser, 4).chunk(2)
    conditioning = denoiser.encode_prompts(list(case.prompts))
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in denoiser.schedule.alpha_sigma(timesteps))
    x_t = alpha * x0 + sigma * drawn
    sampled = denoiser.predict(x_t, timesteps, conditioning)
    epsilon = denoiser.predict_epsilon(x_t, timesteps, conditioning)
    model = attach_adapter(denoiser.network, rank=2, alpha=2, target_modules=("to_q", "to_v"))
    arguments = denoiser.schedule, FinetuneConfig(), None, None, denoiser.family.predict
    objective = Objective(model, *arguments)
    batch = Batch(x0, drawn, timesteps, conditioning, torch.ones(2))
    torch.testing.assert_close(objective.predict(batch), sampled, atol=1e-5, rtol=1e-5)
    loss = objective(batch)
    # At one noise level the errors of all prediction types are proportional: that of u is the one of epsilon over alpha
    errors = (epsilon - drawn).square().flatten(1).mean(1)
    flow = denoiser.schedule.prediction_type == FLOW
    expected = (errors / alpha.flatten().square()).mean() if flow else errors.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    gradients = [p.grad for p in objective.parameters_trained if p.grad is not None]
    assert sum(g.abs().sum() for g in gradients) > 0
    assert all(g.isfinite().all() for g in gradients)


def test_half_precision_samples_and_trains(denoiser, name, case, folders):
    """In bfloat16 the network agrees with its own float32 to its precision, and its adapter gets gradients."""
    half = load_denoiser(folders(name), device="cpu", dtype="bfloat16", size=denoiser.image_size)
    timesteps, (x0, drawn) = torch.tensor([200, 700]), noise(denoiser, 4).chunk(2)
    conditioning = denoiser.encode_prompts(list(case.prompts))
    exact, rounded = (d.predict(x0, timesteps, conditioning).float() for d in (denoiser, half))
    assert (rounded - exact).norm() < 0.1 * exact.norm()
    model = attach_adapter(half.network, rank=2, alpha=2, target_modules=("to_q", "to_v"))
    objective = Objective(model, half.schedule, FinetuneConfig(), torch.bfloat16, None, half.family.predict)
    objective(Batch(x0, drawn, timesteps, conditioning, torch.ones(2))).backward()
    assert sum(p.grad.abs().sum() for p in objective.parameters_trained if p.grad is not None) > 0


# ---------------------------------------------------------------------------------------------- adapters
def test_a_trained_adapter_loads_in_the_stock_pipeline(denoiser, stock, name, case, folders, tmp_path):
    latents = noise(denoiser, 2)
    before = run(stock, case, latents, 1.0)[-1]
    torch.manual_seed(1)
    model = attach_adapter(denoiser.network, rank=2, alpha=4, target_modules=("to_q", "to_v"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    save_adapter(model, tmp_path, "some/model")
    merged = load_denoiser(folders(name), device="cpu", size=denoiser.image_size, adapter=tmp_path)
    *_, last = ours(merged, case, latents, 1.0)
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(tmp_path)
    else:  # PixArt-Sigma's pipeline has no loader
        assert name == "PixArtSigmaPipeline"
        stock.transformer = PeftModel.from_pretrained(stock.transformer, tmp_path).merge_and_unload()
    after = run(stock, case, latents, 1.0)[-1]
    torch.testing.assert_close(case.packed(last.latents), after, atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-3
