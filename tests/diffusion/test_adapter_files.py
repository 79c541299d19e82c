"""Adapter files of every family: what other programs read from them, and what is read of their files."""

import copy
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_families import CASES

from mi_ray.diffusion.adapter_files import COMFYUI, DIFFUSERS, WEIGHTS, convert_adapter, save_adapter
from mi_ray.diffusion.adapters import adapter_state, attach_adapter
from mi_ray.diffusion.families import FAMILIES

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# A layer in diffusers and its name in ComfyUI's map of adapters (comfy/lora.py, model_lora_keys_unet), by family.
IN_COMFYUI = {
    "StableDiffusionPipeline": (
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v",
        "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_v",
    ),
    "StableDiffusionXLPipeline": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
    ),
    "StableDiffusion3Pipeline": ("transformer_blocks.1.attn.to_k", "transformer.transformer_blocks.1.attn.to_k"),
    "FluxPipeline": (
        "single_transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.0.attn.to_q",
    ),
    "ChromaPipeline": ("transformer_blocks.0.attn.to_out.0", "transformer.transformer_blocks.0.attn.to_out.0"),
    "Flux2KleinPipeline": ("transformer_blocks.0.attn.to_v", "transformer.transformer_blocks.0.attn.to_v"),
    "QwenImagePipeline": ("transformer_blocks.1.attn.to_q", "diffusion_model.transformer_blocks.1.attn.to_q"),
    "Krea2Pipeline": ("transformer_blocks.0.attn.to_out.0", "diffusion_model.blocks.0.attn.wo"),
    "ZImagePipeline": ("noise_refiner.0.attention.to_k", "diffusion_model.noise_refiner.0.attention.to_k"),
    "PixArtSigmaPipeline": ("transformer_blocks.0.attn2.to_q", "transformer.transformer_blocks.0.attn2.to_q"),
}


@dataclass
class Saved:
    """A trained adapter of a family's tiny network, in its files."""

    folder: Path
    base: dict[str, torch.Tensor]  # the weights of the network
    expected: dict[str, torch.Tensor]  # the same with the adapter, merged by PEFT
    matrices: int  # A and B of all layers


@cache
def built(name: str) -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    return CASES[name].build()


def network_of(name: str) -> torch.nn.Module:
    return copy.deepcopy(getattr(built(name), FAMILIES[name].network))


