"""The one type for "all channels of all layers in one tensor, and an index"."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_bn.functional.layers.sets_per_task import Statistics


@dataclass(frozen=True)
class ChannelLayout:
    """Where the channels of L layers lie in the last dimension of a tensor of C channels, one layer after another.

    Attributes:
        names: Of the layers, L of them.
        sizes: Channels of each.

    Example:
        >>> layout = ChannelLayout(("a", "b"), (1, 2))
        >>> layout.sum(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 5.])
        >>> layout.locate(2)
        ('b', 1)
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, layers: Mapping[str, Statistics]) -> Self:
        """Of layers, in their order."""
        return cls(tuple(layers), tuple(layer.num_features for layer in layers.values()))

    @classmethod
    def joined(cls, layouts: Collection[ChannelLayout]) -> Self:
        """Of several tensors put one behind another."""
        names = tuple(name for layout in layouts for name in layout.names)
        return cls(names, tuple(size for layout in layouts for size in layout.sizes))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def channels(self) -> int:
        """C, of all layers together."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each layer's channels lie."""
        found, start = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            found[name] = slice(start, start + size)
            start += size
        return found

    def restrict(self, names: Collection[str]) -> ChannelLayout:
        """Of some of the layers, in the order of ``names``."""
        return ChannelLayout(tuple(names), tuple(self.sizes[self.names.index(name)] for name in names))

    def pick(self, values: Tensor, names: Iterable[str]) -> Tensor:
        """Values of some of the layers, ``(..., C)`` to ``(..., C')``, in the order of ``names``."""
        names = tuple(names)
        return values if names == self.names else torch.cat([values[..., self.slices[name]] for name in names], -1)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Views of each layer's channels, ``(..., C)`` to ``(..., channels)``, by name."""
        return dict(zip(self.names, values.split(self.sizes, -1), strict=True))

    def expand(self, per_layer: Tensor) -> Tensor:
        """A value of each layer for each of its channels, ``(..., L)`` to ``(..., C)``."""
        return per_layer[..., _layer_of(self.sizes, per_layer.device)]

    def constant(
        self, per_layer: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Numbers of the layers for each of their channels, ``(C,)``; made once for a device."""
        return _constant(per_layer, self.sizes, device, dtype)

    def sum(self, values: Tensor) -> Tensor:
        """Over each layer's channels, ``(..., C)`` to ``(..., L)``."""
        zeros = values.new_zeros(*values.shape[:-1], len(self))
        return zeros.index_add_(-1, _layer_of(self.sizes, values.device), values)

    def mean(self, values: Tensor) -> Tensor:
        """Over each layer's channels, ``(..., C)`` to ``(..., L)``."""
        ones = (1,) * len(self)
        return self.sum(values) / _constant(self.sizes, ones, values.device, values.dtype)

    def max(self, values: Tensor) -> Tensor:
        """Over each layer's channels, ``(C,)`` to ``(L,)``; NaN where any channel's is."""
        least = values.new_full((len(self),), -torch.inf)
        return least.scatter_reduce_(0, _layer_of(self.sizes, values.device), values, "amax")

    def locate(self, position: int) -> tuple[str, int]:
        """The layer at a position of the flat tensor, and the channel in it."""
        for name, part in self.slices.items():
            if part.start <= position < part.stop:
                return name, position - part.start
        raise IndexError(f"position {position} is not one of the {self.channels} channels of this layout")


# The same for every sample of a fit.
@lru_cache(maxsize=32)
def _layer_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)


@lru_cache(maxsize=32)
def _constant(per_layer: tuple[float, ...], sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(per_layer, dtype=dtype).repeat_interleave(torch.tensor(sizes)).to(device)
