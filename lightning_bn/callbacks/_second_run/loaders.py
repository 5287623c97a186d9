"""A second pass over training's loaders that leaves no trace on the running epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from lightning_bn.callbacks._lightning.loaders import combined, train_loaders
from lightning_bn.callbacks._lightning.namespaces import MisconfigurationException, Trainer
from lightning_bn.callbacks._second_run.object_state import preserved_object_state
from lightning_bn.functional.recalibration.isolation import preserved_rng

_CHOICES = (
    "Choose source='recent' (the last batches that training used, for every loader) or "
    "source_method='datamodule.name' or 'module.name' (a method that returns another loader)."
)
_MOST_BYTES = 1 << 20
"""Of a tensor or array that a dataset holds: larger ones are the data."""
_OWN_ITERATION = ("_iterator", "dataset", "sampler", "batch_sampler")
"""Attributes of a DataLoader that may well be their own iterators; each of them is handled."""
_MUST_NOT_BE_COPIED = ("dataset", "data_source")


@contextmanager
def second_pass(trainer: Trainer, most: int | None) -> Iterator[Iterator[Any]]:
    """Yield at most ``most`` batches, and no more than an epoch has, from clones of the Trainer's training loaders.

    The clones share the datasets and have samplers, generators and iterators of their own, so that the running epoch
    goes on as if nothing had happened; what datasets and their transforms hold, random number generators included, is
    afterwards as it was. Clones live as long as the context: loaders may be replaced between epochs.

    Raises:
        MisconfigurationException: If a loader cannot be cloned.
    """
    loaders, mode = train_loaders(trainer)
    limit = min(float("inf") if most is None else most, trainer.num_training_batches)
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(
            preserved_object_state(_in_this_process(loaders), leave=(DataLoader,), most_bytes=_MOST_BYTES)
        )
        clones = tree_map(_clone, loaders)
        yield islice(stack.enter_context(combined(clones, mode)), None if limit == float("inf") else int(limit))


def _clone(loader: Any) -> Any:
    """A loader over the same data that shares no iteration state with ``loader``."""
    if _is_iterator(loader):
        raise MisconfigurationException(
            f"PreciseBatchNorm(source='train'): the training loader is a {type(loader).__name__} that can be iterated "
            f"only once, so that a second pass over it would take batches from training. {_CHOICES}"
        )
    attributes = getattr(loader, "__dict__", {})
    kept = [name for name, value in attributes.items() if name not in _OWN_ITERATION and _is_iterator(value)]
    if kept:
        raise MisconfigurationException(
            f"PreciseBatchNorm(source='train'): the training loader is a {type(loader).__name__} that keeps an "
            f"iterator of its own in {kept[0]!r}, so that a second pass would take batches from training. {_CHOICES}"
        )
    if isinstance(loader, DataLoader):
        return _clone_dataloader(loader)
    clone = copy.copy(loader)
    for name, value in attributes.items():
        # Somebody's wrapper around a loader.
        if _loads(value):
            setattr(clone, name, _clone(value))
    return clone


def _is_iterator(value: Any) -> bool:
    return hasattr(value, "__next__") and hasattr(value, "__iter__")


def _clone_dataloader(loader: DataLoader[Any]) -> DataLoader[Any]:
    clone = copy.copy(loader)
    # Copied together, so that what they share (a generator, the sampler inside the batch sampler) stays shared; the
    # data that samplers point to is not copied.
    state = {name: loader.__dict__.get(name) for name in ("sampler", "batch_sampler", "generator")}
    memo = {id(shared): shared for part in state.values() for shared in _data_below(part)}
    memo[id(loader.dataset)] = loader.dataset
    # Through __dict__: a DataLoader refuses such changes after construction, on itself and so on its copy.
    try:
        clone.__dict__.update(copy.deepcopy(state, memo))
    except TypeError as error:
        raise MisconfigurationException(
            f"PreciseBatchNorm(source='train'): the training loader's {type(loader.batch_sampler).__name__} over "
            f"{type(loader.sampler).__name__} cannot be copied ({error}), so that a second pass would disturb the "
            f"running epoch. {_CHOICES}"
        ) from error
    clone.__dict__["_iterator"] = None
    clone.__dict__["persistent_workers"] = False
    return clone


def _data_below(sampler: Any, depth: int = 4) -> Iterator[Any]:
    """The datasets that a sampler, or one it wraps, refers to."""
    attributes = getattr(sampler, "__dict__", {})
    for name in _MUST_NOT_BE_COPIED:
        if name in attributes:
            yield attributes[name]
    for name, value in attributes.items():
        if depth and name not in _MUST_NOT_BE_COPIED and "sampler" in name:
            yield from _data_below(value, depth - 1)


def _in_this_process(loaders: Any) -> list[Any]:
    """What runs in this process when batches are loaded; with workers, datasets and transforms live in copies."""
    found: list[Any] = []
    for loader in tree_leaves(loaders):
        if not isinstance(loader, DataLoader):
            found.append(loader)
            found += _in_this_process([held for held in getattr(loader, "__dict__", {}).values() if _loads(held)])
        elif loader.num_workers == 0:
            found += [loader.dataset, loader.collate_fn]
    return found


def _loads(value: Any, depth: int = 3) -> bool:
    """Whether it is a DataLoader, or wraps one (a wrapper of wrappers included)."""
    if isinstance(value, DataLoader):
        return True
    attributes = getattr(value, "__dict__", {})
    return depth > 0 and isinstance(attributes, dict) and any(_loads(held, depth - 1) for held in attributes.values())
