"""LoRA and DoRA on a denoiser: attach, load, save for PEFT and for diffusers."""

import difflib
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_PEFT_PREFIX = "base_model.model."  # of every module of a PeftModel


# ---------------------------------------------------------------------------------------------- the adapter
def target_faults(unet: nn.Module, target_modules: Iterable[str]) -> list[str]:
    """One message for each target that is no linear or convolution layer of `unet`, naming those most like it.

    A target names the layers whose dotted path ends with it, as in peft. One that binds to nothing is a mistake
    even where others bind: peft would train without it and say nothing.
    """
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    endings = {".".join(name.split(".")[-2 if name.rsplit(".", 1)[-1].isdigit() else -1 :]) for name in layers}
    return [
        f"{target!r} is the name of no linear or convolution layer of the model; it has, among others, "
        + ", ".join(difflib.get_close_matches(target, sorted(endings), 8, cutoff=0))
        for target in target_modules
        if not any(f".{name}".endswith(f".{target}") for name in layers)
    ]


def attach_adapter(
    unet: nn.Module, *, rank: int, alpha: float, target_modules: Iterable[str], use_dora: bool = False
) -> PeftModel:
    """Freeze `unet` and put a fresh adapter on it: LoRA (Hu et al. 2022) or DoRA (Liu et al. 2024).

    The adapter's parameters are fp32 whatever the dtype of `unet`; its first output is that of `unet` (B = 0). The
    random A is drawn from torch's global generator.

    Raises:
        ValueError: a target binds to nothing; one line for each.
    """
    target_modules = list(target_modules)
    if faults := target_faults(unet, target_modules) or ([] if target_modules else ["no target is named"]):
        raise ValueError("\n".join(faults))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=target_modules,
        use_dora=use_dora,
        init_lora_weights="gaussian",  # as MI-TUNE's released code
    )
    return get_peft_model(unet, config)


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights under PEFT's names, on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def load_adapter_state(model: PeftModel, state: dict[str, Tensor]):
    """Give the adapter of `model` the weights of `state`, as `adapter_state` names them.

    Raises:
        ValueError: `state` belongs to an adapter of another kind, rank or set of targets.
    """
    own = adapter_state(model)
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise ValueError("the adapter's weights do not fit: it was trained with another adapter, rank or targets")
    set_peft_model_state_dict(model, state)


class MergedAdapter:
    """A denoiser whose adapter is merged into its weights, so that inference pays nothing for it, and can be exchanged.

    The weights of the adapted layers are kept and restored before each merge: the result depends on the last adapter
    alone.

    Args:
        model: as `attach_adapter` leaves it.
    """

    def __init__(self, model: PeftModel):
        self.model = model
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._weights = [layer.get_base_layer().weight.detach().clone() for layer in self._layers]

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]):
        """Exchange the adapter for one with these weights, as `adapter_state` names them."""
        for layer, weight in zip(self._layers, self._weights, strict=True):
            layer.get_base_layer().weight.copy_(weight)
            layer.merged_adapters = []
        load_adapter_state(self.model, state)
        self.model.merge_adapter()


def save_adapter(model: PeftModel, folder: Path, base_model: str):
    """Write the adapter into `folder`, for PEFT and for stock diffusers.

    PEFT reads adapter_config.json and adapter_model.safetensors; `load_lora_weights` of a diffusers pipeline reads
    pytorch_lora_weights.safetensors, whose metadata holds the configuration (without it diffusers takes alpha = rank).
    """
    config = LoraConfig(**model.peft_config["default"].to_dict())
    config.base_model_name_or_path, config.inference_mode = base_model, True
    _save(config, adapter_state(model), folder)


def _save(config: LoraConfig, state: dict[str, Tensor], folder: Path):
    config.target_modules = sorted(config.target_modules)  # a set's order would change from run to run
    config.save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = convert_state_dict_to_diffusers({name.removeprefix(_PEFT_PREFIX): value for name, value in state.items()})
    metadata = {name: value for name, value in config.to_dict().items() if value is not None}
    StableDiffusionPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=metadata)


def save_weighted_sum(terms: list[tuple[float, Path]], folder: Path):
    """Write the LoRA adapter whose update is the weighted sum of others', exactly: its rank is the sum of theirs.

    Sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...] (task arithmetic: Ilharco et al., ICLR 2023).

    Args:
        terms: weight and folder of each adapter; all of the same rank, alpha and targets.
    """
    config = LoraConfig.from_pretrained(str(terms[0][1]))
    states = [(weight, load_file(source / "adapter_model.safetensors")) for weight, source in terms]
    summed = {}
    for name in states[0][1]:
        down = ".lora_A." in name
        parts = [state[name] if down else weight * state[name] for weight, state in states]
        summed[name] = torch.cat(parts, dim=0 if down else 1).contiguous()
    config.r, config.lora_alpha = config.r * len(terms), config.lora_alpha * len(terms)  # the same alpha / rank
    _save(config, summed, folder)
