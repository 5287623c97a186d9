"""Proof that layers which must not move did not: their values kept, watched, compared bit by bit, put back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._bits import Flat, same_bits

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
        return f"{self.layer}.{self.without_layer()}"

    def without_layer(self) -> str:
        """What moved, by how much and why, where the layer has been named."""
        how_far = "" if math.isnan(self.largest_change) else f" by up to {self.largest_change:.3g}"
        cause = f" ({self.cause})" if self.cause else ""
        return f"{self.value}{how_far}{cause}"


@dataclass(frozen=True)
class _Watched:
    """One tensor where a layer keeps it, as it was when it was last known to be right."""

    layer: str
    value: str
    home: dict[str, Tensor | None]
    key: str
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
        # Plain tuples in a plain loop: this runs in every training step.
        for home, key, tensor, version in self._sentinels:
            if home.get(key) is not tensor or tensor._version != version:
                return True
        return False

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
                now = watched.home.get(watched.key)
                if now is None or now.shape != watched.tensor.shape or now.dtype != watched.tensor.dtype:
                    # The tensor it was: optimizers and others may still hold it.
                    watched.home[watched.key] = now = watched.tensor
                if not same_bits(now.reshape(-1), part):
                    now.copy_(part.view_as(now))
        self.rearm()

    def rearm(self) -> None:
        """Takes what is there now as untouched."""
        self._watched = [
            _Watched(name, value, home, key, tensor, tensor._version)
            for name, layer in self._layers.items()
            for value, home, key in _homes(layer, self._names)
            if (tensor := home.get(key)) is not None
        ]
        self._sentinels = [(one.home, one.key, one.tensor, one.version) for one in self._watched]

    def of_others(self, layers: Mapping[str, _BatchNorm]) -> KeptValues:
        """What is kept of these layers, expected of others of the same names instead.

        A layer of another size has nothing to be compared with: what it holds now is kept.
        """
        others = KeptValues(layers, stats="running_mean" in self._names, affine="weight" in self._names)
        mine = dict(zip(self._keys, self._kept.parts(), strict=True))
        expected = []
        for key, now in zip(others._keys, others._kept.parts(), strict=True):
            kept = mine.get(key, now)
            expected.append(kept if kept.shape == now.shape and kept.dtype == now.dtype else now)
        others._kept = Flat(expected)
        return others

    def expect(self, other: KeptValues) -> None:
        """Keeps what ``other`` kept of the layers of the same names, instead of what these layers held."""
        if self._keys != other._keys:
            raise ValueError("these are values of other layers than those kept")
        self._kept = other._kept

    def _values(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        for name, layer in self._layers.items():
            for value, home, key in _homes(layer, self._names):
                tensor = home.get(key)
                if tensor is not None:
                    yield (name, value), tensor


def what_moved(key: tuple[str, str], kept: Tensor, now: Tensor | None) -> list[Moved]:
    """The one value of a layer if it is not bit for bit what was kept of it, else nothing."""
    if now is not None and same_bits(now.reshape(-1), kept.reshape(-1)):
        return []
    return [Moved(*key, _largest_change(kept.reshape(-1), now), _cause(key[1], now))]


def _homes(layer: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor | None], str]]:
    """Where a layer keeps its values: what it is called, the dictionary and the key in it.

    Read directly, since attribute look-up on a module is slow. A parametrized weight is computed from others, which are
    kept below it.
    """
    parametrizations = layer._modules.get("parametrizations")
    for value in names:
        if value in _STATS:
            yield value, layer._buffers, value
        elif isinstance(parametrizations, nn.ModuleDict) and value in parametrizations:
            for key in parametrizations[value]._parameters:
                yield f"{value}.{key}", parametrizations[value]._parameters, key  # type: ignore[misc]
        else:
            yield value, layer._parameters, value  # type: ignore[misc]


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
