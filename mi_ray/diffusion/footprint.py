"""What a model needs: weights, activations and floating-point operations, counted on the meta device without weights.

The network is called with 2 rows. Each operation of PyTorch is seen, with the tensors that it makes and their
lifetimes. So the counts hold for eager execution. Attention counts as a fused kernel, which does not store the matrix
of attention weights. Workspaces of libraries and fragmentation are not counted.
"""

import math
import weakref
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families import Family

_MASTER = 4 * 4  # bytes of a trained parameter: fp32 value, gradient and two moments of AdamW
_ROWS = 2  # of the batch that is counted


@dataclass(frozen=True)
class Counted:
    """Counts of a network in one dtype and image size."""

    flops: float  # of one row: one denoiser evaluation
    activations: float  # peak bytes of a denoiser batch, per row


@dataclass(frozen=True)
class CountedTraining:
    """Counts of fine-tuning, as `Counted`."""

    trained: int  # parameters of the adapter
    state: int  # bytes of the adapter, its gradient and its optimiser
    activations: float  # peak bytes of forward and backward pass, per row of the batch


def stored_numbers(module: nn.Module) -> int:
    """Parameters and stored buffers; tied ones once: as many numbers as the files of the weights hold."""
    distinct = {id(tensor): tensor.numel() for tensor in module.state_dict(keep_vars=True).values()}
    return sum(distinct.values())


# ---------------------------------------------------------------------------------------------- counting
class Ledger(TorchDispatchMode):
    """Context that counts the bytes of all live tensors that operations make on a device, and their peak."""

    def __init__(self, device: str, known: list[Tensor]):
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int):
        self._known.discard(key)
        self.live -= size


class _FusedAttention(torch.autograd.Function):
    """Attention on the meta device: stores queries, keys, values and output, but no attention weights."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class FusedAttention:
    """Context in which attention uses as much memory as a fused kernel, and computes no values. `flops` counts its two
    matrix products, 2 n h Tq Tk (dk + dv). Not for several threads."""

    def __init__(self):
        self.flops = 0

    def __enter__(self) -> "FusedAttention":
        self._patch = patch.object(functional, "scaled_dot_product_attention", self._attend)
        self._patch.start()
        return self

    def __exit__(self, *error):
        self._patch.stop()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
        self.flops += 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return _FusedAttention.apply(query, key, value)


def _inputs(
    family: Family, network: nn.Module, latent_shape: tuple[int, ...], length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Conditioning]:
    tensors = {
        name: torch.empty(_ROWS, *shape, dtype=torch.bool if name == "mask" else dtype, device="meta")
        for name, shape in family.conditioning(network.config, length).items()
    }
    latents = torch.empty(_ROWS, *latent_shape, dtype=dtype, device="meta")
    return latents, torch.empty(_ROWS, device="meta"), Conditioning(tensors)


def count(
    family: Family, network: nn.Module, latent_shape: tuple[int, ...], length: int, dtype: torch.dtype
) -> Counted | None:
    """Count the inference of a network on the meta device. None: the family cannot be counted.

    Args:
        latent_shape: (C, h, w) of one candidate.
        length: tokens of a prompt.
        dtype: of weights and activations; the network is converted.
    """
    if family.conditioning is None:
        return None
    network = _converted(network.eval().requires_grad_(False), dtype)
    inputs = _inputs(family, network, latent_shape, length, dtype)
    ledger = Ledger("meta", list(network.state_dict(keep_vars=True).values()))
    with torch.no_grad(), FusedAttention() as attention, FlopCounterMode(display=False) as products, ledger:
        family.predict(network, *inputs)
    return Counted((products.get_total_flops() + attention.flops) / _ROWS, ledger.peak / _ROWS)


def count_training(
    family: Family,
    network: nn.Module,
    latent_shape: tuple[int, ...],
    length: int,
    dtype: torch.dtype,
    adapter: dict,
    checkpointing: bool,
) -> CountedTraining | None:
    """Count fine-tuning of an adapter. `network` gets the adapter. None: the family cannot be counted.

    Args:
        adapter: keyword arguments of `attach_adapter`.
        checkpointing: recompute activations of each block in the backward pass.
    """
    if family.conditioning is None:
        return None
    with torch.device("meta"):
        model = attach_adapter(_converted(network, dtype), **adapter)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model = _converted(model, dtype).train()  # autocast stores activations in this dtype
    if checkpointing:
        network.enable_gradient_checkpointing()
    inputs = _inputs(family, network, latent_shape, length, dtype)
    ledger = Ledger("meta", list(model.state_dict(keep_vars=True).values()))
    with FusedAttention(), ledger:
        loss = family.predict(model, *inputs).float().square().mean()
        with torch.autograd.set_multithreading_enabled(False):  # in this thread, where the ledger is active
            loss.backward()
    return CountedTraining(trained, trained * _MASTER, ledger.peak / _ROWS)


def _converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """All floating-point parameters and buffers in this dtype; diffusers would warn of layers that it keeps in fp32."""
    return module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
