import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mi_ray.config import pinned, without_revision
from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.folders import (
    check_model,
    load_schedule,
    load_sizes,
    load_tokenizer,
    model_commit,
    part_config,
    resolve_model,
)
from mi_ray.stages.pipeline import Plan, open_run


@pytest.fixture(scope="module")
def denoiser(tiny_pipeline):
    return load_denoiser(str(tiny_pipeline), device="cpu")


@pytest.fixture
def copy(tiny_pipeline, tmp_path):
    """A copy of the tiny model that a test can damage."""
    return shutil.copytree(tiny_pipeline, tmp_path / "model")


def _inputs(denoiser, n: int = 3):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(n, *denoiser.latent_shape, generator=generator)
    return x_t, torch.tensor([10, 400, 900])[:n], denoiser.encode_prompts(["a red circle", "a blue star", ""][:n])


# ---------------------------------------------------------------------------------------------- what it computes
def test_shapes_and_tokens(denoiser):
    assert denoiser.latent_shape == (4, 8, 8)
    assert denoiser.max_tokens == 24
    assert denoiser.encode_prompts(["a red circle"] * 70)["embeds"].shape == (70, 24, 16)
    assert len(denoiser.token_ids("a red circle")) == 5  # with the start and end tokens
    assert len(denoiser.token_ids("a red circle " * 20)) == 62
    assert not any(p.requires_grad for p in denoiser.network.parameters())


def test_encode_prompts_equals_diffusers(denoiser, tiny_pipeline):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    prompts = ["a red circle", "a blue star " * 20]
    theirs, null = pipeline.encode_prompt(prompts, "cpu", 1, True)
    torch.testing.assert_close(denoiser.encode_prompts(prompts)["embeds"], theirs)
    torch.testing.assert_close(denoiser.encode_prompts([""])["embeds"], null[:1])


def test_v_prediction_is_converted_to_epsilon(tiny_v_pipeline):
    denoiser = load_denoiser(str(tiny_v_pipeline), device="cpu")
    x_t, timesteps, conditioning = _inputs(denoiser)
    v = denoiser.network(x_t, timesteps, conditioning["embeds"]).sample
    abar = denoiser.schedule.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
    expected = abar.sqrt() * v + (1 - abar).sqrt() * x_t
    torch.testing.assert_close(denoiser.predict_epsilon(x_t, timesteps, conditioning), expected)
    between = denoiser.predict_epsilon(x_t, timesteps + 0.5, conditioning)
    assert not torch.equal(between, expected)
    torch.testing.assert_close(between, expected, rtol=0.05, atol=0.05)


def test_half_precision_denoiser_returns_fp32(denoiser, tiny_pipeline):
    half = load_denoiser(str(tiny_pipeline), dtype="bfloat16", device="cpu")
    assert half.network.dtype == half.dtype == torch.bfloat16
    assert half.pipeline.text_encoder.dtype == half.vae.dtype == torch.float32  # on a CPU
    inputs = _inputs(denoiser)
    predicted = half.predict_epsilon(*inputs)
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted, denoiser.predict_epsilon(*inputs), rtol=0.1, atol=0.1)


def test_decode_equals_diffusers(denoiser, tiny_pipeline):
    vae = StableDiffusionPipeline.from_pretrained(tiny_pipeline).vae
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (35, 64, 64, 3), dtype=np.uint8)  # more than one chunk
    latents = denoiser.encode_images(images)
    processor = VaeImageProcessor()
    with torch.no_grad():
        expected = (
            vae.encode(processor.preprocess(images / 255.0).float()).latent_dist.mode() * vae.config.scaling_factor
        )
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    theirs = np.stack([np.array(image) for image in processor.postprocess(decoded)])
    ours = denoiser.decode(latents)
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # values at half a grey level may be rounded up or down


# ---------------------------------------------------------------------------------------------- adapters
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_adapter_equals_the_unmerged_adapter(tiny_pipeline, tmp_path, denoiser, use_dora):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        use_dora=use_dora,
        init_lora_weights=False,
    )
    get_peft_model(unet, config).save_pretrained(tmp_path)
    fresh = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    unmerged = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()

    tuned = load_denoiser(str(tiny_pipeline), device="cpu", adapter=tmp_path)
    x_t, timesteps, conditioning = _inputs(tuned)
    with torch.no_grad():
        expected = unmerged(x_t, timesteps, conditioning["embeds"]).sample
    predicted = tuned.predict_epsilon(x_t, timesteps, conditioning)
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)
    assert (predicted - denoiser.predict_epsilon(x_t, timesteps, conditioning)).abs().max() > 1e-2
    assert isinstance(tuned.network, UNet2DConditionModel)
    assert not any("lora" in name for name, _ in tuned.network.named_modules())


def test_second_denoiser_shares_all_but_the_network(tiny_pipeline, denoiser):
    second = load_denoiser(str(tiny_pipeline), device="cpu", beside=denoiser)
    assert second.network is not denoiser.network
    assert (second.pipeline, second.tokenizer, second.vae) == (denoiser.pipeline, denoiser.tokenizer, denoiser.vae)
    assert torch.equal(second.predict(*_inputs(second)), denoiser.predict(*_inputs(denoiser)))


