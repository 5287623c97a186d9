"""Layers frozen for the task that runs: pinned, with shadow statistics and blocked gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.freezing.change import Change
from lightning_bn.functional.freezing.eval_mode import pin_in_eval, release
from lightning_bn.functional.freezing.freeze_selection import Layers
from lightning_bn.functional.freezing.gradients import blocked_gradients
from lightning_bn.functional.freezing.recomputation import RecomputationGuard
from lightning_bn.functional.freezing.shadow_statistics import shadow_statistics
from lightning_bn.functional.layers.exchange import holders_of
from lightning_bn.functional.layers.properties import affine_parameters


class TaskFreeze:
    """The layers of each task, frozen while that task runs.

    Args:
        by_task: By task, then by name.
        stats: Whether running statistics are frozen.
        affine: Whether ``weight`` and ``bias`` are.
        owner: Who freezes.
        constant: Whether the layers keep nothing of their inputs for the backward.

    Attributes:
        layers: Those of all tasks, by name.
        parameters: Their ``weight`` and ``bias``.
        task: The one that runs; None for none.
        batches: How often layers were frozen for their task.
    """

    def __init__(
        self, by_task: Mapping[str, Layers], *, stats: bool, affine: bool, owner: str, constant: bool = False
    ) -> None:
        self._by_task: dict[str | None, Layers] = dict(by_task.items())
        self._stats, self._affine, self._owner, self._constant = stats, affine, owner, constant
        self.layers = {name: layer for members in by_task.values() for name, layer in members.items()}
        # Now: while gradients are blocked other tensors are in their place.
        self.parameters = parameters_of_all(self.layers.values())
        self.task: str | None = None
        self.batches = 0
        self._shadow, self._blocked = ExitStack(), ExitStack()
        self._shadow_changes: list[Change] = []
        self._guard = RecomputationGuard(lambda name: name in self._by_task.get(self.task, {}))

    def switch(self, task: str | None) -> list[Change]:
        """Freeze the layers of a task instead of those of the last one; return what was done to the last one's.

        Raises:
            ExchangeError: If another exchange that began inside the last task has not ended.
        """
        if task == self.task:
            return []
        self.unblock_gradients()
        self._shadow.close()
        left = self._by_task.get(self.task, {})
        self._guard.watch(left, self.task)
        for layer in left.values():
            release(layer, self._owner, as_found=True)
        changes, self._shadow_changes, self.task = self._shadow_changes, [], task
        members = self._by_task.get(task)
        if members:
            self.batches += 1
            if self._stats:
                # Another session may have frozen a layer for the same task: its shadow serves both.
                own = {name: layer for name, layer in members.items() if "shadow_statistics" not in holders_of(layer)}
                self._shadow_changes = self._shadow.enter_context(shadow_statistics(own))
                for layer in members.values():
                    pin_in_eval(layer, self._owner, constant=self._constant)
            if self._affine:
                self._blocked.enter_context(blocked_gradients(members))
        return changes

    def take_replaced(self, now: Mapping[str, _BatchNorm]) -> dict[str, _BatchNorm]:
        """Take layers that took the place of others of the same name; return these, outside of a batch."""
        new = {name: now[name] for name, layer in self.layers.items() if now.get(name, layer) is not layer}
        self.layers.update(new)
        for task, members in self._by_task.items():
            self._by_task[task] = {name: self.layers[name] for name in members}
        self.parameters = parameters_of_all(self.layers.values())
        return new

    def end_batch(self) -> list[Change]:
        """Freeze for no task; return what was done to the last one's layers."""
        changes = self.switch(None)
        self._guard.end()
        return changes

    def unblock_gradients(self) -> None:
        """Let forwards contribute to all gradients again."""
        self._blocked.close()


def parameters_of_all(layers: Iterable[_BatchNorm]) -> list[nn.Parameter]:
    """Return ``weight`` and ``bias`` of all of them."""
    return [parameter for layer in layers for parameter in affine_parameters(layer)]
