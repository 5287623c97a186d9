"""Proof that layers which must not move did not: their values kept, compared bit by bit, put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.snapshots import same_bits

_STATS = ("running_mean", "running_var", "num_batches_tracked")
_AFFINE = ("weight", "bias")


@dataclass(frozen=True)
class Moved:
    """One value that should not have moved.

    Attributes:
        layer: Name of the layer.
        value: ``running_mean``, ``running_var``, ``num_batches_tracked``, ``weight`` or ``bias``.
        largest_change: Largest absolute difference over its elements; NaN where one is not finite.
    """

    layer: str
    value: str
    largest_change: float

    def __str__(self) -> str:
        return f"{self.layer}.{self.value} by up to {self.largest_change:.3g}"


class KeptValues:
    """Copies of the values of ``layers`` that must not move.

    Args:
        layers: By name.
        stats: Whether running statistics and ``num_batches_tracked`` are among them.
        affine: Whether ``weight`` and ``bias`` are.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], *, stats: bool, affine: bool) -> None:
        self._names = (_STATS if stats else ()) + (_AFFINE if affine else ())
        self._kept = {key: value.detach().clone() for key, value in self._values(layers)}
        self._flat = _flat(self._kept)

    def moved(self, layers: Mapping[str, _BatchNorm]) -> list[Moved]:
        """What differs in any bit from what was kept; a few vector operations where nothing does."""
        now = dict(self._values(layers))
        flat = _flat(now)
        if flat.keys() == self._flat.keys() and all(same_bits(flat[key], self._flat[key]) for key in flat):
            return []
        return [
            Moved(*key, largest_change=_largest_change(kept, now.get(key)))
            for key, kept in self._kept.items()
            if key not in now or not same_bits(now[key], kept)
        ]

    def put_back(self, layers: Mapping[str, _BatchNorm]) -> None:
        """Writes what was kept back wherever it differs, in place; a tensor that was taken away is made again."""
        with torch.no_grad():
            for (name, value), kept in self._kept.items():
                tensor = getattr(layers[name], value)
                if tensor is None or tensor.shape != kept.shape or tensor.dtype != kept.dtype:
                    replacement = kept.clone()
                    setattr(layers[name], value, torch.nn.Parameter(replacement) if value in _AFFINE else replacement)
                elif not same_bits(tensor, kept):
                    tensor.copy_(kept)

    def _values(self, layers: Mapping[str, _BatchNorm]) -> Iterator[tuple[tuple[str, str], Tensor]]:
        for name, layer in layers.items():
            for value in self._names:
                tensor = getattr(layer, value)
                if tensor is not None:
                    yield (name, value), tensor


def _flat(values: Mapping[tuple[str, str], Tensor]) -> dict[tuple[torch.device, torch.dtype], Tensor]:
    """The values in one tensor for each device and dtype: one comparison instead of hundreds."""
    grouped: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for value in values.values():
        grouped.setdefault((value.device, value.dtype), []).append(value.detach().reshape(-1))
    return {key: torch.cat(tensors) for key, tensors in grouped.items()}


def _largest_change(kept: Tensor, now: Tensor | None) -> float:
    if now is None or now.shape != kept.shape:
        return float("nan")
    return float((now.detach().to(kept.device, torch.float64) - kept.to(torch.float64)).abs().max())
