"""The moving average that a recalibration replaced, until training goes on with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_bn.functional.recalibration.result import Recalibration
from lightning_bn.functional.statistics.snapshots import Snapshot, restore_where_unchanged


class ReplacedAverage:
    """Remembers what layers held and what was written over it; brings the former back where the latter is still there.

    Not where averages of weights have taken it along, or where layers have been frozen to start from it.
    """

    def __init__(self) -> None:
        self._snapshots: tuple[Snapshot, Snapshot] | None = None

    def remember(self, done: Recalibration) -> None:
        """Take what a recalibration replaced."""
        self._snapshots = (done.before, done.after)

    def bring_back(self, model: nn.Module) -> None:
        """Write it, once."""
        if self._snapshots is not None:
            restore_where_unchanged(model, *self._snapshots)
        self.forget()

    def forget(self) -> None:
        """Leave what is there."""
        self._snapshots = None

    def state_dict(self) -> list[dict[str, Any]] | None:
        """Plain values and tensors."""
        return None if self._snapshots is None else [snapshot.state_dict() for snapshot in self._snapshots]

    def load_state_dict(self, state: list[dict[str, Any]] | None) -> None:
        """Of :meth:`state_dict`."""
        if state is not None:
            before, after = (Snapshot.from_state_dict(part) for part in state)
            self._snapshots = (before, after)
