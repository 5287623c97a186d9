"""Averages of every task's statistics, beside those that WeightAveraging keeps of the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_bn.callbacks._lightning.averages import AveragesBeside, averaging_callbacks
from lightning_bn.callbacks._lightning.namespaces import Trainer, rank_zero_warn
from lightning_bn.functional._text import quoted
from lightning_bn.functional.tasks.bank import TaskStatistics
from lightning_bn.functional.tasks.task_sets import Buffers


class TaskAverages:
    """Sets of all tasks but the default's, averaged, swapped and copied as the module's buffers are.

    In a file of averaged weights ``sets`` are the averages, and ``current_sets`` what training goes on with.

    Args:
        trainer: Of the fit.
        bank: The statistics.
    """

    def __init__(self, trainer: Trainer, bank: TaskStatistics) -> None:
        self._bank = bank
        known, others = averaging_callbacks(trainer)
        if others or len(known) > 1:
            names = others or [type(callback).__name__ for callback in known[1:]]
            rank_zero_warn(
                f"TaskBatchNorm: {quoted(names)} averages only the statistics of the default task {bank.default!r}: "
                "those of the other tasks are not averaged with the weights. PreciseBatchNorm, or a recalibration of "
                "the averaged weights, gives each task the right statistics."
            )
        self._beside = AveragesBeside(known[0], lambda: _Sets(bank)) if known else None

    def end(self) -> None:
        """Average no more."""
        if self._beside is not None:
            self._beside.end()

    def parts(self) -> list[tuple[str, dict[str, Buffers]]]:
        """Return tasks and averages by layer, the very tensors."""
        if self._beside is None:
            return []
        averages = iter(self._beside.average.module.buffers())
        return [
            (task, {name: {key: next(averages) for key in one} for name, one in sets.items()})
            for task, sets in _others(self._bank)
        ]

    def added_to(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state of the statistics with the averages in it."""
        if self._beside is None:
            return state
        averages = {
            task: {f"{name}.{key}": buffer for name, one in sets.items() for key, buffer in one.items()}
            for task, sets in self.parts()
        }
        return {
            **state,
            "sets": averages,
            "current_sets": state["sets"],
            "averaged": int(self._beside.average.n_averaged),
        }

    def current(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a saved state whose sets are what training goes on with, where averages are kept beside it."""
        there = self._beside is not None and "current_sets" in state
        return {**state, "sets": state["current_sets"]} if there else state

    def load(self, state: Mapping[str, Any]) -> None:
        """Take averages that were saved; those of new tasks begin with their statistics."""
        if self._beside is None:
            return
        current = "current_sets" in state
        with torch.no_grad():
            for (task, sets), (_, now) in zip(self.parts(), _others(self._bank), strict=True):
                saved = state["sets"].get(task) if current else None
                for name, one in sets.items():
                    for key, buffer in one.items():
                        buffer.copy_(now[name][key] if saved is None else saved[f"{name}.{key}"])
        self._beside.average.n_averaged.fill_(state.get("averaged", 0))


def _others(bank: TaskStatistics) -> list[tuple[str, dict[str, Buffers]]]:
    return [(task, sets) for task, sets in bank.parts() if task != bank.default]


class _Sets(nn.Module):
    """The sets as buffers."""

    def __init__(self, bank: TaskStatistics) -> None:
        super().__init__()
        tensors = [buffer for _, sets in _others(bank) for one in sets.values() for buffer in one.values()]
        for index, tensor in enumerate(tensors):
            self.register_buffer(str(index), tensor)
