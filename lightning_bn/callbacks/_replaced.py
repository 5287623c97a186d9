"""What a recalibration wrote, task by task: looked at again, and taken back when training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.layers.sets_per_task import SetsPerTask, sets_among
from lightning_bn.functional.recalibration.result import Recalibration
from lightning_bn.functional.statistics.snapshots import Snapshot, restore_where_unchanged, snapshot_of


def rewritten(done: Recalibration, layers: Mapping[str, _BatchNorm]) -> list[str]:
    """Return names of layers that do not hold what a recalibration wrote into them."""
    found = []
    for task, part in _parts(done):
        written = {name: layers[name] for name in part.layers}
        with _at_rest(sets_among(written), task):
            if not part.after.same_bits(snapshot_of(written)):
                found += list(written)
    return found


class ReplacedAverage:
    """Remembers what layers held and what was written over it; brings the former back where the latter is still there.

    Not where averages of weights have taken it along, or where layers have been frozen to start from it.
    """

    def __init__(self) -> None:
        self._snapshots: dict[str | None, tuple[Snapshot, Snapshot]] = {}

    def remember(self, done: Recalibration) -> None:
        """Take what a recalibration replaced."""
        self._snapshots = {task: (part.before, part.after) for task, part in _parts(done)}

    def bring_back(self, model: nn.Module) -> None:
        """Write it, once."""
        if not self._snapshots:
            return
        layers = batch_norm_layers(model)
        for task, (before, after) in self._snapshots.items():
            sets = None if task is None else sets_among({name: layers[name] for name in before.names if name in layers})
            if task is None or (sets is not None and task in sets.tasks):
                with _at_rest(sets, task):
                    restore_where_unchanged(model, before, after)
                    if sets is not None and task is not None:
                        sets.wrote(task)
        self.forget()

    def forget(self) -> None:
        """Leave what is there."""
        self._snapshots = {}

    def state_dict(self) -> list[Any] | None:
        """Plain values and tensors; before and after of each part, which begins with its task."""
        parts = [[task, *(one.state_dict() for one in pair)] for task, pair in self._snapshots.items()]
        return parts or None

    def load_state_dict(self, state: list[Any] | None) -> None:
        """Of :meth:`state_dict`."""
        # Before there were tasks it was the two snapshots alone.
        parts = [[None, *state]] if state and isinstance(state[0], Mapping) else state or []
        for task, before, after in parts:
            self._snapshots[task] = (Snapshot.from_state_dict(before), Snapshot.from_state_dict(after))


def _parts(done: Recalibration) -> Iterator[tuple[str | None, Recalibration]]:
    """What was done to layers without statistics per task, and to those of each task."""
    parts: list[tuple[str | None, Recalibration]] = [(None, done), *done.tasks.items()]
    return ((task, part) for task, part in parts if part.layers)


def _at_rest(sets: SetsPerTask | None, task: str | None) -> AbstractContextManager[None]:
    return nullcontext() if sets is None or task is None else sets.at_rest(task)
