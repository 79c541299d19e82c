"""Encoded prompts, the input of a denoiser: named tensors with one row per prompt.

Each model family stores the tensors that its network reads: Stable Diffusion 1 and 2 `embeds`, others also `mask`,
`pooled` or `size`. Only the denoiser of the family reads the tensors. All other code selects, joins, moves and repeats
rows.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The conditioning of n prompts: `tensors[name]` is (n, ...), row i belongs to prompt i.

    A family pads every prompt to one fixed length. A row therefore has the same shape in every batch and does not
    depend on the other prompts of the batch, so rows of different batches can be joined. `cat` refuses rows of
    different shapes: it does not know the padding value of a family or the tensor that masks the padding.

    Raises:
        ValueError: there is no tensor, or the tensors have different numbers of rows.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self):
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items()) or "no tensor"
            raise ValueError(
                f"a conditioning has these tensors: {shapes}; give one or more tensors, each with one row per prompt"
            )

    def __len__(self) -> int:
        """Number of prompts."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of this name, (n, ...). Only the denoiser of the model family uses it.

        Raises:
            KeyError: there is no tensor of this name.
        """
        return self.tensors[name]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Apply a function of rows, (n, ...) -> (m, ...), to every tensor."""
        return Conditioning({name: function(tensor) for name, tensor in self.tensors.items()})

    def rows(self, index: Tensor | slice) -> "Conditioning":
        """Select rows, in the order of the index.

        Args:
            index: (m,) long, on any device, may repeat rows; or a slice.
        """
        return self.map(lambda tensor: tensor[index.to(tensor.device) if isinstance(index, Tensor) else index])

    def expand(self, count: int) -> "Conditioning":
        """Repeat a single row `count` times, without a copy. A conditioning of `count` rows stays unchanged.

        Raises:
            ValueError: the number of rows is neither 1 nor `count`.
        """
        if len(self) not in (1, count):
            raise ValueError(
                f"a conditioning of {len(self)} prompts cannot be expanded to {count} rows; give 1 prompt or {count}"
            )
        return self.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """Move to another device or dtype. `dtype` applies only to floating-point tensors."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def cpu(self) -> "Conditioning":
        return self.to("cpu")

    @staticmethod
    def cat(parts: Iterable["Conditioning"]) -> "Conditioning":
        """Join the rows of all parts, in order.

        Raises:
            ValueError: the parts have different tensor names, or rows of different shapes.
        """
        parts = list(parts)
        names = [sorted(part.tensors) for part in parts]
        if any(other != names[0] for other in names):
            found = " and ".join(", ".join(other) for other in sorted({tuple(other) for other in names}))
            raise ValueError(
                f"cannot join conditionings with the tensors {found}: they come from different models; encode all"
                " prompts with one model"
            )
        for name in names[0]:
            shapes = sorted({tuple(part[name].shape[1:]) for part in parts})
            if len(shapes) > 1:
                found = " and ".join(map(str, shapes))
                raise ValueError(
                    f"cannot join rows of {name} with the shapes {found}; the model family must pad all prompts to one"
                    " length"
                )
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})
