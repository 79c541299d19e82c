"""Files of adapters: written for PEFT, diffusers and ComfyUI, and read in the forms of all of them."""

import json
import math
from collections import Counter
from pathlib import Path

import diffusers
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mi_ray.diffusion.adapters import adapter_state
from mi_ray.diffusion.families import FAMILIES, Family
from mi_ray.diffusion.weights import quiet_loading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
DIFFUSERS = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
COMFYUI = "comfyui.safetensors"

_PREFIX = "base_model.model."  # every module name of a PeftModel starts with it
_TEXT_ENCODERS = ("lora_te", "text_encoder", "te1.", "te2.", "conditioner.")  # beginnings of names
_OTHER_KINDS = (".hada_", ".lokr_", ".oft_", ".diff", ".lora_mid.", ".glora_", ".boft_")
_METADATA = "lora_adapter_metadata"  # in a file of diffusers: the settings of PEFT


# ---------------------------------------------------------------------------------------------- writing
def save_adapter(model: PeftModel, folder: Path, base_model: str):
    """Write the adapter into `folder`, for PEFT, for unmodified diffusers and for ComfyUI.

    - adapter_config.json and adapter_model.safetensors: PEFT.
    - pytorch_lora_weights.safetensors: `load_lora_weights` of the model's diffusers pipeline. Its metadata hold the
      settings; without them diffusers assumes alpha = rank.
    - comfyui.safetensors: ComfyUI, and A1111 for Stable Diffusion 1, 2 and XL; only for the families that ComfyUI has.
      Names of the kohya scripts for a UNet, and those of `Family.comfyui` for a transformer. alpha / rank is multiplied
      into the matrix B, so that alpha = rank. These programs compute DoRA in other ways than PEFT, so DoRA is written
      there as the exact difference of each weight, in half precision: a large file.
    """
    network = model.get_base_model()
    config = LoraConfig(**model.peft_config["default"].to_dict())
    config.base_model_name_or_path, config.inference_mode = base_model, True
    config.auto_mapping = {"base_model_class": type(network).__name__, "parent_library": type(network).__module__}
    _save(config, adapter_state(model), folder)
    if config.use_dora and (family := _family(config)):
        _save_comfyui({f"{layer}.diff": value for layer, value in _differences(model).items()}, family, folder)


def _save(config: LoraConfig, state: dict[str, Tensor], folder: Path):
    config.target_modules = sorted(config.target_modules)  # the order of a set changes from run to run
    config.save_pretrained(folder)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    layers = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    metadata = {name: value for name, value in config.to_dict().items() if value is not None}
    family = _family(config)
    if family and family.network == "transformer":  # all transformer pipelines have one format
        StableDiffusion3Pipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
    else:
        of_unet = convert_state_dict_to_diffusers(layers)
        StableDiffusionPipeline.save_lora_weights(folder, of_unet, unet_lora_adapter_metadata=metadata)
    if family and not config.use_dora:
        scaled = {name: value * _scale(config, name) if ".lora_B." in name else value for name, value in layers.items()}
        _save_comfyui(scaled, family, folder)


def _family(config: LoraConfig) -> Family | None:
    """The family of an adapter's network. Stable Diffusion XL has the same network class as 1 and 2, and its names."""
    name = (config.auto_mapping or {}).get("base_model_class")
    return next((family for family in FAMILIES.values() if name in family.parts[family.network]), None)


def _scale(config: LoraConfig, name: str) -> float:
    """The factor of B A in a layer: alpha / rank (Hu et al. 2022), of rsLoRA alpha / sqrt(rank) (arXiv 2312.03732)."""
    layer = name.partition(".lora_")[0]
    rank, alpha = (
        pattern.get(get_pattern_key(pattern.keys(), layer), default)
        for pattern, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
    )
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


