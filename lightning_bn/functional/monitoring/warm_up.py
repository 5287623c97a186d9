"""Layers whose moving averages are still mostly their initial values: they have no drift yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_bn.functional.layers.behavior import has_initial_statistics
from lightning_bn.functional.layers.sets_per_task import Statistics, StatisticsOf
from lightning_bn.functional.monitoring.batch_deviation import on_device
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.measure import LayerTable
from lightning_bn.functional.statistics.snapshots import Snapshot

_WARM_BELOW = 0.01
"""Share of initial values in the moving average, from which on a layer is measured."""


class WarmUp:
    """Which layers are warming up, and since when others are measured.

    Args:
        names: Of all layers.
        layers: Those that are warming up, from a checkpoint: the history has their marks.
        measured_since: The step from which on layers are measured that were warming up, or were reset.

    Attributes:
        layers: Those that are warming up.
    """

    def __init__(
        self, names: Iterable[str], layers: Iterable[str] = (), measured_since: Mapping[str, int] | None = None
    ) -> None:
        self._names = tuple(names)
        self.layers = self._marked = frozenset(layers)
        self.measured_since = dict(measured_since or {})

    def start(self, layers: Mapping[str, Statistics]) -> None:
        """Have those warm up that were never updated, too."""
        self.layers |= {name for name, layer in layers.items() if has_initial_statistics(layer) or _unseen(layer)}

    def mask(self, device: torch.device) -> Tensor:
        """Return which layers are warming up, ``(L,)``."""
        return on_device(tuple(name in self.layers for name in self._names), device, torch.bool)

    def update(self, table: LayerTable, step: int, history: DriftHistory) -> None:
        """Take the result of a sample: layers that were reset warm up, those that are warm are measured from now on.

        Args:
            table: On the host.
            step: Optimizer steps taken.
            history: Gets the marks.
        """
        still: set[str] = set()
        for name, reset, share in zip(self._names, table.reset.tolist(), table.initial_share.tolist(), strict=True):
            if reset:
                history.mark(step, name, "reset")
            elif name not in self.layers:
                continue
            if share >= _WARM_BELOW:
                still.add(name)
                if name not in self._marked:
                    history.mark(step, name, "warming up")
            else:
                self.measured_since[name] = step
                history.mark(step, name, "warmed up")
        self.layers = self._marked = frozenset(still)


def following(reference: Snapshot, current: Snapshot, which: Tensor) -> Snapshot:
    """Return a reference with the statistics of now for some layers, ``(L,)``."""
    channels = current.layout.expand(which)
    return replace(
        reference,
        mean=torch.where(channels, current.mean, reference.mean),
        var=torch.where(channels, current.var, reference.var),
        num_batches_tracked=torch.where(which, current.num_batches_tracked, reference.num_batches_tracked),
    )


def _unseen(layer: Statistics) -> bool:
    return isinstance(layer, StatisticsOf) and layer.is_unseen()
