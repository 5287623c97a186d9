"""The last batches that training used, of each task."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_bn.functional.layers.sets_per_task import sets_of


@dataclass
class RecentBatches:
    """Batches as training used them, kept as they are.

    Args:
        most: How many to keep, of each task.
    """

    most: int
    _of: dict[str | None, deque[tuple[int, int, Any]]] = field(default_factory=dict)
    _taken: int = 0

    def add(self, batch: Any, batch_idx: int, model: nn.Module) -> None:
        """Keep one more batch, in the place of the oldest one of its task; where only contexts tell, of all."""
        tells = next((sets.task_of for module in model.modules() if (sets := sets_of(module)) is not None), None)
        task = None if tells is None else tells(batch, batch_idx)
        self._taken += 1
        self._of.setdefault(task, deque(maxlen=self.most)).append((self._taken, batch_idx, batch))

    def in_order(self) -> list[tuple[int, Any]]:
        """Return all that are kept, each with the index that it had in its epoch, as training used them."""
        found = sorted((one for kept in self._of.values() for one in kept), key=lambda one: one[0])
        return [(batch_idx, batch) for _, batch_idx, batch in found]

    def clear(self) -> None:
        """Keep nothing any more."""
        self._of.clear()