@torch.no_grad()
def _differences(model: PeftModel) -> dict[str, Tensor]:
    """What a DoRA adapter adds to the weight of each layer: m (W + D) / ||W + D|| - W with D = scale B A, and the norm
    over the inputs of each output (Liu et al. 2024, eq. 5)."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = layer.get_base_layer().weight.float()
            moved = weight + layer.get_delta_weight("default").float()
            magnitude = layer.lora_magnitude_vector["default"].weight.flatten() / moved.flatten(1).norm(dim=1)
            shape = (-1, *[1] * (weight.ndim - 1))
            found[name] = (magnitude.view(shape) * moved - weight).cpu()
    return found


def _save_comfyui(layers: dict[str, Tensor], family: Family, folder: Path):
    """Write weights, named by the layer of diffusers and its part (lora_A.weight, lora_B.weight, diff)."""
    layers = {name: value.half() if name.endswith(".diff") else value for name, value in layers.items()}
    if family.network == "unet":
        lora = {f"unet.{name}": value for name, value in layers.items() if not name.endswith(".diff")}
        named = convert_state_dict_to_kohya(lora) if lora else {}
        whole = {name: value for name, value in layers.items() if name.endswith(".diff")}
        named |= {f"lora_unet_{n.removesuffix('.diff').replace('.', '_')}.diff": value for n, value in whole.items()}
    elif family.comfyui:
        parts = {name: name.partition(".lora_" if ".lora_" in name else ".diff") for name in layers}
        named = {family.comfyui(layer) + sign + part: layers[name] for name, (layer, sign, part) in parts.items()}
    else:
        return
    save_file({name: value.contiguous() for name, value in named.items()}, folder / COMFYUI, {"format": "pt"})


def save_weighted_sum(terms: list[tuple[float, Path]], folder: Path):
    """Write a LoRA adapter whose update is exactly the weighted sum of other adapters' updates.

    Sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...] (task arithmetic: Ilharco et al., ICLR 2023).
    The rank is the sum of the adapters' ranks.

    Args:
        terms: weight and folder of each adapter; all have the same rank, alpha and targets.
    """
    config = LoraConfig.from_pretrained(str(terms[0][1]))
    states = [(weight, load_file(source / WEIGHTS)) for weight, source in terms]
    summed, count = {}, len(terms)
    for name in states[0][1]:
        down = ".lora_A." in name
        parts = [state[name] if down else weight * state[name] for weight, state in states]
        summed[name] = torch.cat(parts, dim=0 if down else 1).contiguous()
    growth = math.sqrt(count) if config.use_rslora else count  # of alpha: the factor of B A stays the same
    config.r, config.lora_alpha = config.r * count, config.lora_alpha * growth
    config.rank_pattern = {layer: rank * count for layer, rank in config.rank_pattern.items()}
    config.alpha_pattern = {layer: alpha * growth for layer, alpha in config.alpha_pattern.items()}
    _save(config, summed, folder)


# ---------------------------------------------------------------------------------------------- reading
def convert_adapter(place: str | Path, folder: Path, pipeline: str, network: nn.Module):
    """Write a user's LoRA or DoRA into `folder`, in PEFT's form.

    Args:
        place: a folder with an adapter of PEFT; or a file of safetensors, or a folder with one, whose names are those
            of diffusers, of the kohya scripts or of ComfyUI.
        pipeline: class of the model's pipeline; its loader knows the names.
        network: the model's, without weights. An adapter is attached to it.

    Raises:
        ValueError: with what is wrong: there is no such adapter, or it is not one of this network alone.
    """
    place = Path(place)
    try:
        config, state = _read_peft(place) if (place / CONFIG).is_file() else _read_file(place, pipeline, network)
        config.base_model_name_or_path = None  # PEFT warns if it differs from the network's
        _check_fit(config, state, network)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{str(place)!r} {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({name: value.float().contiguous() for name, value in state.items()}, folder / WEIGHTS, {"format": "pt"})


def _read_peft(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"is an adapter of type {kind}; give a LoRA or a DoRA")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"has no {WEIGHTS}; only safetensors are read: save the adapter again with PEFT")
    return LoraConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS)


def _read_file(place: Path, pipeline: str, network: nn.Module) -> tuple[LoraConfig, dict[str, Tensor]]:
    file = _file_of(place)
    with safe_open(file, framework="pt") as opened:
        metadata = json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
    weights = load_file(file)
    _refuse_other_kinds(weights)
    scales = {name: value for name, value in weights.items() if name.endswith(".dora_scale")}
    if not metadata:
        weights = _without_alpha({name: value for name, value in weights.items() if name not in scales})
    loader = getattr(diffusers, pipeline)
    if not hasattr(loader, "lora_state_dict"):  # all transformer pipelines have one format
        loader = StableDiffusion3Pipeline
    part = "unet" if isinstance(network, UNet2DConditionModel) else "transformer"
    try:
        with quiet_loading():
            found = loader.lora_state_dict(dict(weights), **({"unet_config": network.config} if part == "unet" else {}))
    except Exception as error:  # the loaders raise anything on names that they do not know
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"has names that {pipeline} does not know ({reason}); give an adapter of this model"
        ) from error
    found = found[0] if isinstance(found, tuple) else found
    names = {name: name.removeprefix(f"{part}.").removeprefix(_PREFIX) for name in found}
    state = convert_unet_state_dict_to_peft({names[name]: value for name, value in found.items()})
    state |= _magnitudes(scales, weights, state, network)
    settings = {name.removeprefix(f"{part}."): value for name, value in metadata.items()}
    return LoraConfig(**settings) if settings else _config_of(state), {_PREFIX + n: v for n, v in state.items()}


def _file_of(place: Path) -> Path:
    if place.is_file() and place.suffix == ".safetensors":
        return place
    if not place.exists():
        raise ValueError("does not exist; give a file of safetensors, or a folder that PEFT or diffusers saved")
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    named = [file for file in files if file.name == DIFFUSERS] or files
    if len(named) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"is not one file of safetensors (found: {found}); name the file of the adapter")
    return named[0]


def _refuse_other_kinds(weights: dict[str, Tensor]):
    """
    Raises:
        ValueError: the file changes a text encoder, or is neither LoRA nor DoRA.
    """
    if of_text := [name for name in weights if name.startswith(_TEXT_ENCODERS)]:
        raise ValueError(
            f"also changes a text encoder ({len(of_text)} weights, such as {of_text[0]}), which is not trained here:"
            " merge it into the model first (load_lora_weights, fuse_lora and save_pretrained of the pipeline)"
        )
    if others := [name for name in weights if any(sign in name for sign in _OTHER_KINDS)]:
        raise ValueError(f"is neither LoRA nor DoRA ({others[0]}); merge it into the model, or give a LoRA or a DoRA")


def _without_alpha(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with alpha = rank: alpha / rank is multiplied into B."""
    found = {name: value.float() for name, value in weights.items() if not name.endswith(".alpha")}
    for name in weights.keys() - found.keys():
        layer = name.removesuffix(".alpha")
        for up in (f"{layer}.lora_up.weight", f"{layer}.lora_B.weight", f"{layer}.lora.up.weight"):
            if up in found:
                found[up] = found[up] * (weights[name].item() / found[up].shape[1])
    return found


