"""Averages of the weights that WeightAveraging keeps beside the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_bn.callbacks._lightning.callback_list import callbacks_of
from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer

_MOVES = ("_swap_models", "_copy_average_to_current")
_AVERAGES = ("WeightAverag", "EMA", "SWA")


def averaged_copies(trainer: Trainer) -> list[tuple[nn.Module, bool]]:
    """Averages of the module that WeightAveraging callbacks keep beside it, and whether each has been updated yet."""
    copies = []
    for callback in callbacks_of(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            copies.append((average.module, bool(average.n_averaged)))
    return copies


def averaging_callbacks(trainer: Trainer) -> tuple[list[Any], list[str]]:
    """Callbacks that keep averages as WeightAveraging does, and class names of those that keep them in other ways."""
    callbacks = callbacks_of(trainer)
    known = [callback for callback in callbacks if isinstance(getattr(callback, "_average_model", None), AveragedModel)]
    known = [callback for callback in known if all(hasattr(callback, name) for name in _MOVES)]
    names = {type(other).__name__ for other in callbacks if other not in known}
    return known, sorted(name for name in names if any(word in name for word in _AVERAGES))


class AveragesBeside:
    """Averages of further tensors, at the moments and by the functions by which WeightAveraging averages the module's.

    Args:
        callback: A WeightAveraging callback that has an average.
        tensors: Returns the tensors as a module's buffers, in the same order at each call.
    """

    def __init__(self, callback: Any, tensors: Callable[[], nn.Module]) -> None:
        self._callback, self._tensors = callback, tensors
        model: AveragedModel = callback._average_model
        self._averaged = model
        place = next(iter(model.module.parameters())).device
        average, several = model.avg_fn, model.multi_avg_fn
        self.average = AveragedModel(
            tensors(), device=place, avg_fn=average, multi_avg_fn=several, use_buffers=model.use_buffers
        )
        beside = {"_swap_models": self._swap, "_copy_average_to_current": self._copy}
        self._wrapped = [(callback, name, act) for name, act in beside.items()]
        self._wrapped.append((model, "update_parameters", self._update))
        for owner, name, act in self._wrapped:
            vars(owner)[name] = _And(getattr(owner, name), act)

    def end(self) -> None:
        """Average no more."""
        for owner, name, _ in self._wrapped:
            vars(owner).pop(name, None)

    def _update(self) -> None:
        if self._averaged.use_buffers:
            self.average.update_parameters(self._tensors())
        else:
            # As it keeps the module's buffers then.
            _copy(self._tensors(), self.average.module)
            self.average.n_averaged += 1

    def _swap(self) -> None:
        _swap(self._tensors(), self.average.module)

    def _copy(self) -> None:
        _copy(self.average.module, self._tensors())


class _And:
    """A method, and what is done right after it."""

    def __init__(self, method: Callable[..., Any], act: Callable[[], object]) -> None:
        self._method, self._act = method, act

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        self._act()
        return result


@contextmanager
def averages_in_place(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside, the average that WeightAveraging keeps and the module have changed places, as they do in validation."""
    callbacks = [callback for callback in averaging_callbacks(trainer)[0] if callback._average_model.n_averaged]
    for callback in callbacks[:1]:
        callback._swap_models(module)
    try:
        yield
    finally:
        for callback in callbacks[:1]:
            callback._swap_models(module)


def _copy(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for buffer, other in zip(target.buffers(), source.buffers(), strict=True):
            buffer.copy_(other)


def _swap(module: nn.Module, copy: nn.Module) -> None:
    pairs = zip(chain(module.parameters(), module.buffers()), chain(copy.parameters(), copy.buffers()), strict=True)
    for mine, other in pairs:
        kept = mine.data.clone()
        mine.data.copy_(other.data)
        other.data.copy_(kept)


def averaging_names(trainer: Trainer) -> list[str]:
    """Class names of the callbacks that average weights, but for Lightning's SWA, which ends with statistics anew."""
    found = []
    for callback in callbacks_of(trainer):
        bases = [base.__name__ for base in type(callback).__mro__]
        averages = any(word in base for base in bases for word in _AVERAGES)
        if averages and "StochasticWeightAveraging" not in bases:
            found.append(type(callback).__name__)
    return found
