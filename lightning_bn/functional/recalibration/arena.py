"""Where the forwards of many layers write the statistics of the batch that runs: one flat tensor for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import named
from lightning_bn.functional.layers.exchange import Entries
from lightning_bn.functional.recalibration.collected_forward import NARROW, NOT_CALLED, CollectedForward, not_written

_ALIGNED = 8
"""Elements that a layer's part of the arena begins at a multiple of: kernels may load several of them at once."""


class Arena:
    """One flat tensor for each device and dtype of the layers' statistics, and the forwards that write into it.

    Args:
        layers: By name.
        merge: Reads and empties the arena, before it is full.

    Attributes:
        forwards: What each layer runs instead of its own forward, in order.
        device: Of the first layer's statistics, where all of them are read.
        dtype: In which they are read.

    Raises:
        ValueError: If a layer has no running statistics.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], merge: Callable[[], Any]) -> None:
        grouped: dict[tuple[torch.device, torch.dtype], dict[str, _BatchNorm]] = {}
        own: list[Any] = [(layer.running_mean, layer.running_var) for layer in layers.values()]
        for (name, layer), (running, _) in zip(layers.items(), own, strict=True):
            if running is None:
                raise ValueError(f"BatchNorm layer {named(name)} has no running statistics to collect into")
            dtype = torch.float32 if running.dtype in NARROW else running.dtype
            grouped.setdefault((running.device, dtype), {})[name] = layer
        self._flats: list[Tensor] = []
        views: dict[str, Any] = {}
        # Of all layers, in the order of the flat tensors: their channels, and what lies between them and the next ones.
        sizes: list[int] = []
        for (device, dtype), found in grouped.items():
            parts = [part for one in found.values() for part in (one.num_features, -one.num_features % _ALIGNED)]
            mean, var = flat = torch.ones((2, sum(parts)), device=device, dtype=dtype)
            views |= zip(found, zip(mean.split(parts)[::2], var.split(parts)[::2], strict=True), strict=True)
            self._flats.append(flat)
            sizes += parts
        self.forwards = [CollectedForward(name, layer, views[name], merge) for name, layer in layers.items()]
        with torch.no_grad():
            torch._foreach_copy_([*chain(*(views[name] for name in layers))], [*chain(*own)])
        # What lies there before a forward: the layer's own, for one that reads them. With momentum 1 they have no
        # weight in what it writes, unless they are inf or NaN.
        self._starts = [torch.where(flat.isfinite(), flat, 1) for flat in self._flats]
        self.device = self._flats[0].device
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._filled: Tensor | None = None
        if any(sizes[1::2]) or list(views) != list(layers):
            places = dict(zip(views, torch.arange(sum(sizes)).split(sizes)[::2], strict=True))
            self._filled = torch.cat([places[name] for name in layers]).to(self.device)

    def entries(self) -> list[Entries]:
        """What each layer is to hold while statistics are collected."""
        return [forward.entries() for forward in self.forwards]

    def begin_batch(self) -> None:
        """Make ready for the forwards of a batch."""
        self.clear()
        for forward in self.forwards:
            forward.begin_batch()

    def end_batch(self) -> None:
        """Look whether every forward left its statistics here; see :meth:`CollectedForward.end_batch`."""
        for forward in self.forwards:
            forward.end_batch()

    def refuse_others(self) -> None:
        """Raise where a forward wrote other statistics than those of its input.

        Raises:
            RecalibrationError: With the names of the layers.
        """
        wrong = [forward.name for forward in self.forwards if forward.wrote_others()]
        if wrong:
            raise not_written(*wrong)

    def read(self) -> Tensor:
        """Mean and variance of all layers, in their order, ``(2, C)``."""
        flats = [flat.to(self.device).to(self.dtype) for flat in self._flats]
        values = flats[0] if len(flats) == 1 else torch.cat(flats, -1)
        return values if self._filled is None else values[:, self._filled]

    def clear(self) -> None:
        """Before each forward: what it begins from is the layer's own, and finite."""
        for flat, start in zip(self._flats, self._starts, strict=True):
            flat.copy_(start)
        for forward in self.forwards:
            forward.count = NOT_CALLED
