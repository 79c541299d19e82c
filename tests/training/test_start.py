"""A run that starts from a user's adapter, and the export of its result."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file
from test_loop import run_config, trained

from mi_ray.config.section import ConfigError
from mi_ray.diffusion.adapter_files import COMFYUI, WEIGHTS, save_adapter
from mi_ray.diffusion.folders import check_model
from mi_ray.scoring.policy import PolicySampler
from mi_ray.stages.evaluate import Evaluator
from mi_ray.training.export import check_out, export
from mi_ray.training.loop import check_targets
from mi_ray.training.start import local_start, start_adapter


@pytest.fixture
def mine(tiny_pipeline, tmp_path) -> Path:
    """A file of ComfyUI: a LoRA of another rank than the configuration's."""
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    save_adapter(trained(unet, "lora", rank=3, alpha=6), tmp_path / "mine", "some/model")
    return tmp_path / "mine" / COMFYUI


@pytest.fixture
def merged(tiny_pipeline, mine) -> dict[str, torch.Tensor]:
    """The weights of the UNet with this adapter."""
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    return PeftModel.from_pretrained(unet, mine.parent).merge_and_unload().state_dict()


def starting(tiny_pipeline, tmp_path, mine, **finetune):
    config = run_config(tiny_pipeline, workers=1, start_from=str(mine), **finetune)
    return config.model_copy(update={"run_dir": str(tmp_path / "run")})


def same(found: dict, expected: dict):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_the_adapter_is_kept_in_the_run_folder(tiny_pipeline, tmp_path, mine, merged):
    config = starting(tiny_pipeline, tmp_path, mine)
    check_targets(config)
    assert not (tmp_path / "run").exists()
    folder = start_adapter(config)
    mine.unlink()
    assert start_adapter(config) == folder
    check_targets(config)  # a run that continues does not need the user's file
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    same(PeftModel.from_pretrained(unet, local_start(config)).merge_and_unload().state_dict(), merged)
    assert start_adapter(run_config(tiny_pipeline, workers=1)) is None


def test_the_model_with_the_adapter_is_the_base_model(tiny_pipeline, tmp_path, mine, merged):
    """Of the evaluation, and of the rewards of an online run, whose first policy it is."""
    config = starting(tiny_pipeline, tmp_path, mine)
    start_adapter(config)
    evaluator = Evaluator(config.model_dump(mode="json"), "base", str(tmp_path / "images"), None)
    same(evaluator.base.network.state_dict(), merged)
    policy = PolicySampler(config, local_start(config))
    same(policy.base.network.state_dict(), merged)
    drawn = policy.drawing.network.state_dict()
    same({name.replace(".base_layer", ""): value for name, value in drawn.items() if "lora_" not in name}, merged)


