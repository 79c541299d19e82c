"""What prompts become for a denoiser: named tensors with one row a prompt, held as one value.

Each model family puts in what its network reads (Stable Diffusion 1 and 2: `embeds`; others also `mask`, `pooled` or
`size`), and its denoiser alone takes it out again. All other code only picks, joins, moves and repeats rows.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The conditioning of n prompts: `tensors[name]` is (n, ...), row i belongs to prompt i.

    A family pads every prompt to one fixed length. A row therefore has the same shape in every batch and does not
    depend on the other prompts of its batch, and rows of different batches can be joined. `cat` refuses rows of
    different shapes: it cannot know what a family pads with, nor which tensor masks the padding.

    Raises:
        ValueError: there is no tensor, or their numbers of rows differ.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self):
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items()) or "no tensor"
            raise ValueError(f"the tensors of a conditioning must have one row a prompt each; these are: {shapes}")

    def __len__(self) -> int:
        """Number of prompts."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        """One of the tensors, (n, ...): for the family's own denoiser.

        Raises:
            KeyError: there is no tensor of that name.
        """
        return self.tensors[name]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """A function of rows, (n, ...) -> (m, ...), applied to every tensor."""
        return Conditioning({name: function(tensor) for name, tensor in self.tensors.items()})

    def rows(self, index: Tensor | slice) -> "Conditioning":
        """Some rows, in the order of the index, which may repeat them.

        Args:
            index: (m,) long, on any device; or a slice.
        """
        return self.map(lambda tensor: tensor[index.to(tensor.device) if isinstance(index, Tensor) else index])

    def expand(self, count: int) -> "Conditioning":
        """A single row seen `count` times, without a copy; `count` rows stay as they are.

        Raises:
            ValueError: there are neither one nor `count` rows.
        """
        if len(self) not in (1, count):
            raise ValueError(f"a conditioning of {len(self)} prompts cannot stand for {count}; give one, or {count}")
        return self.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """The same on another device or in another precision; `dtype` applies to floating-point tensors only."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def cpu(self) -> "Conditioning":
        return self.to("cpu")

    @staticmethod
    def cat(parts: Iterable["Conditioning"]) -> "Conditioning":
        """The rows of all parts, in their order.

        Raises:
            ValueError: the parts hold different names, or rows of different shapes.
        """
        parts = list(parts)
        names = [sorted(part.tensors) for part in parts]
        if any(other != names[0] for other in names):
            told = " and ".join(", ".join(other) for other in sorted({tuple(other) for other in names}))
            raise ValueError(f"conditionings of different models cannot be joined: they hold {told}; encode with one")
        for name in names[0]:
            shapes = sorted({tuple(part[name].shape[1:]) for part in parts})
            if len(shapes) > 1:
                told = " and ".join(map(str, shapes))
                raise ValueError(f"rows of {name} have the shapes {told}; a family must pad all prompts to one length")
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})
