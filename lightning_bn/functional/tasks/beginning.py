"""The average that a task which has just begun keeps of what it has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.functional.layers.exchange import COLLECTING, holders_of
from lightning_bn.functional.layers.torch_private import buffers_of
from lightning_bn.functional.tasks.task_sets import Buffers, copies


class Beginning:
    """A moving average that begins as an average: of its first ``1 / momentum`` updates each counts the same.

    The n-th update has the weight ``max(momentum, 1 / n)``. The layer itself updates with its ``momentum``; what it did
    is weighed anew right after its forward, so that nothing about the layer is another one meanwhile. Inside compiled
    code, which does not run hooks that were added later, it is weighed at the end of the context; several updates
    until then count as the layer averaged them.

    Attributes:
        before: What the sets held after the last update that was weighed, by layer; empty outside of a context.
        grown: Layers that have had enough updates.
    """

    def __init__(self) -> None:
        self.before: dict[str, Buffers] = {}
        self.grown = set[str]()
        self._seen: dict[str, int] = {}
        self._updating: dict[str, int] = {}
        self._hooks: list[RemovableHandle] = []

    def begin(self, sets: Mapping[str, Buffers], layers: Mapping[str, _BatchNorm]) -> None:
        """Follow the layers that have not had enough updates."""
        followed = {name: layer for name, layer in layers.items() if name not in self.grown and _averages(layer)}
        self.before = copies({name: sets[name] for name in followed})
        self._seen = dict(zip(self.before, _counts(self.before.values()), strict=True))
        for name, layer in followed.items():
            self._hooks.append(layer.register_forward_pre_hook(_Hook(self._forward_begins, name, sets[name])))
            self._hooks.append(layer.register_forward_hook(_Hook(self._forward_ended, name, sets[name])))

    def end(self, sets: Mapping[str, Buffers], layers: Mapping[str, _BatchNorm]) -> bool:
        """Weigh what nobody saw; return whether all layers have had enough updates."""
        while self._hooks:
            self._hooks.pop().remove()
        for name in [*self._updating]:
            # Its forward failed.
            self._forward_ended(layers[name], name, sets[name])
        for name, now in zip(self.before, _counts(sets[name] for name in self.before), strict=True):
            if now > self._seen[name]:
                self._weigh(layers[name], name, sets[name], now, self.before[name])
        self.before = {}
        return all(name in self.grown or layer.num_batches_tracked is None for name, layer in layers.items())

    def _forward_begins(self, layer: _BatchNorm, name: str, one: Buffers) -> None:
        if name not in self.before or not layer.training or not layer.momentum:
            return
        if buffers_of(layer).get("running_mean") is not one["running_mean"]:
            return
        self._updating[name] = one["num_batches_tracked"]._version
        if not self._seen[name]:
            # What the first batch replaces would only round it off.
            one["running_mean"].data.zero_()
            one["running_var"].data.zero_()

    def _forward_ended(self, layer: _BatchNorm, name: str, one: Buffers) -> None:
        version = self._updating.pop(name, None)
        if version is None:
            return
        if one["num_batches_tracked"]._version == version:
            # Nothing was updated, as with track_running_stats switched off.
            for key in ("running_mean", "running_var"):
                one[key].data.copy_(self.before[name][key])
            return
        seen, old = self._seen[name], self.before[name]
        start = old if seen else {key: torch.zeros_like(buffer) for key, buffer in old.items()}
        self._weigh(layer, name, one, seen + 1, start)

    def _weigh(self, layer: _BatchNorm, name: str, one: Buffers, now: int, start: Mapping[str, Tensor]) -> None:
        """Give what moved a set from its start the weight that it ought to have."""
        momentum, updates = float(layer.momentum or 0), now - self._seen[name]
        weight = 1 - (1 - momentum) ** updates
        wanted = max(weight, updates / now)
        with torch.no_grad():
            for key in ("running_mean", "running_var"):
                # A backward to come has saved the tensor, which it does not read in train mode: no new version.
                new = one[key].data
                if wanted > weight:
                    origin = start[key].double()
                    new.copy_(origin + (new.double() - origin) * (wanted / weight))
            # Rounding may leave a little below zero.
            one["running_var"].data.clamp_(min=0)
        self._seen[name] = now
        self.before |= copies({name: one})
        if now * momentum >= 1:
            self.grown.add(name)


class _Hook:
    """A hook of one layer; a copy of the layer takes none along."""

    def __init__(self, act: Callable[..., None] | None = None, *args: Any) -> None:
        self._act, self._args = act, args

    def __call__(self, layer: nn.Module, *_: Any) -> None:
        if self._act is not None and not torch.compiler.is_compiling():
            self._act(layer, *self._args)

    def __deepcopy__(self, memo: object) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return (_Hook, ())


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