@pytest.mark.parametrize(
    ("change", "finetune", "message"),
    [
        ("remove", {}, r"finetune\.start_from: .*does not exist"),
        ("other model", {}, r"finetune\.start_from: .*layers that the model does not have"),
        ("dora", {"baseline": 0.5}, r"finetune\.start_from: .*is a DoRA.*finetune\.baseline"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_before_the_start(
    tiny_pipeline, tmp_path, mine, change, finetune, message
):
    if change == "remove":
        mine.unlink()
    elif change == "dora":
        unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
        save_adapter(trained(unet, "dora"), mine.parent, "some/model")
        mine = mine.parent
    else:
        unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
        config = dict(unet.config) | {"down_block_types": ("CrossAttnDownBlock2D",) * 2}
        save_adapter(trained(UNet2DConditionModel.from_config(config), "lora"), mine.parent, "some/model")
    with pytest.raises(ConfigError, match=message):
        check_targets(starting(tiny_pipeline, tmp_path, mine, **finetune))


def test_a_file_that_changes_before_the_start_is_checked_again(tiny_pipeline, tmp_path, mine):
    config = starting(tiny_pipeline, tmp_path, mine)
    check_targets(config)
    mine.write_bytes(b"no adapter")
    for begin in (check_targets, start_adapter):
        with pytest.raises(ConfigError, match=r"finetune\.start_from: "):
            begin(config)
    assert not (tmp_path / "run").exists()


def test_a_dora_is_refused_where_the_whole_weights_are_not_there(tiny_pipeline, tmp_path, mine):
    """One message for each setting, before the start and when a run continues with another finetune.shard."""
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    save_adapter(trained(unet, "dora"), tmp_path / "dora", "some/model")
    whole = starting(tiny_pipeline, tmp_path, tmp_path / "dora")
    check_targets(whole)
    sharded = starting(tiny_pipeline, tmp_path, tmp_path / "dora", shard="fsdp")
    both = sharded.model_copy(update={"model": sharded.model.model_copy(update={"quantize": "torchao-int8"})})
    of_shard = r"finetune\.start_from: .*is a DoRA.*finetune\.shard is fsdp: set finetune\.shard to none, or start from"
    of_quantize = r"finetune\.start_from: .*is a DoRA.*model\.quantize is torchao-int8: set model\.quantize to none, or"
    with pytest.raises(ConfigError, match=rf"{of_quantize}.*\n{of_shard}") as error:
        check_targets(both)
    assert len(str(error.value).split("\n")) == 2
    start_adapter(whole)
    with pytest.raises(ConfigError, match=of_shard):
        check_targets(sharded)
    with_lora = both.model_copy(update={"finetune": both.finetune.model_copy(update={"start_from": str(mine)})})
    check_targets(with_lora.model_copy(update={"run_dir": str(tmp_path / "other")}))


# ---------------------------------------------------------------------------------------------- export
def test_an_exported_folder_is_the_stock_pipeline_with_the_adapter(tiny_pipeline, tmp_path, mine, merged):
    half = tmp_path / "half"
    shutil.copytree(tiny_pipeline, half)
    UNet2DConditionModel.from_pretrained(half, subfolder="unet").half().save_pretrained(half / "unet")
    for model, dtype in ((tiny_pipeline, torch.float32), (half, torch.float16)):
        out = tmp_path / f"out-{dtype}"
        check_out(out)
        export(Path(model), mine.parent, out, {"README.md": b"card", "figures/a.svg": b"figure"})
        pipe = StableDiffusionPipeline.from_pretrained(out)
        if dtype == torch.float32:
            same(pipe.unet.state_dict(), merged)
        stored = load_file(out / "unet/diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in stored.values()} == {dtype}
        before = StableDiffusionPipeline.from_pretrained(model)
        same(pipe.vae.state_dict(), before.vae.state_dict())
        assert (out / "README.md").read_text() == "card"
        assert (out / "figures/a.svg").exists()
        assert load_file(out / "adapter" / WEIGHTS).keys() == load_file(mine.parent / WEIGHTS).keys()
        with pytest.raises(ValueError, match="not empty"):
            check_out(out)


def test_an_export_of_fp16_files_loads_without_the_variant(tiny_pipeline, tmp_path, mine):
    """Also of parts in several files."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="4KB")
    names = [path.name for path in (tmp_path / "half").rglob("*.safetensors*")]
    assert names
    assert all("fp16" in name for name in names)
    with pytest.raises((OSError, ValueError)):
        StableDiffusionPipeline.from_pretrained(tmp_path / "half")
    export(tmp_path / "half", mine.parent, tmp_path / "out", {})
    assert not [path for path in (tmp_path / "out").rglob("*") if "fp16" in path.name]
    assert len(list((tmp_path / "out" / "vae").glob("*.safetensors"))) > 1
    check_model(str(tmp_path / "out"))
    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float16)
    for part in ("vae", "text_encoder"):
        same(getattr(exported, part).state_dict(), getattr(pipe, part).state_dict())
    with_adapter = PeftModel.from_pretrained(pipe.unet.float(), mine.parent, torch_device="cpu").merge_and_unload()
    same(exported.unet.state_dict(), with_adapter.half().state_dict())
