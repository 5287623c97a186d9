"""What runs while contexts come and go within a batch: forwards outside of any, and forwards run again for another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.functional._tasks import RecomputationError
from lightning_bn.functional._text import named
from lightning_bn.functional.layers.exchange import COLLECTING, holders_of, is_held
from lightning_bn.functional.layers.torch_private import may_run_again, running_backward
from lightning_bn.functional.tasks.rows import in_rows


class ForwardWatch:
    """Counts the forwards of layers, by the task that runs, until it ends.

    Activation checkpointing runs forwards again in the backward. A layer that does so more often for a task than it
    ran checkpointed for it has been given those of another one, whose context has ended.

    Args:
        layers: By name.
        running: The task that runs, None for none.

    Attributes:
        layers: By name.
        outside: Layers that ran outside of any task in the batch so far.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], running: Callable[[], str | None]) -> None:
        self.layers, self._running = dict(layers), running
        self.outside: dict[str, None] = {}
        self._known = False
        self._ran, self._again = Counter[tuple[str, str | None]](), Counter[tuple[str, str | None, int]]()
        self._hooks: list[RemovableHandle] = [
            layer.register_forward_pre_hook(_Look(self, name)) for name, layer in layers.items()
        ]

    def begin_batch(self) -> None:
        """Begin to count; before the first batch nobody knows what has run in it already."""
        self._known = True
        self._ran.clear()
        self._again.clear()
        self.outside.clear()

    def end(self) -> None:
        """Watch no more."""
        while self._hooks:
            self._hooks.pop().remove()

    def sees(self, name: str) -> None:
        """Count a forward of a layer.

        Raises:
            RecomputationError: If the backward runs one that was another task's.
        """
        task, backward = self._running(), running_backward()
        if backward is None:
            self._ran[name, task] += may_run_again()
            if task is None:
                self.outside[name] = None
            return
        self._again[name, task, backward] += 1
        if self._known and self._again[name, task, backward] > self._ran[name, task]:
            others = [repr(other) for (layer, other), n in self._ran.items() if n and layer == name and other != task]
            raise RecomputationError(
                f"the backward runs the forward of BatchNorm layer {named(name)} again (activation checkpointing) for "
                f"{'no task' if task is None else f'task {task!r}'}, but that forward was of task "
                f"{', '.join(others)}: the wrong statistics would move. Call the backward inside the context of the "
                "task, or label the batch (task_key=)."
            )


class _Look:
    """The hook of one layer; a copy of the layer takes none along."""

    def __init__(self, watch: ForwardWatch | None = None, name: str = "") -> None:
        self._watch, self._name = watch, name

    def __call__(self, layer: nn.Module, _: Any) -> None:
        if self._watch is None or torch.compiler.is_compiling():
            return
        # A recalibration in the middle of a batch is no part of it, and rows have tasks of their own.
        if not in_rows(layer) and not (is_held(layer) and COLLECTING in holders_of(layer)):
            self._watch.sees(self._name)

    def __deepcopy__(self, memo: object) -> _Look:
        return _Look()

    def __reduce__(self) -> tuple[type[_Look], tuple[()]]:
        return (_Look, ())
