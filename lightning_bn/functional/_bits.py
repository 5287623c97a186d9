"""Many tensors copied and compared as one, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Flat:
    """Copies of tensors, all in one for each device and dtype: one comparison instead of hundreds.

    Args:
        tensors: What to copy.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._places = [(tensor.device, tensor.dtype) for tensor in tensors]
        self._sizes: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for key, tensor in zip(self._places, tensors, strict=True):
            self._sizes.setdefault(key, []).append(tensor.numel())
        self._flat = _concatenated(tensors)

    def same_bits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these hold, in the same order, the bits that were copied."""
        now = _concatenated(tensors)
        return now.keys() == self._flat.keys() and all(same_bits(now[key], self._flat[key]) for key in now)

    def parts(self) -> list[Tensor]:
        """The copies, each as a vector, in the order of the tensors."""
        parts = {key: iter(self._flat[key].split(sizes)) for key, sizes in self._sizes.items()}
        return [next(parts[key]) for key in self._places]


def _concatenated(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], Tensor]:
    grouped: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        grouped.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach().reshape(-1))
    return {key: torch.cat(members) for key, members in grouped.items()}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has bits of its own in memory: not sparse, nested, quantized, conjugated or without data."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.device.type != "meta"
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, NaN and signed zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As whole numbers of the same width, which compare faster than bytes.
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(a.element_size(), torch.int64)
    bits_a, bits_b = (t.detach().to(a.device).contiguous().view(-1).view(whole) for t in (a, b))
    return torch.equal(bits_a, bits_b)