def test_folder_without_an_adapter_is_refused(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_denoiser(str(tiny_pipeline), device="cpu", adapter=tmp_path)


# ---------------------------------------------------------------------------------------------- checks
def test_check_model_accepts_a_valid_model(tiny_pipeline, tiny_v_pipeline):
    check_model(str(tiny_pipeline))
    check_model(str(tiny_v_pipeline))
    assert load_tokenizer(str(tiny_pipeline))("a red circle").input_ids


def test_names_of_models(tmp_path):
    assert resolve_model("shapes").endswith("mi_ray/shapes/weights")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("stabilityai/stable-diffusion-2-1-base") == "stabilityai/stable-diffusion-2-1-base"
    check_model("stabilityai/stable-diffusion-2-1-base")  # only the form of a hub id is checked
    for bad in ("shape", "a/b/c", "./nowhere", "", "../x", "s3://bucket/model"):
        with pytest.raises(ValueError, match="hub id"):
            resolve_model(bad)


def test_folder_without_index(tmp_path):
    with pytest.raises(ValueError, match=r"model_index\.json") as error:
        check_model(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("unet", "unet/config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors", "text_encoder/model.safetensors"),
        ("tokenizer", "tokenizer/tokenizer_config.json"),
        ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
        ("scheduler", "scheduler/scheduler_config.json"),
    ],
)
def test_check_model_names_a_missing_part(copy, missing, named):
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=named):
        check_model(str(copy))
    with pytest.raises(ValueError, match=named):
        load_denoiser(str(copy))


def test_check_model_lists_all_missing_parts(copy):
    shutil.rmtree(copy / "vae")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (copy / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="vae") as error:
        check_model(str(copy))
    lines = str(error.value).split("\n")
    assert len(lines) == 3
    assert all(str(copy) in line for line in lines)


def _change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_families_are_refused(copy):
    _change(copy / "model_index.json", _class_name="KandinskyPipeline")
    with pytest.raises(ValueError, match=r"KandinskyPipeline.*Stable Diffusion 1 and 2.*StableDiffusion3Pipeline"):
        check_model(str(copy))