def _magnitudes(
    scales: dict[str, Tensor], weights: dict[str, Tensor], state: dict[str, Tensor], network: nn.Module
) -> dict[str, Tensor]:
    """The magnitudes of DoRA under PEFT's names. The loader drops them, and keeps the matrices A as they are."""
    layers = {id(value): name.partition(".lora_")[0] for name, value in state.items() if ".lora_A." in name}
    found = {}
    for name, scale in scales.items():
        down = next(
            (weights.get(name.replace("dora_scale", end)) for end in ("lora_down.weight", "lora_A.weight")), None
        )
        layer = layers.get(id(down))
        if layer is None:
            raise ValueError(f"is a DoRA with names that are not known here ({name}); give it in the form of PEFT")
        outputs = network.get_submodule(layer).weight.shape[0]
        if scale.shape[0] != outputs or scale.numel() != outputs:
            raise ValueError(
                f"is a DoRA with norms over the outputs of a layer ({name} {list(scale.shape)}), and those of PEFT are"
                " over the inputs; merge it into the model, or give a LoRA"
            )
        linear = isinstance(network.get_submodule(layer), nn.Linear)
        found[f"{layer}.lora_magnitude_vector"] = scale.flatten() if linear else scale.view(1, -1, 1, 1)
    return found


def _config_of(state: dict[str, Tensor]) -> LoraConfig:
    """The settings of an adapter with alpha = rank in every layer."""
    ranks = {name.partition(".lora_")[0]: len(value) for name, value in state.items() if ".lora_A." in name}
    if not ranks:
        raise ValueError("has no matrices of a LoRA; give a LoRA or a DoRA")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{layer}": rank for layer, rank in ranks.items() if rank != usual}  # ^: the whole name
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(ranks),
        use_dora=any("lora_magnitude_vector" in name for name in state),
    )


def _check_fit(config: LoraConfig, state: dict[str, Tensor], network: nn.Module):
    """
    Raises:
        ValueError: the adapter has a layer that the network does not have, or has in another shape.
    """
    layers = dict(network.named_modules())
    names = {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in state}
    if unknown := sorted(name for name in names if name not in layers):
        raise ValueError(f"has layers that the model does not have ({', '.join(unknown[:2])}); give one of this model")
    try:
        own = get_peft_model_state_dict(get_peft_model(network, config, low_cpu_mem_usage=True))
    except ValueError as error:
        raise ValueError(f"does not fit the model ({' '.join(str(error).split())[:300]})") from error
    for name, value in state.items():
        if name not in own or own[name].shape != value.shape:
            wanted = list(own[name].shape) if name in own else "no such weight"
            raise ValueError(f"does not fit the model: {name} is {list(value.shape)}, and the model has {wanted}")
