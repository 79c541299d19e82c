"""Modules that leave the device between two uses, where memory does not hold them beside the network."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Residence:
    """Modules, such as text encoders, that live on a device until memory runs out. From then on they are on the CPU,
    and on the device only while they work.

    Args:
        modules: in the dtype that they keep.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device):
        self.modules, self.device, self.left = modules, device, False
        try:
            self._move(device)
        except torch.OutOfMemoryError:
            self.leave()

    def _move(self, device: torch.device | str):
        for module in self.modules:
            module.to(device)

    def leave(self) -> bool:
        """Free the memory, now and after each use. False: there is none to free."""
        if self.left or not self.modules or self.device.type == "cpu":
            return False
        self.left = True
        self._free()
        return True

    def _free(self):
        self._move("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Context in which the modules are on the device."""
        if not self.left:
            yield
            return
        try:
            self._move(self.device)
            yield
        finally:
            self._free()