def on_meta(name: str) -> torch.nn.Module:
    network = getattr(built(name), FAMILIES[name].network)
    with torch.device("meta"):
        return type(network).from_config(network.config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name, dora -> an adapter of alpha twice the rank, in which all weights differ from their initial values."""

    @cache
    def of(name: str, dora: bool = False) -> Saved:
        network = network_of(name)
        base = {key: value.clone() for key, value in network.state_dict().items()}
        model = attach_adapter(network, rank=2, alpha=4, target_modules=TARGETS, use_dora=dora)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path_factory.mktemp("saved")
        save_adapter(model, folder, "some/model")
        matrices = len(adapter_state(model))
        return Saved(folder, base, model.merge_and_unload().state_dict(), matrices)

    return of


def started(name: str, place: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a network that starts from the adapter at `place`."""
    convert_adapter(place, folder, name, on_meta(name))
    return PeftModel.from_pretrained(network_of(name), folder).merge_and_unload().state_dict()


def same(found: dict, adapter: Saved):
    assert found.keys() == adapter.expected.keys()
    for name, value in adapter.expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(not torch.equal(value, adapter.base[name]) for name, value in adapter.expected.items()) >= 4


# ---------------------------------------------------------------------------------------------- ComfyUI
@pytest.mark.parametrize("name", IN_COMFYUI)
def test_comfyui_adds_what_the_adapter_adds(name, saved):
    """It adds alpha / rank x up x down to the weight of the layer with this name; without an alpha it is the rank."""
    adapter, (layer, key) = saved(name), IN_COMFYUI[name]
    file, kohya = load_file(adapter.folder / COMFYUI), key.startswith("lora_unet_")
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    assert (f"{key}.alpha" in file) == kohya
    scale = file[f"{key}.alpha"].item() / 2 if kohya else 1.0
    added = scale * file[f"{key}.{up}.weight"] @ file[f"{key}.{down}.weight"]
    found = adapter.base[f"{layer}.weight"] + added
    torch.testing.assert_close(found, adapter.expected[f"{layer}.weight"], atol=1e-5, rtol=1e-5)
    assert sum(name.endswith(f".{down}.weight") for name in file) == adapter.matrices / 2


@pytest.mark.parametrize("name", sorted(CASES.keys() - IN_COMFYUI.keys()))
def test_families_that_comfyui_does_not_have_get_no_file_for_it(name, saved):
    assert FAMILIES[name].comfyui is None
    assert (saved(name).folder / WEIGHTS).exists()
    assert not (saved(name).folder / COMFYUI).exists()


@pytest.mark.parametrize("name", sorted(IN_COMFYUI.keys() - {"PixArtSigmaPipeline"}))  # it reads no adapters
def test_the_stock_pipeline_reads_the_file_for_comfyui(name, saved):
    stock, part = built(name), FAMILIES[name].network
    stock = type(stock)(**stock.components | {part: network_of(name)})
    stock.load_lora_weights(saved(name).folder, weight_name=COMFYUI)
    stock.fuse_lora(components=[part])
    stock.unload_lora_weights()
    same(getattr(stock, part).state_dict(), saved(name))


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_dora_is_written_for_comfyui_as_differences(name, saved):
    adapter, (layer, key) = saved(name, dora=True), IN_COMFYUI[name]
    file, base, expected = (load_file(adapter.folder / COMFYUI), adapter.base, adapter.expected[f"{layer}.weight"])
    torch.testing.assert_close(base[f"{layer}.weight"] + file[f"{key}.diff"].float(), expected, atol=1e-3, rtol=1e-3)
    assert all(name.endswith(".diff") for name in file)
    assert (expected - base[f"{layer}.weight"]).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("file", [".", DIFFUSERS, COMFYUI])
@pytest.mark.parametrize("name", CASES)
def test_a_run_starts_from_its_own_files(name, file, saved, tmp_path):
    """`.`: the folder, in PEFT's form."""
    place = saved(name).folder / file
    if place.exists():
        same(started(name, place, tmp_path), saved(name))


@pytest.mark.parametrize("file", [".", DIFFUSERS])
@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_a_run_starts_from_dora(name, file, saved, tmp_path):
    same(started(name, saved(name, dora=True).folder / file, tmp_path), saved(name, dora=True))
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.use_dora) == (2, 4, True)


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_starts_from_a_file_of_the_kohya_scripts(dora, tmp_path):
    """With an alpha and a rank of its own in each layer, on the names of the original UNet; DoRA over the inputs."""
    name, generator = "StableDiffusionXLPipeline", torch.Generator().manual_seed(2)
    base, file = network_of(name).state_dict(), {}
    expected = dict(base)
    for number, layer in enumerate(("attn1.to_q", "attn2.to_v", "ff.net.0.proj")):
        ours = f"down_blocks.1.attentions.0.transformer_blocks.0.{layer}.weight"
        weight, rank, alpha = base[ours], 2 + number, 1.5 * (number + 1)
        down = torch.randn(rank, weight.shape[1], generator=generator).half()
        up = torch.randn(len(weight), rank, generator=generator).half()
        key = f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_{layer.replace('.', '_')}"
        file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        moved = weight + alpha / rank * up.float() @ down.float()
        if dora:
            scale = torch.rand(len(weight), 1, generator=generator) + 0.5
            file[f"{key}.dora_scale"] = scale
            moved = scale * moved / moved.norm(dim=1, keepdim=True)
        expected[ours] = moved
    save_file(file, tmp_path / "kohya.safetensors")
    found = started(name, tmp_path / "kohya.safetensors", tmp_path / "start")
    for layer, value in expected.items():
        torch.testing.assert_close(found[layer], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: {**file, "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, "text encoder"),
        (lambda file: {"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)}, "neither LoRA nor DoRA"),
        (
            lambda file: {k.replace("blocks.0", "blocks.7"): v for k, v in file.items()},
            "layers that the model does not",
        ),
        (lambda file: {k: v[:, :3] if "lora_A" in k else v for k, v in file.items()}, "does not fit the model"),
        (lambda file: {"weight": torch.ones(2)}, "does not know|no matrices|does not have"),
        (lambda file: {**file, "transformer.proj_out.dora_scale": torch.ones(1, 4)}, "names that are not known"),
    ],
)
def test_a_file_that_is_no_adapter_of_the_model_is_refused(change, message, saved, tmp_path):
    name = "StableDiffusion3Pipeline"
    changed = change(load_file(saved(name).folder / COMFYUI))
    save_file({k: v.contiguous() for k, v in changed.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a\.safetensors' .*({message})"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "start", name, on_meta(name))


def test_dora_with_norms_over_outputs_is_refused(saved, tmp_path):
    name, key = "StableDiffusionXLPipeline", IN_COMFYUI["StableDiffusionXLPipeline"][1]
    file = load_file(saved(name).folder / COMFYUI)
    width = file[f"{key}.lora_down.weight"].shape[1]
    save_file({**file, f"{key}.dora_scale": torch.ones(1, width)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="norms over the outputs"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "start", name, on_meta(name))


@pytest.mark.parametrize("place", ["missing", "empty", "two", "lokr", "pickled"])
def test_places_without_an_adapter_are_named(place, tmp_path):
    for folder in ("empty", "two", "lokr", "pickled"):
        (tmp_path / folder).mkdir()
    for number in "12":
        save_file({"a": torch.ones(1)}, tmp_path / f"two/{number}.safetensors")
    (tmp_path / "lokr/adapter_config.json").write_text(json.dumps({"peft_type": "LOKR"}))
    (tmp_path / "pickled/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    messages = {
        "missing": "does not exist",
        "empty": r"found: none",
        "two": r"1\.safetensors, 2\.safetensors",
        "lokr": "type LOKR",
        "pickled": f"has no {re.escape(WEIGHTS)}",
    }
    with pytest.raises(ValueError, match=f"{place}' .*{messages[place]}"):
        convert_adapter(tmp_path / place, tmp_path / "start", "StableDiffusion3Pipeline", None)
