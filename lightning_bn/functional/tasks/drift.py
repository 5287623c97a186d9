"""How far the statistics of tasks lie apart, by layer: which layers need a set for each task, and which do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.patterns import shortest_paths
from lightning_bn.functional.statistics.drift_measures import Measure, drift
from lightning_bn.functional.statistics.snapshots import Snapshot
from lightning_bn.functional.tasks.bank import TaskStatistics

APART = 0.1
"""Jeffreys divergence, a variance ratio of 1.56 or a mean shift of 0.32 sigma, mean over a layer's channels."""


@dataclass(frozen=True)
class TaskDrift:
    """Drift between T tasks in L layers.

    Attributes:
        tasks: T names.
        layers: L names.
        values: Of each layer the mean over channels of the drift's absolute value, ``(T, T, L)``, float64, 0 on the
            diagonal. From the row's task to the column's.
        others: Names of the model's BatchNorm layers that have no sets.
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    values: Tensor
    others: tuple[str, ...] = ()

    def largest(self) -> dict[str, float]:
        """Return of each layer the largest drift between any two tasks."""
        return dict(zip(self.layers, self.values.amax((0, 1)).tolist(), strict=True))

    def pairs(self) -> dict[tuple[str, str], list[float]]:
        """Return the drift of each layer for each two tasks, the larger one of its two directions."""
        larger = torch.maximum(self.values, self.values.transpose(0, 1))
        return {
            (one, other): larger[row, column].tolist()
            for (row, one), (column, other) in combinations(enumerate(self.tasks), 2)
        }

    def worst(self) -> tuple[str, str, str, float]:
        """Return the layer and the two tasks that lie furthest apart, and how far."""
        index = int(self.values.argmax())
        row, column, layer = (int(part) for part in torch.unravel_index(torch.tensor(index), self.values.shape))
        return self.layers[layer], self.tasks[row], self.tasks[column], float(self.values[row, column, layer])

    def suggest(self, above: float = APART) -> list[str]:
        """Return what to give as ``modules``: the shortest paths that mean the layers in which tasks differ, no others.

        Args:
            above: The drift from which on a layer needs a set for each task.
        """
        chosen = {name for name, value in self.largest().items() if not value <= above}
        return shortest_paths(chosen, {*self.layers, *self.others})

    def __str__(self) -> str:
        layer, one, other, value = self.worst()
        paths, largest = self.suggest(), self.largest()
        same = [name for name in self.layers if largest[name] <= APART]
        said = [f"tasks {one!r} and {other!r} lie furthest apart at {layer} ({value:.3g})"]
        said.append(
            f"layers that need their own statistics for each task: {quoted(paths)}"
            if paths
            else ("one set of statistics is enough for all tasks")
        )
        if paths and same:
            least = max(largest[name] for name in same)
            said.append(f"one set is enough for {quoted(same)} (drift at most {least:.2g})")
        return "; ".join(said)


def task_drift(bank: TaskStatistics, measure: Measure = "jeffreys") -> TaskDrift:
    """Return how far the statistics of each two tasks lie apart in each layer.

    They are what training normalized with, each task's batches by themselves. A difference that an earlier layer's own
    sets have taken away does not show in later layers, as it would if all tasks were run through shared statistics.

    Args:
        bank: Of at least two tasks.
        measure: As for :func:`~lightning_bn.functional.drift`.

    Raises:
        ValueError: If there is only one task, or the measure is unknown.
    """
    if len(bank.tasks) < 2:
        raise ValueError(
            f"there is only one task, {bank.tasks[0]!r}: task_drift compares tasks, so it needs two or more."
        )
    others = [name for name in bank.all_layers if name not in bank.layers]
    return drift_between({task: bank.snapshot(task) for task in bank.tasks}, measure, others)


def drift_between(snapshots: Mapping[str, Snapshot], measure: Measure, others: Sequence[str] = ()) -> TaskDrift:
    """As :func:`task_drift`, of statistics that were taken.

    Args:
        snapshots: Of the same layers, by task.
        measure: As for :func:`~lightning_bn.functional.drift`.
        others: Names of the model's BatchNorm layers that have no sets.
    """
    tasks, layers = tuple(snapshots), next(iter(snapshots.values())).names
    values = torch.zeros(len(tasks), len(tasks), len(layers), dtype=torch.float64)
    for (row, one), (column, other) in combinations(enumerate(tasks), 2):
        for place in ((row, column, one, other), (column, row, other, one)):
            by_layer = drift(snapshots[place[2]], snapshots[place[3]], measure).values()
            values[place[0], place[1]] = torch.stack([channels.abs().mean() for channels in by_layer]).cpu()
    return TaskDrift(tasks, layers, values, tuple(others))
