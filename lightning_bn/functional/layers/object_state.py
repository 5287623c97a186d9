"""Object state of modules, on copies for a while: what they hold beside weights, buffers and submodules."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from lightning_bn.functional._object_copies import on_copies
from lightning_bn.functional.layers.sets_per_task import sets_of
from lightning_bn.functional.layers.torch_private import INTERNAL, attributes_of, buffers_of, parameters_of

_CONTAINERS = (list, dict, set, deque, Tensor)
_TORCHS = (Optimizer, LRScheduler, DataLoader, Dataset)
_LIGHTNINGS = {"": ("Trainer", "LightningDataModule", "Callback"), ".loggers.logger": ("Logger",)}
"""By the modules of Lightning that define them: nothing of it is imported here."""


@contextmanager
def attributes_on_copies(module: nn.Module, others: Sequence[dict[str, Any]] = ()) -> Iterator[list[Any]]:
    """Inside, modules, their classes and ``others`` hold copies; weights, buffers and submodules are themselves.

    Yields what could not be copied.

    Args:
        module: Whose attributes and those of its submodules.
        others: Further dictionaries.
    """
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    leave = _not_the_modules_own()
    known: list[Any] = [*module.modules(), *module.parameters(), *module.buffers(), *map(sets_of, module.modules())]
    known += [home(part) for part in parts for home in (attributes_of, parameters_of, buffers_of)]
    homes = [*map(attributes_of, parts), *others]
    with _surroundings_on_copies(parts, known, leave), on_copies(homes, known, leave, INTERNAL) as shared:
        yield shared


@contextmanager
def _surroundings_on_copies(
    modules: Sequence[nn.Module], known: Sequence[Any], leave: tuple[type, ...]
) -> Iterator[None]:
    """Inside, containers that the modules' own classes hold, and generators beside these classes, are copies."""
    kinds = dict.fromkeys(kind for part in modules for kind in type(part).__mro__ if not _is_library(kind))
    beside = dict.fromkeys(sys.modules[kind.__module__] for kind in kinds if kind.__module__ in sys.modules)
    held = [
        (owner, name, value)
        for owners, wanted in ((kinds, _CONTAINERS), (beside, _generators()))
        for owner in owners
        for name, value in list(vars(owner).items())
        if isinstance(value, wanted) and not name.startswith("__")
    ]
    home = {str(index): value for index, (_, _, value) in enumerate(held)}
    with on_copies([home], known, leave):
        try:
            for index, (owner, name, _) in enumerate(held):
                setattr(owner, name, home[str(index)])
            yield
        finally:
            for owner, name, value in held:
                setattr(owner, name, value)


def _is_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "torchmetrics", "pytorch_lightning", "lightning", "builtins")


def _not_the_modules_own() -> tuple[type, ...]:
    """Classes of what a module may refer to and does not hold; of Lightning where anybody has imported it."""
    found = [
        getattr(sys.modules.get(f"{namespace}{place}"), name, None)
        for namespace in ("pytorch_lightning", "lightning.pytorch")
        for place, names in _LIGHTNINGS.items()
        for name in names
    ]
    return (*_TORCHS, *(kind for kind in found if kind is not None))


def _generators() -> tuple[type, ...]:
    """Classes of generators of random numbers."""
    numpy = sys.modules.get("numpy")
    of_numpy = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return (random.Random, torch.Generator, *of_numpy)