def test_other_parts_are_refused(copy):
    _change(copy / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(ValueError, match=r"vae.*AutoencoderTiny"):
        check_model(str(copy))


def test_other_schedules_are_refused(copy):
    _change(copy / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction", thresholding=True)
    with pytest.raises(ValueError, match=r"scheduler_config\.json.*flow_prediction") as error:
        check_model(str(copy))
    assert "thresholding" in str(error.value)


def test_inpainting_is_refused(copy):
    _change(copy / "unet" / "config.json", in_channels=9)
    with pytest.raises(ValueError, match="9"):
        check_model(str(copy))


def test_autoencoder_batches_are_halved_if_memory_runs_out(tiny_pipeline):
    whole, small = load_denoiser(str(tiny_pipeline)), load_denoiser(str(tiny_pipeline))
    latents = torch.randn(11, *whole.latent_shape, generator=torch.Generator().manual_seed(0))

    def limited(module, arguments):
        if len(arguments[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    small.vae.decoder.register_forward_pre_hook(limited)
    small.vae.encoder.register_forward_pre_hook(limited)
    images = whole.decode(latents)
    assert np.abs(small.decode(latents).astype(int) - images).max() <= 1
    torch.testing.assert_close(small.encode_images(images), whole.encode_images(images), rtol=1e-3, atol=1e-3)
    small.vae.decoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        small.decode(latents)


def test_model_without_a_schedule_gives_one_message(tiny_pipeline, tmp_path):
    copy = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    (copy / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"scheduler_config\.json that is not JSON"):
        load_schedule(str(copy))
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no scheduler/scheduler_config\.json"):
        load_schedule(str(copy))


@pytest.fixture
def hub(tiny_pipeline, tiny_v_pipeline, tmp_path, monkeypatch):
    """A hub cache with two commits of me/tiny: the first predicts epsilon, the second (main) v."""
    model = tmp_path / "models--me--tiny"
    for commit, source in (("1" * 40, tiny_pipeline), ("2" * 40, tiny_v_pipeline)):
        shutil.copytree(source, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("2" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return model


def test_hub_model_is_pinned_to_its_commit(hub):
    first, second = "1" * 40, "2" * 40
    assert model_commit("me/tiny") == second
    assert model_commit(f"me/tiny@{first}") == first
    assert model_commit("shapes") is None
    for path, kind in (("me/tiny", "v_prediction"), (f"me/tiny@{first}", "epsilon")):
        assert load_schedule(path).prediction_type == kind
        assert load_denoiser(path).schedule.prediction_type == kind
        assert part_config(path, "unet")["in_channels"] == 4
        assert load_sizes(path).own == (64, 64)
    assert pinned("me/tiny", first) == pinned(f"me/tiny@{second}", first) == f"me/tiny@{first}"
    assert without_revision(f"me/tiny@{first}") == "me/tiny"
    assert without_revision("a@b/c/d") == "a@b/c/d"


def test_run_continues_with_the_commit_of_its_start(hub, tmp_path):
    def plan(path: str = "me/tiny") -> Plan:
        smoke = ["--config", "jobs/configs/shapes-smoke.yaml", "--run-dir", str(tmp_path / "run")]
        return Plan(load_config([*smoke, "--model.path", path])[0])

    begun = plan()
    assert begun.config.model.path == "me/tiny@" + "2" * 40
    open_run(begun)
    (hub / "refs" / "main").write_text("1" * 40)
    assert plan().config.model.path == "me/tiny@" + "2" * 40
    assert plan("me/tiny@" + "2" * 40).config.hash() == begun.config.hash()
    with pytest.raises(ConfigError, match=f"started with commit {'2' * 40} of the model, but now it is {'1' * 40}"):
        plan("me/tiny@main")


def test_unsupported_hub_model_is_reported_before_the_start(hub, tmp_path):
    index = hub / "snapshots" / ("2" * 40) / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "KandinskyPipeline"))
    smoke = ["--config", "jobs/configs/shapes-smoke.yaml", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=r"model\.path: .*is a KandinskyPipeline, which is not supported"):
        Plan(load_config([*smoke, "--model.path", "me/tiny"])[0])


def test_unreachable_hub_gives_one_message(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for load in (load_denoiser, load_tokenizer, load_schedule):
        with pytest.raises(ValueError, match="nobody/nothing") as error:
            load("nobody/nothing")
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- weights
PART_FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def _rename(folder, part, change):
    """Write a part's weights again with other keys; None leaves a weight out."""
    file = folder / part / f"{PART_FILES[part]}.safetensors"
    weights = {change(key): value for key, value in load_file(file).items() if change(key)}
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(("part", "layer"), [("text_encoder", "q_proj."), ("unet", "to_q."), ("vae", "conv_in.")])
def test_weights_saved_with_an_adapter_attached_are_refused(copy, part, layer):
    _rename(copy, part, lambda key: key.replace(layer, f"{layer}base_layer."))
    with pytest.raises(ValueError, match=rf"base_layer.* in its {part}; it was saved with an adapter attached"):
        check_model(str(copy))
    with pytest.raises(ValueError, match="base_layer"):
        load_denoiser(str(copy))


@pytest.mark.parametrize("part", PART_FILES)
def test_missing_unexpected_and_misshapen_weights_are_named(copy, part):
    first = sorted(load_file(copy / part / f"{PART_FILES[part]}.safetensors"))[0]
    _rename(copy, part, lambda key: None if key == first else key)
    with pytest.raises(ValueError, match=rf"lacks 1 weights \({first.removeprefix('text_model.')}\) in its {part}"):
        check_model(str(copy))
    _change(copy / part / "config.json", **({"hidden_size": 64} if part == "text_encoder" else {"layers_per_block": 3}))
    with pytest.raises(ValueError, match=rf"(?s)in its {part}.*config\.json"):
        check_model(str(copy))


def test_the_loaders_reports_are_errors(copy, monkeypatch):
    """Where the check of the headers would miss it."""
    _rename(copy, "text_encoder", lambda key: key.replace("k_proj", "kproj"))
    monkeypatch.setattr("mi_ray.diffusion.denoisers.fetch_model", Path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights .*k_proj.* in its text_encoder"):
        load_denoiser(str(copy))


def test_names_of_earlier_versions_are_known(copy):
    earlier = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(key):
        for now, before in earlier.items():
            key = key.replace(now, before)
        return key

    if any("attentions" in key for key in load_file(copy / "vae" / "diffusion_pytorch_model.safetensors")):
        _rename(copy, "vae", rename)
    _rename(copy, "text_encoder", lambda key: f"text_model.{key.removeprefix('text_model.')}")
    check_model(str(copy))
    load_denoiser(str(copy))


def test_parts_of_different_models_are_refused(copy):
    _change(copy / "unet" / "config.json", cross_attention_dim=96)
    with pytest.raises(ValueError, match=r"cross_attention_dim 96: they are parts of different models"):
        check_model(str(copy))


def test_a_configuration_that_describes_no_model_is_refused(copy):
    _change(copy / "unet" / "config.json", block_out_channels=None)
    with pytest.raises(ValueError, match=r"unet/config\.json that describes no model"):
        check_model(str(copy))


def test_a_quantized_part_is_refused(copy):
    _change(copy / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="has a quantized unet, which is not supported"):
        check_model(str(copy))


def test_the_tokenizer_reads_no_more_than_the_text_encoder(copy):
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    longest = json.loads((copy / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    assert load_tokenizer(str(copy)).model_max_length == longest


def test_zero_snr_is_refused_without_advice_that_changes_the_model(copy):
    _change(copy / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="trained to zero SNR") as error:
        check_model(str(copy))
    assert "false" not in str(error.value)
    _change(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    check_model(str(copy))
