"""The attention layers of a network: their maps, other values, and identity attention, by hooks.

The hooks exist only inside the context managers. Outside them the network is unchanged, so scores are computed with the
model as it is.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def unet_layers(unet: nn.Module, cross: bool) -> dict[int, list[Attention]]:
    """The self- or cross-attention layers of a UNet by factor, in the order of the network.

    The factor is the number of latent pixels per pixel of the attention map, in each direction.
    """
    depth, layers = len(unet.config.block_out_channels), defaultdict(list)
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and module.is_cross_attention == cross:
            part, index = name.split(".")[:2]
            power = {"down_blocks": int(index), "up_blocks": depth - 1 - int(index)} if index.isdigit() else {}
            layers[2 ** power.get(part, depth - 1)].append(module)
    return dict(sorted(layers.items()))


def self_attention_layers(network: nn.Module, parts: Iterable[str]) -> list[Attention]:
    """The self-attention layers with a name that contains one of the regular expressions `parts`.

    Raises:
        ValueError: a part matches no such layer.
    """
    found = []
    for part in parts:
        layers = [
            module
            for name, module in network.named_modules()
            if isinstance(module, Attention) and not module.is_cross_attention and re.search(part, name)
        ]
        if not layers:
            raise ValueError(f"perturbed_layers has {part!r}, but no self-attention layer has such a name")
        found += layers
    return found


def attention_map(layer: Attention, hidden: Tensor, context: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(d)): (n, heads, pixels, tokens). Without context: of self-attention."""
    query, key = layer.to_q(hidden), layer.to_k(hidden if context is None else context)
    scores = layer.get_attention_scores(layer.head_to_batch_dim(query), layer.head_to_batch_dim(key))
    return scores.unflatten(0, (len(hidden), layer.heads))


@contextmanager
def captured(layers: Iterable[Attention]) -> Iterator[dict[Attention, Tensor]]:
    """Context in which the network's next call puts the `attention_map` of each layer into the dictionary. What the
    network computes stays the same."""
    maps: dict[Attention, Tensor] = {}

    def capture(layer, arguments, named, output):
        maps[layer] = attention_map(layer, arguments[0], named.get("encoder_hidden_states"))

    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.register_forward_hook(capture, with_kwargs=True)
            hooks.callback(hook.remove)
        yield maps


@contextmanager
def values_from(layers: Iterable[Attention], context: Tensor) -> Iterator[None]:
    """Context in which the layers compute their values from `context`, (n, tokens, d); queries and keys stay the
    same."""
    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.to_v.register_forward_pre_hook(lambda module, arguments: (context.to(arguments[0].dtype),))
            hooks.callback(hook.remove)
        yield


@contextmanager
def identity_attention(layers: Iterable[Attention], last: int) -> Iterator[None]:
    """Context in which every pixel of the `last` rows of a batch attends only to itself: the attention map of these
    rows is the identity matrix."""

    def replace(layer, arguments, output):
        values = layer.to_v(arguments[0][-last:])
        for part in layer.to_out:
            values = part(values)
        return torch.cat([output[:-last], values])

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(replace).remove)
        yield


def smoothed(maps: Tensor, sigma: float = 0.5) -> Tensor:
    """Maps (n, h, w) convolved with a 3 x 3 kernel, proportional to exp(-(d / 2 sigma)^2) in each direction, with
    reflected borders. A Gaussian has exp(-d^2 / 2 sigma^2); the released codes of Attend-and-Excite and of
    semantic-aware guidance both have this form."""
    line = torch.exp(-((torch.arange(-1.0, 2.0, device=maps.device) / (2 * sigma)) ** 2))
    kernel = line[:, None] * line
    padded = nn.functional.pad(maps[:, None], (1, 1, 1, 1), mode="reflect")
    return nn.functional.conv2d(padded, (kernel / kernel.sum()).to(maps.dtype)[None, None])[:, 0]
