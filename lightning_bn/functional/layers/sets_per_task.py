"""Which layers have running statistics for each task, so that whoever reads or writes statistics knows all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.selection import batch_norm_layers


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

    def resolve(self) -> None:
        """Look what others have put into the layers, as ``.to()`` does; the sets go along."""

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
            f"the statistics per task of BatchNorm layer {quoted(others)} belong to another object than those of "
            f"{quoted([name for name in found if name not in others])}: select the layers of one object at a time "
            "with modules=."
        )
    return first


def sets_for(model: nn.Module, selected: Mapping[str, nn.Module]) -> SetsPerTask | None:
    """Return the selected layers' statistics per task, or else those that others of the model normalize with.

    Raises:
        ValueError: As for :func:`sets_among`.
    """
    sets = sets_among(selected)
    return sets_among(batch_norm_layers(model)) if sets is None and _of else sets


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


class StatisticsOf:
    """One task's running statistics of a layer, read where they are kept, whichever lie in the layer.

    Nothing is switched: nobody is told, and a set that begins does not take this for an end of its context. Of a task
    that was removed the last ones are read.

    Args:
        layer: Which; it has statistics per task.
        task: One of them.

    Attributes:
        running_mean: As the layer's; those of the last :meth:`look`.
        running_var: As the layer's.
        num_batches_tracked: As the layer's.
        momentum: The layer's.
        eps: The layer's.
        num_features: The layer's.
    """

    def __init__(self, layer: _BatchNorm, task: str) -> None:
        self._layer, self._task = layer, task
        self.running_mean: Tensor | None = None
        self.running_var: Tensor | None = None
        self.num_batches_tracked: Tensor | None = None
        self.momentum, self.eps, self.num_features = layer.momentum, layer.eps, layer.num_features
        self.look()

    @property
    def weight(self) -> Any:
        """The layer's, which tasks share."""
        return self._layer.weight

    def look(self, resolved: SetsPerTask | None = None) -> SetsPerTask | None:
        """Take the tensors that are the task's now.

        Args:
            resolved: Sets that have been resolved a moment ago.

        Returns:
            Those that have been now.
        """
        sets = sets_of(self._layer)
        if sets is not None and sets is not resolved:
            sets.resolve()
        # A layer that was replaced has none any more.
        if sets is not None and sets_of(self._layer) is sets and self._task in sets.tasks:
            home = sets.home_of(self._layer, self._task)
            self.running_mean, self.running_var = home.get("running_mean"), home.get("running_var")
            self.num_batches_tracked = home.get("num_batches_tracked")
        self.momentum, self.eps = self._layer.momentum, self._layer.eps
        return sets

    def is_unseen(self) -> bool:
        """Whether these are values of the default task that no batch has updated yet; waits for the device."""
        sets, counter = sets_of(self._layer), self.num_batches_tracked
        return sets is not None and self._task != sets.default and counter is not None and not int(counter)

    def updates(self) -> int:
        """How often the counter was written to, by every update among others; known without waiting for a device."""
        return 0 if self.num_batches_tracked is None else self.num_batches_tracked._version


Statistics: TypeAlias = _BatchNorm | StatisticsOf
"""What is read of running statistics and of the layer that they are of; a layer has its own."""


def look_again(layers: Iterable[Statistics]) -> None:
    """Have those of them that are a task's take the tensors that are it now."""
    sets: SetsPerTask | None = None
    for layer in layers:
        if isinstance(layer, StatisticsOf):
            sets = layer.look(sets)


def statistics_by_task(
    layers: Mapping[str, _BatchNorm],
) -> tuple[dict[str, Statistics], dict[str, dict[str, Statistics]]]:
    """Return the layers' own statistics, those of the default task, and those of each task of the layers with sets."""
    own: dict[str, Statistics] = {}
    of_tasks: dict[str, dict[str, Statistics]] = {}
    for name, layer in layers.items():
        sets = sets_of(layer)
        own[name] = layer if sets is None else StatisticsOf(layer, sets.default)
        for task in () if sets is None else sets.tasks:
            of_tasks.setdefault(task, {})[name] = StatisticsOf(layer, task)
    return own, of_tasks
