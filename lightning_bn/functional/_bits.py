"""Many tensors copied and compared as one, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_BYTES = 2**20
"""Of the copies that are compared at once: all but the largest tensors together, and little memory to do so."""
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Flat:
    """Copies of tensors, many in one: a few comparisons instead of hundreds.

    Args:
        tensors: What to copy.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._places, self._sizes = _places(tensors), [tensor.numel() for tensor in tensors]
        self._copies = [(part, self._copy([tensors[index] for index in part])) for part in self._parts()]

    def same_bits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these hold, in the same order, the bits that were copied."""
        return _places(tensors) == self._places and next(self.changed(tensors), None) is None

    def changed(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield where tensors hold other bits than were copied: the index, and the copy as a vector.

        Args:
            tensors: Of the devices and dtypes of those that were copied, in the same order.
        """
        for part, copies in self._copies:
            if not same_bits(_concatenated([tensors[index] for index in part]), copies):
                for index, copy in zip(part, self._split(part, copies), strict=True):
                    if not same_bits(tensors[index].detach().reshape(-1), copy):
                        yield index, copy

    def parts(self) -> list[Tensor]:
        """The copies, each as a vector, in the order of the tensors."""
        found = {
            index: copy
            for part, copies in self._copies
            for index, copy in zip(part, self._split(part, copies), strict=True)
        }
        return [found[index] for index in range(len(found))]

    def _copy(self, tensors: list[Tensor]) -> Tensor:
        return _concatenated(tensors) if len(tensors) > 1 else tensors[0].detach().reshape(-1).clone()

    def _split(self, part: Sequence[int], copies: Tensor) -> Sequence[Tensor]:
        sizes = [self._sizes[index] for index in part]
        return copies.split(sizes)  # type: ignore[no-any-return]

    def _parts(self) -> Iterator[list[int]]:
        """Indices of what lies together: of one device and dtype, a single tensor or up to so many bytes."""
        grouped: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, place in enumerate(zip(*self._places, strict=True)):
            grouped.setdefault(place, []).append(index)
        for (_, dtype), indices in grouped.items():
            start = filled = 0
            for end, index in enumerate(indices):
                filled += self._sizes[index] * dtype.itemsize
                if start < end and filled > _BYTES:
                    yield indices[start:end]
                    start, filled = end, self._sizes[index] * dtype.itemsize
            yield indices[start:]


def _places(tensors: Sequence[Tensor]) -> tuple[list[torch.device], list[torch.dtype]]:
    return [tensor.device for tensor in tensors], [tensor.dtype for tensor in tensors]


def _concatenated(tensors: list[Tensor]) -> Tensor:
    """The values of all of them as one vector; of a single one perhaps the tensor itself."""
    with torch.no_grad():
        vectors = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors]
        return torch.cat(vectors) if len(vectors) > 1 else vectors[0]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has bits of its own in memory: not sparse, nested, quantized, conjugated or without data."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_meta
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, NaN and signed zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits_a, bits_b = (t.detach().to(a.device).contiguous().view(-1) for t in (a, b))
    # As whole numbers, the widest that both can be read as: eight bytes are compared as fast as one.
    starts = (t.storage_offset() * t.element_size() for t in (bits_a, bits_b))
    whole = _WHOLE[math.gcd(8, a.nbytes, *starts)]
    return torch.equal(bits_a.view(whole), bits_b.view(whole))
