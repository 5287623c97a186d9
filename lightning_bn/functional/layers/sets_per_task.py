"""Which layers have running statistics for each task, so that whoever reads or writes statistics knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import quoted


class SetsPerTask(Protocol):
    """Statistics of several tasks, of which those of one lie in the layers.

    Attributes:
        tasks: Their names.
        default: The task that owns the layers' own tensors, which lie there unless another one runs.
        task_of: Tells the task of a training batch, as a function of it and its index, None where only contexts do;
            None where nobody has said how.
    """

    tasks: tuple[str, ...]
    default: str
    task_of: Callable[[Any, int], str | None] | None

    def in_place(self, task: str) -> AbstractContextManager[None]:
        """Inside, the tensors of a task lie in the layers; nobody is told of it."""

    def at_rest(self, task: str) -> AbstractContextManager[None]:
        """As :meth:`in_place`, with what a task holds outside of its contexts: to be read, or written to."""

    def home_of(self, layer: _BatchNorm, task: str) -> dict[str, Any]:
        """Where a task's tensors of a layer are kept, by the names of the buffers, whichever lie in the layer."""

    def wrote(self, task: str) -> None:
        """The tensors of a task were written to: it goes on from there as an ordinary moving average."""


_of: WeakKeyDictionary[nn.Module, ReferenceType[SetsPerTask]] = WeakKeyDictionary()
"""By layer; a copy of a layer is nobody's."""


def sets_of(layer: nn.Module) -> SetsPerTask | None:
    """The statistics per task that a layer has; None if it has but its own."""
    found = _of.get(layer)
    return None if found is None else found()


def sets_among(layers: Mapping[str, nn.Module]) -> SetsPerTask | None:
    """The statistics per task that some of the layers have; None if none of them has any.

    Raises:
        ValueError: If there are several such objects, whose tasks nothing tells apart.
    """
    found = {name: sets for name, layer in layers.items() if (sets := sets_of(layer)) is not None}
    first = next(iter(found.values()), None)
    others = [name for name, sets in found.items() if sets is not first]
    if first is not None and others:
        raise ValueError(
            f"BatchNorm layer {quoted(others)} has statistics per task of another object than "
            f"{quoted([name for name in found if name not in others])}: select with modules= those of one at a time."
        )
    return first


def homes_of(layers: Iterable[_BatchNorm], sets: SetsPerTask) -> list[dict[str, Any]]:
    """Where all tasks' tensors of those of the layers are kept that have these."""
    return [sets.home_of(layer, task) for layer in layers if sets_of(layer) is sets for task in sets.tasks]


def claim(layers: Iterable[nn.Module], sets: SetsPerTask) -> None:
    """Record that layers have these statistics per task."""
    for layer in layers:
        _of[layer] = ref(sets)


def disclaim(layers: Iterable[nn.Module]) -> None:
    """Record that layers have none any more."""
    for layer in layers:
        _of.pop(layer, None)
