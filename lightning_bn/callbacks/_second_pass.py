"""A second pass over training's loaders that leaves no trace on the running epoch."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_bn.callbacks._lightning import MisconfigurationException, Trainer, combined, train_loaders
from lightning_bn.functional.undisturbed import preserved_rng

_MUST_NOT_BE_COPIED = ("dataset", "data_source")


@contextmanager
def second_pass(trainer: Trainer, most: int) -> Iterator[Iterator[Any]]:
    """At most ``most`` batches, and no more than an epoch has, from clones of the Trainer's training loaders.

    The clones share the datasets and have samplers, generators and iterators of their own, so that the running epoch
    goes on as if nothing had happened; the random number generators, those that datasets hold included, are afterwards
    as they were. Clones live as long as the context: loaders may be replaced between epochs.

    Raises:
        MisconfigurationException: If a loader cannot be cloned.
    """
    loaders, mode = train_loaders(trainer)
    limit = min(float(most), trainer.num_training_batches)
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        for dataset in _datasets(loaders):
            stack.enter_context(_preserved_own_rng(dataset))
        clones = tree_map(_clone, loaders)
        yield islice(stack.enter_context(combined(clones, mode)), int(limit))


def _clone(loader: Any) -> Any:
    """A loader over the same data that shares no iteration state with ``loader``."""
    if isinstance(loader, DataLoader):
        return _clone_dataloader(loader)
    if iter(loader) is loader:
        raise MisconfigurationException(
            f"the training loader is a {type(loader).__name__} that can be iterated only once, so that a second pass "
            f"over it would take batches from training: give the Trainer a DataLoader."
        )
    return copy.copy(loader)


def _clone_dataloader(loader: DataLoader[Any]) -> DataLoader[Any]:
    clone = copy.copy(loader)
    # Copied together, so that what they share (a generator, the sampler inside the batch sampler) stays shared; the
    # data that samplers point to is not copied.
    state = {name: loader.__dict__.get(name) for name in ("sampler", "batch_sampler", "generator")}
    memo = {id(shared): shared for part in state.values() for shared in _data_below(part)}
    memo[id(loader.dataset)] = loader.dataset
    # Through __dict__: a DataLoader refuses such changes after construction, on itself and so on its copy.
    clone.__dict__.update(copy.deepcopy(state, memo))
    clone.__dict__["_iterator"] = None
    clone.__dict__["persistent_workers"] = False
    if isinstance(loader.dataset, IterableDataset) and loader.num_workers == 0:
        # Its __iter__ may keep its position on itself; workers have copies anyway.
        clone.__dict__["dataset"] = copy.copy(loader.dataset)
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


def _datasets(loaders: Any) -> list[Any]:
    found: list[Any] = []
    # With workers a dataset's generators live in copies.
    tree_map(
        lambda loader: (
            found.append(loader.dataset) if isinstance(loader, DataLoader) and loader.num_workers == 0 else None
        ),
        loaders,
    )
    return found


@contextmanager
def _preserved_own_rng(dataset: Any) -> Iterator[None]:
    """The random number generators that a dataset or its transforms hold are afterwards as they were."""
    found = list(_generators(dataset, set()))
    states = [_get_state(generator) for generator in found]
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            _set_state(generator, state)


def _generators(value: Any, seen: set[int], depth: int = 8) -> Iterator[Any]:
    """Generators reachable from a dataset through attributes, lists, tuples and dicts."""
    if id(value) in seen or depth == 0:
        return
    seen.add(id(value))
    if isinstance(value, random.Random | np.random.RandomState | np.random.Generator | torch.Generator):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _generators(item, seen, depth - 1)
    elif isinstance(value, list | tuple) and len(value) < 1000:
        # Longer ones are data, not transforms.
        for item in value:
            yield from _generators(item, seen, depth - 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.Tensor):
        yield from _generators(vars(value), seen, depth - 1)


def _get_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
