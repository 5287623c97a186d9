"""Proof that layers which must not move did not: their values kept, watched, compared bit by bit, put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.flat import Flat, same_bits

_STATS = ("running_mean", "running_var", "num_batches_tracked")
_AFFINE = ("weight", "bias")


@dataclass(frozen=True)
class Moved:
    """One value that should not have moved.

    Attributes:
        layer: Name of the layer.
        value: ``running_mean``, ``running_var``, ``num_batches_tracked``, ``weight`` or ``bias``.
        largest_change: Largest absolute difference over its elements; NaN where one is not finite or it was replaced by
            a tensor of another shape.
        cause: What did it, as far as that can be told; else empty.
    """

    layer: str
    value: str
    largest_change: float
    cause: str = ""

    def __str__(self) -> str:
        return f"{self.layer}.{self.value} by up to {self.largest_change:.3g}" + (
            f" ({self.cause})" if self.cause else ""
        )


@dataclass(frozen=True)
class _Watched:
    """One tensor where a layer keeps it, as it was when it was last known to be right."""

    layer: str
    value: str
    home: dict[str, Tensor | None]
    tensor: Tensor
    version: int


class KeptValues:
    """Copies of the values of ``layers`` that must not move.

    Whether a value was *touched* is known from its identity and version without looking at the device; whether it
    *moved* takes a comparison of all bits. Some writers leave no version behind (``tensor.data.copy_``), so that the
    second is not answered by the first.

    Args:
        layers: By name.
        stats: Whether running statistics and ``num_batches_tracked`` are among them.
        affine: Whether ``weight`` and ``bias`` are.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], *, stats: bool, affine: bool) -> None:
        self._layers = dict(layers)
        self._names = (_STATS if stats else ()) + (_AFFINE if affine else ())
        self._watched: list[_Watched] = []
        self.rearm()
        self._keys = [(watched.layer, watched.value) for watched in self._watched]
        self._kept = Flat([watched.tensor for watched in self._watched])

    def touched(self) -> bool:
        """Whether any value was written to or replaced since it was last compared; costs no look at the device."""
        return any(
            watched.home.get(watched.value) is not watched.tensor or watched.tensor._version != watched.version
            for watched in self._watched
        )

    def moved(self) -> list[Moved]:
        """What differs in any bit from what was kept; a few vector operations where nothing does."""
        now = dict(self._values())
        if list(now) == self._keys and self._kept.same_bits(list(now.values())):
            return []
        kept = zip(self._keys, self._kept.parts(), strict=True)
        return [moved for key, part in kept for moved in what_moved(key, part, now.get(key))]

    def put_back(self) -> None:
        """Writes what was kept wherever it differs, in place; a tensor taken away or reshaped comes back."""
        with torch.no_grad():
            for watched, part in zip(self._watched, self._kept.parts(), strict=True):
                now = watched.home.get(watched.value)
                if now is None or now.shape != watched.tensor.shape or now.dtype != watched.tensor.dtype:
                    # The tensor it was: optimizers and others may still hold it.
                    watched.home[watched.value] = now = watched.tensor
                if not same_bits(now.reshape(-1), part):
                    now.copy_(part.view_as(now))
        self.rearm()

    def rearm(self) -> None:
        """Takes what is there now as untouched."""
        self._watched = [
            _Watched(name, value, home, tensor, tensor._version)
            for name, layer in self._layers.items()
            for value in self._names
            if (tensor := (home := _home(layer, value)).get(value)) is not None
        ]

    def expect(self, other: KeptValues) -> None:
        """Keeps what ``other`` kept of the layers of the same names, instead of what these layers held."""
        if self._keys != other._keys:
            raise ValueError("these are values of other layers than those kept")
        self._kept = other._kept

    def _values(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        for name, layer in self._layers.items():
            for value in self._names:
                tensor = _home(layer, value).get(value)
                if tensor is not None:
                    yield (name, value), tensor


def what_moved(key: tuple[str, str], kept: Tensor, now: Tensor | None) -> list[Moved]:
    """The one value of a layer if it is not bit for bit what was kept of it, else nothing."""
    if now is not None and same_bits(now.reshape(-1), kept.reshape(-1)):
        return []
    return [Moved(*key, _largest_change(kept.reshape(-1), now), _cause(key[1], now))]


def _home(layer: nn.Module, value: str) -> dict[str, Tensor | None]:
    """The dictionary in which a layer keeps a value; read directly, attribute look-up on a module is slow."""
    return layer._parameters if value in _AFFINE else layer._buffers  # type: ignore[return-value]


def _largest_change(kept: Tensor, now: Tensor | None) -> float:
    if now is None or now.numel() != kept.numel():
        return float("nan")
    change = now.detach().reshape(-1).to(kept.device, torch.float64) - kept.to(torch.float64)
    return float(change.abs().max())


def _cause(value: str, now: Tensor | None) -> str:
    if now is None:
        return "it was taken away"
    initial = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}.get(value)
    if initial is not None and bool((now == initial).all()):
        return "reset to its initial value, as StochasticWeightAveraging and update_bn do"
    return ""
