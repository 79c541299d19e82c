"""Quantised weights of a frozen network under an adapter: bitsandbytes nf4 and int8, torchao int8 and fp8.

Fine-tuning alone uses them (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). Generation and scores use the weights as
they are, because a quantised prediction is only approximate.
"""

import importlib.metadata
from dataclasses import dataclass

import torch
from diffusers import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import BitsAndBytesConfig, TorchAoConfig
from torch import nn

EXTRA = "pip install 'mi-ray[quantize]'"


@dataclass(frozen=True)
class _Package:
    name: str
    least: str  # version that diffusers needs


_BITSANDBYTES, _TORCHAO = _Package("bitsandbytes", "0.43.3"), _Package("torchao", "0.15.0")
_PACKAGES = {
    "bitsandbytes-nf4": _BITSANDBYTES,
    "bitsandbytes-int8": _BITSANDBYTES,
    "torchao-int8": _TORCHAO,
    "torchao-fp8": _TORCHAO,
}


def check_quantisation(name: str | None):
    """Check that the package of a quantisation is installed. None: no quantisation.

    Raises:
        ValueError: it is not installed, or too old.
    """
    if name is None:
        return
    package = _PACKAGES[name]
    try:
        found = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"{name} needs the package {package.name}, which is not installed; install it: {EXTRA}"
        ) from None
    if _numbers(found) < _numbers(package.least):
        raise ValueError(
            f"{name} needs {package.name} {package.least} or newer, and {found} is installed; update it: {EXTRA}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def quantisation_of(name: str, part: str, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """The quantisation configuration of a pipeline, for one of its parts.

    Args:
        name: as in `model.quantize`.
        part: the network, "unet" or "transformer".
        dtype: of computations with the weights.

    Raises:
        ValueError: as `check_quantisation`.
    """
    check_quantisation(name)
    if name == "bitsandbytes-nf4":
        of_part = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,  # QLoRA, section 3
        )
    elif name == "bitsandbytes-int8":
        of_part = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig  # an optional package

        of_part = TorchAoConfig(Int8WeightOnlyConfig() if name == "torchao-int8" else Float8WeightOnlyConfig())
    return PipelineQuantizationConfig(quant_mapping={part: of_part})


def is_placed(network: nn.Module) -> bool:
    """Whether the loader has put a network on its device: bitsandbytes quantises on the GPU, and cannot be moved."""
    return getattr(network, "quantization_method", None) == "bitsandbytes"
