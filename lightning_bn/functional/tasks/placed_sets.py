"""Sets of running statistics for tasks, and which of them lies in the layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import counted, named, quoted
from lightning_bn.functional.layers.exchange import COLLECTING, Entries, exchanged, holders_of, is_held
from lightning_bn.functional.layers.selection import LayerSelection, batch_norm_layers
from lightning_bn.functional.layers.sets_per_task import SetsPerTask, claim, disclaim, sets_of
from lightning_bn.functional.layers.torch_private import buffers_of, child_of, children_of
from lightning_bn.functional.tasks.state_dicts import DefaultInStateDicts
from lightning_bn.functional.tasks.task_sets import Buffers, buffers_in, copies

_HOLDER = "task_statistics"


class PlacedSets:
    """Tensors of each task, by layer; the default's are the layers' own objects.

    Args:
        model: Where the layers are.
        selection: Which.
        default: The task of the layers' own tensors.
        owner: Who is asked for the layers' statistics by others.

    Attributes:
        model: Where the layers are.
        layers: By name.
        default: The task of the layers' own tensors.
        sets: By task.

    Raises:
        SelectionError: If a selected layer has no running statistics.
        RuntimeError: If a layer has such sets already.
    """

    def __init__(self, model: nn.Module, selection: LayerSelection, default: str, owner: SetsPerTask) -> None:
        self.layers, self.default = selection.tracked_layers(model), default
        self.model, self._selection, self._owner = model, selection, owner
        self._stack: list[str] = []
        self._by_row: list[int] = []
        self._exchanges: dict[str, exchanged] = {}
        self._state_dicts = DefaultInStateDicts({}, lambda: None, self.see_own)
        self.sets: dict[str, dict[str, Buffers]] = {
            default: {name: buffers_in(layer) for name, layer in self.layers.items()}
        }
        self.attach()
        self.see_own()

    @property
    def own(self) -> dict[str, Buffers]:
        """The layers' own tensors."""
        return self.sets[self.default]

    @property
    def stack(self) -> tuple[str, ...]:
        """Tasks whose tensors were put in place, the last one on top."""
        return tuple(self._stack)

    @property
    def running(self) -> str:
        """The task whose tensors lie in the layers."""
        return self._stack[-1] if self._stack else self.default

    @property
    def depth(self) -> int:
        """How many tasks were put in place, one on top of the other."""
        return len(self._stack)

    def is_on_top(self, task: str) -> bool:
        """Whether a task was put in place last, and nothing by row since."""
        return self._stack[-1:] == [task] and self._by_row[-1:] != [self.depth]

    @contextmanager
    def by_row(self) -> Iterator[None]:
        """As :meth:`in_place` of the default, for forwards that look for each row's tensors themselves."""
        with self.in_place(self.default):
            self._by_row.append(self.depth)
            try:
                yield
            finally:
                self._by_row.pop()

    def all_layers(self) -> tuple[str, ...]:
        """Return names of all BatchNorm layers of the model."""
        return tuple(batch_norm_layers(self.model))

    def home_of(self, layer: _BatchNorm, task: str) -> Buffers:
        """Return the dictionary that holds a task's tensors of a layer."""
        return self.sets[task][self._names[layer]]

    def copy(self, task: str) -> dict[str, Buffers]:
        """Return copies of a task's tensors."""
        self.resolve()
        return copies(self.sets[task])

    def put(self, task: str, sets: dict[str, Buffers] | None) -> None:
        """Take these tensors as a task's; None for a task that is no more."""
        self._exchanges.pop(task, None)
        if sets is None:
            del self.sets[task]
        else:
            self.sets[task] = sets

    @contextmanager
    def in_place(self, task: str) -> Iterator[None]:
        """Inside, a task's tensors lie in the layers; what others put over them, as ``.to()`` does, is the task's then.

        Not in layers whose statistics are being collected: their forwards neither read nor move any.

        Raises:
            ExchangeError: At the end, if another exchange lies on top in one of the layers.
        """
        self.resolve()
        sets, exchange = self.sets[task], self._exchange_for(task)
        self._exchanges.pop(task, None)  # not again while it is in use
        found: dict[str, Buffers] = {}
        self._stack.append(task)
        try:
            with exchange:
                try:
                    yield
                finally:
                    if not self._lie_there(sets):
                        # What is lent to a layer goes back by itself, or is an error at the end.
                        found = {
                            name: sets[name] if _lent(layer) else buffers_in(layer)
                            for name, layer in self.layers.items()
                        }
        finally:
            self._stack.pop()
            if self.sets.get(task) is sets and len(exchange) == len(self.layers):
                self._exchanges[task] = exchange
            if found:
                self._adopt(task, found)

    def _exchange_for(self, task: str) -> exchanged:
        """One that is not in use, and used again if nothing has changed since."""
        names = [name for name, layer in self.layers.items() if is_held(layer) and COLLECTING in holders_of(layer)]
        sets = self.sets[task]
        if task in self._exchanges and not names:
            return self._exchanges[task]
        entries = [Entries(name, layer, buffers=sets[name]) for name, layer in self.layers.items() if name not in names]
        return exchanged(_HOLDER, entries)

    def _lie_there(self, sets: Mapping[str, Buffers]) -> bool:
        """Whether these tensors lie in the layers, or what somebody else has put in their place."""
        for home, one in zip(self._homes, sets.values(), strict=True):
            if home.get("running_mean") is not one["running_mean"]:
                return all(
                    buffers_of(layer).get("running_mean") is sets[name]["running_mean"] or _lent(layer)
                    for name, layer in self.layers.items()
                )
        return True

    def resolve(self) -> None:
        """Look whether the layers are the model's and hold the tensors that they ought to; if not, take what is there.

        Raises:
            ValueError: If a layer has gone or has other channels now.
        """
        for children, key, child in self._edges:  # plain loops: this runs at every switch
            if children.get(key) is not child:
                break
        else:
            if self._lie_there(self.sets[self.running]):
                return
        layers = self._selection.tracked_layers(self.model)
        for name, own in self.own.items():
            size = layers[name].num_features if name in layers else None
            if size != len(own["running_mean"]):
                there = "is no longer in the model" if size is None else f"has {counted(size, 'channel')} now"
                raise ValueError(
                    f"BatchNorm layer {named(name)} {there}, but its statistics per task have "
                    f"{len(own['running_mean'])}: call release() before you change the model."
                )
        self.detach()
        self.layers = {name: layers[name] for name in self.layers}
        self.attach()
        self._adopt(self.running, {name: buffers_in(layer) for name, layer in self.layers.items()})

    def attach(self) -> None:
        """Have the layers known as those of these sets.

        Raises:
            RuntimeError: If a layer has others.
        """
        others = (None, self._owner)
        taken = [name for name, layer in self.layers.items() if not any(sets_of(layer) is one for one in others)]
        if taken:
            raise RuntimeError(
                f"BatchNorm layer {quoted(taken)} has statistics per task already: call release() on those first, or "
                "leave the layer out with exclude."
            )
        claim(self.layers.values(), self._owner)
        self._edges = list(_edges_to(self.model, self.layers.values()))
        self._homes = [buffers_of(layer) for layer in self.layers.values()]
        self._exchanges, self._names = {}, {layer: name for name, layer in self.layers.items()}
        self._state_dicts.remove()
        self._state_dicts = DefaultInStateDicts(self.layers, lambda: self.own if self._stack else None, self.see_own)

    def detach(self) -> None:
        """Leave no trace on the layers."""
        self._state_dicts.remove()
        disclaim(layer for layer in self.layers.values() if sets_of(layer) is self._owner)

    def moved_outside(self) -> list[str]:
        """Return layers whose own statistics a forward in train mode has moved since :meth:`see_own`."""
        return [name for name, now, then in zip(self.own, self._versions(), self._seen, strict=True) if now != then]

    def see_own(self) -> None:
        """Take what the layers' own statistics are now as seen."""
        self._seen = self._versions()

    def _versions(self) -> list[int]:
        """How often each layer's own counter was written to, which every forward in train mode does."""
        counters = (own.get("num_batches_tracked") for own in self.own.values())
        return [0 if counter is None else counter._version for counter in counters]

    def _adopt(self, task: str, found: Mapping[str, Buffers]) -> None:
        """Take tensors that others put into the layers as a task's, and move those of all tasks to where they are."""
        warnings.warn(
            f"tensors of {counted(len(found), 'BatchNorm layer')} with statistics per task were replaced (by .to(), "
            f".half(), a conversion, ...): the statistics of the tasks {', '.join(self.sets)} were converted in the "
            "same way.",
            UserWarning,
            stacklevel=5,
        )
        for other, sets in self.sets.items():
            for name, one in sets.items():
                # In the dictionaries that others know.
                one.update(found[name] if other == task else _moved(one, found[name]))
        for name, layer in self.layers.items():
            buffers_of(layer).update(self.sets[self.running][name])
        self.see_own()


def _lent(layer: nn.Module) -> bool:
    """Whether somebody else has put something in the layer's place."""
    return any(holder != _HOLDER for holder in holders_of(layer))


def _moved(one: Buffers, like: Buffers) -> Buffers:
    """A set in the dtypes and on the devices of another, which may lack some."""
    with torch.inference_mode(False), torch.no_grad():
        return {key: buffer.to(like[key]) for key, buffer in one.items() if key in like}


def _edges_to(
    model: nn.Module, layers: Iterable[nn.Module]
) -> Iterator[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    """Every step on the way to one of the layers: a module's submodules, a name in it, and what has it."""
    wanted, seen = {id(layer) for layer in layers}, set[tuple[int, str]]()
    for path, module in model.named_modules(remove_duplicate=False):
        parent: nn.Module | None = model
        for key in path.split(".") if path and id(module) in wanted else ():
            child = None if parent is None else child_of(parent, key)
            if parent is not None and child is not None and (id(parent), key) not in seen:
                seen.add((id(parent), key))
                yield children_of(parent), key, child
            parent = child
