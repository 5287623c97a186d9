"""Faults of all sets of statistics at one sample, each judged where it shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.monitoring.diagnosis import JUDGED_BY_BATCHES, TWICE, diagnose
from lightning_bn.functional.monitoring.finding_in_words import MonitorFinding
from lightning_bn.functional.monitoring.measure import Evidence, LayerTable
from lightning_bn.functional.monitoring.measured_set import MeasuredSet


class Judgment:
    """Which layers have which fault, in which of their statistics.

    Faults of layers with statistics per task are those of single tasks, but for two: whether a layer is reached at all
    is seen in all of its statistics together, and whether ranks see different data in the layers' own.

    Args:
        layers: By name.
        own: The layers' own statistics.
        tasks: Those of the tasks.
        processes: That train together.
        others: Names of the model's other BatchNorm layers.
    """

    def __init__(
        self,
        layers: Mapping[str, _BatchNorm],
        own: MeasuredSet,
        tasks: Sequence[MeasuredSet],
        processes: int,
        others: Collection[str],
    ) -> None:
        self._layers, self._own, self._tasks = layers, own, tasks
        self._processes, self._all = processes, (*layers, *others)
        self._per_task = torch.tensor([any(name in one.layers for one in tasks) for name in layers], device="cpu")
        self._idle = torch.zeros(len(layers), dtype=torch.int64, device="cpu")

    def findings(
        self,
        tables: Sequence[LayerTable],
        batches: int,
        training: Mapping[str, bool],
        frozen_by: Mapping[str, tuple[str, ...]],
        replaced: bool,
        told: frozenset[tuple[str, ...]],
    ) -> list[MonitorFinding]:
        """Return all faults that a sample shows.

        Args:
            tables: What was measured, on the host: of the layers' own statistics, then of each task's.
            batches: Training batches since the last sample.
            training: Whether a layer is in train mode.
            frozen_by: Who has kept each layer's statistics since the last sample.
            replaced: Whether a recalibration wrote to them.
            told: What was said before.
        """
        own, *of_tasks = tables
        self._idle = torch.where(self._moved(own, of_tasks), 0, self._idle + batches)
        found = []
        # Where none has statistics per task, all stays as it was measured.
        judged = [own.without(self._per_task) if of_tasks else own, *of_tasks]
        for one, measured in zip([self._own, *self._tasks], judged, strict=True):
            one.used_twice = tuple(
                name for name, rate in zip(one.layers, measured.updates.tolist(), strict=True) if rate > TWICE
            )
            unknown = {"updates": measured.updates * torch.nan, "changed": measured.changed * 0} if replaced else {}
            table = replace(measured, **unknown)
            faults = diagnose(self._evidence(one, table, training, frozen_by), told)
            cold = one.warm_up.layers
            found += [it for it in faults if it.layer not in cold or it.kind not in JUDGED_BY_BATCHES]
        return found

    def close(self) -> None:
        """Forget the layers."""
        self._layers = {}
        for one in (self._own, *self._tasks):
            one.layers = {}

    def _moved(self, own: LayerTable, of_tasks: Sequence[LayerTable]) -> Tensor:
        """Return which layers were updated since the last sample, in any of their statistics, ``(L,)``."""
        moved, index = self._own.moved(own), {name: index for index, name in enumerate(self._layers)}
        for one, table in zip(self._tasks, of_tasks, strict=True):
            moved[[index[name] for name in one.layers]] |= one.moved(table)
        return moved

    def _evidence(
        self,
        one: MeasuredSet,
        table: LayerTable,
        training: Mapping[str, bool],
        frozen_by: Mapping[str, tuple[str, ...]],
    ) -> Evidence:
        layers = {name: self._layers[name] for name in one.layers}
        return Evidence(
            table=table,
            names=tuple(layers),
            frozen_by=tuple(frozen_by.get(name, ()) for name in layers),
            training=torch.tensor([training.get(name, False) for name in layers], device="cpu"),
            dtypes=tuple(str(layer.running_mean.dtype) for layer in layers.values()),  # type: ignore[union-attr]
            synchronized=torch.tensor([processes_of(layer) > 1 for layer in layers.values()], device="cpu"),
            idle=self._idle if one is self._own else torch.zeros(len(layers), dtype=torch.int64, device="cpu"),
            samples=one.samples,
            judged=one.window.judged,
            processes=self._processes,
            task=one.task,
            others=tuple(name for name in self._all if name not in layers),
        )
