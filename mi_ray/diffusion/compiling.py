"""Compilation of a network's repeated blocks: faster than eager, and compiled once per block class and input shape.

Compiled blocks do the operations of eager ones, up to rounding. Nothing approximate is used.
"""

import torch
from torch import nn

RECOMPILES = 64  # input shapes per block class; a UNet has four resolutions, and each has several batch sizes
WORTH_PADDING = 0.5  # a batch that fills less than this share of a compiled batch runs eagerly


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network of diffusers: its modules in lists, of the classes that diffusers names.

    `compile_repeated_blocks` of diffusers reads `_repeated_blocks` and refuses other networks. For these,
    `_no_split_modules` has the classes. A block inside another block is left out.

    Raises:
        ValueError: the network names no class, or has no module of them.
    """
    names = getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or ()
    found: list[nn.Module] = []

    def search(module: nn.Module, in_list: bool):
        if in_list and type(module).__name__ in names:
            found.append(module)
            return
        for child in module.children():
            search(child, isinstance(module, nn.ModuleList))

    search(network, False)
    if not found:
        raise ValueError(
            f"{type(network).__name__} has no repeated blocks that could be compiled; compile it as a whole"
        )
    return found


def compile_blocks(network: nn.Module, backend: str = "inductor"):
    """Compile the repeated blocks in place, for the shapes that they will be called with.

    Raises:
        ValueError: as `repeated_blocks`.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILES)  # above it PyTorch runs eagerly, without a warning
    for block in repeated_blocks(network):
        block.compile(backend=backend, dynamic=False)
