"""LoRA and DoRA adapters of a denoiser: attach, load, merge."""

import difflib
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


# ---------------------------------------------------------------------------------------------- the adapter
def target_faults(network: nn.Module, target_modules: Iterable[str]) -> list[str]:
    """One error message for each target that matches no linear or convolution layer of `network`.

    A target matches the layers whose dotted path ends with it, as in PEFT. A target that matches nothing is an error
    even if other targets match: PEFT would train without it and give no warning. The message lists similar layer names.
    """
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    endings = {".".join(name.split(".")[-2 if name.rsplit(".", 1)[-1].isdigit() else -1 :]) for name in layers}
    return [
        f"{target!r} matches no linear or convolution layer of the model; use names of its layers, such as "
        + ", ".join(difflib.get_close_matches(target, sorted(endings), 8, cutoff=0))
        for target in target_modules
        if not any(f".{name}".endswith(f".{target}") for name in layers)
    ]


def attach_adapter(
    network: nn.Module, *, rank: int, alpha: float, target_modules: Iterable[str], use_dora: bool = False
) -> PeftModel:
    """Freeze `network` and attach a new adapter: LoRA (Hu et al. 2022) or DoRA (Liu et al. 2024).

    The adapter's parameters are fp32 for any dtype of `network`. The matrix A is drawn from torch's global random
    generator. B is 0, so the new adapter does not change the output of `network`.

    Raises:
        ValueError: a target matches no layer; one line for each such target.
    """
    target_modules = list(target_modules)
    if faults := target_faults(network, target_modules) or (
        [] if target_modules else ["the list of target modules is empty; name at least one"]
    ):
        raise ValueError("\n".join(faults))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=target_modules,
        use_dora=use_dora,
        init_lora_weights="gaussian",  # as in MI-TUNE's released code
    )
    return get_peft_model(network, config)


def attach_saved(network: nn.Module, folder: str | Path) -> PeftModel:
    """Freeze `network` and attach the adapter of a PEFT folder with its weights, to train it further.

    The adapter's parameters are fp32 for any dtype of `network`.
    """
    return PeftModel.from_pretrained(network, str(folder), is_trainable=True)


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU, under PEFT's names."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def load_adapter_state(model: PeftModel, state: dict[str, Tensor]):
    """Load weights into the adapter of `model`.

    Args:
        state: weights under the names that `adapter_state` gives.

    Raises:
        ValueError: `state` comes from an adapter of another kind, rank or set of targets.
    """
    own = adapter_state(model)
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise ValueError(
            "the adapter's weights do not fit the model's adapter: its kind, rank or target modules differ; use the"
            " settings that it was trained with"
        )
    set_peft_model_state_dict(model, state)


class MergedAdapter:
    """A denoiser with its adapter merged into its weights. The adapter can be replaced.

    A merged adapter costs no time at inference. The base weights of the adapted layers are stored and restored before
    each merge, so the result depends only on the last adapter.

    Args:
        model: result of `attach_adapter`.
    """

    def __init__(self, model: PeftModel):
        self.model = model
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._weights = [layer.get_base_layer().weight.detach().clone() for layer in self._layers]

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]):
        """Replace the adapter by one with these weights, under the names that `adapter_state` gives."""
        for layer, weight in zip(self._layers, self._weights, strict=True):
            layer.get_base_layer().weight.copy_(weight)
            layer.merged_adapters = []
        load_adapter_state(self.model, state)
        self.model.merge_adapter()
