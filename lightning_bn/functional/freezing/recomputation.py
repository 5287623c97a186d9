"""Forwards that the backward runs again, as activation checkpointing does, when what they were frozen for has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.functional._tasks import RecomputationError
from lightning_bn.functional._text import named
from lightning_bn.functional.layers.torch_private import in_backward


class RecomputationGuard:
    """Watches layers that were frozen for a part of a step, until the end of the batch.

    Args:
        is_frozen: Whether a layer, by name, is frozen now.
    """

    def __init__(self, is_frozen: Callable[[str], bool]) -> None:
        self._is_frozen = is_frozen
        self._hooks: dict[str, RemovableHandle] = {}

    def watch(self, layers: Mapping[str, _BatchNorm], task: str | None) -> None:
        """From now on an error is raised where the backward runs one of these layers and it is not frozen."""
        for name, layer in layers.items():
            if name not in self._hooks:
                self._hooks[name] = layer.register_forward_pre_hook(partial(self._refuse, name, task))

    def end(self) -> None:
        """Leave no hook behind."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def _refuse(self, name: str, task: str | None, _: nn.Module, __: Any) -> None:
        if in_backward() and not self._is_frozen(name):
            raise RecomputationError(
                f"BatchNorm layer {named(name)} was frozen for task {task!r} in the forward. The backward runs that "
                "forward again (activation checkpointing) after the context of the task has ended, where the layer "
                "is not frozen: its statistics would move, and gradients would be wrong. Call the backward inside "
                "the context, or label the batch (task_key=)."
            )
