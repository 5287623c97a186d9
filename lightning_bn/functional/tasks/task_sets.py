"""The tensors of one task, and the average that a task which has just begun keeps of what it has seen."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.exchange import COLLECTING, holders_of
from lightning_bn.functional.layers.torch_private import STATISTICS, buffers_of

MIXTURE = "mixture"
"""All tasks together."""
Buffers = dict[str, Tensor]
"""A layer's running statistics by the names of its buffers; only those that are there."""


def buffers_in(layer: _BatchNorm) -> Buffers:
    """The very tensors that lie in a layer."""
    own = buffers_of(layer)
    return {key: buffer for key in STATISTICS if (buffer := own.get(key)) is not None}


def copies(sets: Mapping[str, Buffers]) -> dict[str, Buffers]:
    """Copies with memory of their own: a view that is saved carries all of its storage."""
    with torch.no_grad():
        return {name: {key: buffer.detach().clone() for key, buffer in one.items()} for name, one in sets.items()}


@torch.no_grad()
def write_sets(sets: Mapping[str, Buffers], into: Mapping[str, Buffers]) -> None:
    """Write the values of tensors by layer into others, those that are there."""
    for name, one in into.items():
        for key, buffer in one.items():
            buffer.copy_(sets[name][key])


def checked_tasks(tasks: Sequence[str]) -> list[str]:
    """Return the names of tasks.

    Raises:
        ValueError: If there is none, one is given twice, or one is no string, empty, or ``"mixture"``.
    """
    names: list[Any] = [tasks] if isinstance(tasks, str) else list(tasks)
    why = [f"{name!r} is no name of one" for name in names if not isinstance(name, str) or name in ("", MIXTURE)]
    why += [f"{name!r} is there twice" for name in names if names.count(name) > 1]
    if why or not names:
        raise ValueError(
            f"tasks={tasks!r}: {why[0] if why else 'none is given'}. Give each a name of its own, a string that is not "
            f"empty; {MIXTURE!r} means all tasks together."
        )
    return names


def check_known(task: str, tasks: Sequence[str], where: str = "") -> None:
    """Raise unless ``task`` is one of ``tasks``; ``where`` follows its name.

    Raises:
        ValueError: With the tasks that there are, and the closest.
    """
    if task not in tasks:
        close = difflib.get_close_matches(str(task), tasks, n=1)
        hint = f" Closest: {close[0]!r}." if close else ""
        raise ValueError(f"there is no task {task!r}{where}, but {', '.join(map(repr, tasks)) or 'none'}.{hint}")


@dataclass
class Beginning:
    """A moving average that begins as an average: of its first ``1 / momentum`` updates each counts the same.

    The n-th update has the weight ``max(momentum, 1 / n)``. The layer itself updates with its ``momentum``; what it did
    is weighed anew afterwards, so that nothing about the layer, or about a compiled graph, is another one meanwhile.
    Several updates in one context count as the layer averaged them.

    Attributes:
        before: What the sets held when the context began, by layer; empty outside of one.
        grown: Layers that have had enough updates.
    """

    before: dict[str, Buffers] = field(default_factory=dict)
    grown: set[str] = field(default_factory=set)

    def begin(self, sets: Mapping[str, Buffers], layers: Mapping[str, _BatchNorm]) -> None:
        """Remember the sets of the layers in train mode that have not had enough updates."""
        self.before = copies(
            {name: sets[name] for name, layer in layers.items() if name not in self.grown and _averages(layer)}
        )
        with torch.no_grad():
            for name, updates in zip(self.before, _counts(self.before.values()), strict=True):
                if not updates:
                    # What the first batch replaces would only round it off.
                    sets[name]["running_mean"].data.zero_()
                    sets[name]["running_var"].data.zero_()

    def end(self, sets: Mapping[str, Buffers], layers: Mapping[str, _BatchNorm]) -> bool:
        """Weigh anew what was updated since; return whether all layers have had enough updates."""
        before, self.before = self.before, {}
        done, now = _counts(before.values()), _counts(sets[name] for name in before)
        with torch.no_grad():
            for (name, old), seen, after in zip(before.items(), done, now, strict=True):
                momentum, updates = float(layers[name].momentum or 0), after - seen
                weight = 1 - (1 - momentum) ** updates
                wanted = max(weight, updates / after) if after else 0.0
                for key in ("running_mean", "running_var"):
                    # A backward to come has saved the tensor, which it does not read in train mode: no new version.
                    new, was = sets[name][key].data, old[key]
                    if not updates:
                        # As it was, unless somebody else wrote to it.
                        new.copy_(new if seen or new.any() else was)
                    elif wanted > weight:
                        start = was.double() if seen else torch.zeros_like(was, dtype=torch.float64)
                        new.copy_(start + (new.double() - start) * (wanted / weight))
                if updates:
                    # Rounding may leave a little below zero.
                    sets[name]["running_var"].data.clamp_(min=0)
                if after * momentum >= 1:
                    self.grown.add(name)
        return all(name in self.grown or layer.num_batches_tracked is None for name, layer in layers.items())


class Beginnings:
    """The tasks that begin, each with its average."""

    def __init__(self, tasks: Iterable[str] = ()) -> None:
        self._of = {task: Beginning() for task in tasks}

    def tasks(self) -> list[str]:
        """Return their names."""
        return list(self._of)

    def add(self, task: str, sets: Iterable[Buffers]) -> None:
        """A task begins, and has seen nothing."""
        self._of[task] = Beginning()
        for one in sets:
            if "num_batches_tracked" in one:
                one["num_batches_tracked"].zero_()

    def drop(self, task: str) -> None:
        """A task goes on as an ordinary moving average, or is no more."""
        self._of.pop(task, None)

    @contextmanager
    def around(
        self, task: str, sets: Callable[[], Mapping[str, Buffers]], layers: Mapping[str, _BatchNorm]
    ) -> Iterator[None]:
        """Weigh anew what is updated inside, the outermost of several contexts of one task."""
        beginning = self._of.get(task)
        if beginning is None or beginning.before:
            yield
            return
        beginning.begin(sets(), layers)
        try:
            yield
        finally:
            if beginning.end(sets(), layers):
                self.drop(task)

    @contextmanager
    def ended(
        self, task: str, sets: Callable[[], Mapping[str, Buffers]], layers: Mapping[str, _BatchNorm]
    ) -> Iterator[None]:
        """Weigh what was updated until now; inside, the sets hold what they would outside of a context."""
        beginning = self._of.get(task)
        running = beginning if beginning is not None and beginning.before else None
        if running is not None:
            running.end(sets(), layers)
        try:
            yield
        finally:
            if running is not None and self._of.get(task) is running:
                running.begin(sets(), layers)


def _averages(layer: _BatchNorm) -> bool:
    """Whether a forward would move a moving average that a count belongs to."""
    updates = bool(layer.training and layer.momentum) and layer.num_batches_tracked is not None
    return updates and COLLECTING not in holders_of(layer)


def _counts(sets: Iterable[Buffers]) -> list[int]:
    """Updates so far, of all layers with one transfer to the host."""
    counters = [one["num_batches_tracked"] for one in sets]
    return torch.stack(counters).tolist() if counters else []
