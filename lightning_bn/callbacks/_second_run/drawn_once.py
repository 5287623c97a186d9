"""What can be drawn from only once, such as iterators, queues and files: found below an object, by its path."""

from __future__ import annotations

import functools
import io
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_bn.callbacks._lightning.namespaces import (
    NOT_THE_DATASETS_OWN,
    NOT_THE_MODULES_OWN,
    LightningModule,
    MisconfigurationException,
    rank_zero_warn,
)
from lightning_bn.functional._services import SHARED, is_service
from lightning_bn.functional.layers.torch_private import INTERNAL, attributes_of

CHOICES = (
    "Choose source='recent' (the last batches that training used, for every loader) or "
    "source_method='datamodule.name' or 'module.name' (a method that returns another loader)."
)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, torch.dtype, torch.device, Tensor)
_IN_MEMORY = (io.BytesIO, io.StringIO)
_MOST = 100_000
"""Objects that are looked at below one: what has more is data."""


def is_shared(value: Any) -> bool:
    """Whether a copy of this process has the same file, queue or pipe behind it, and what it takes is gone here."""
    if isinstance(value, io.IOBase):
        return not isinstance(value, _IN_MEMORY) and not value.closed and value.readable()
    return isinstance(value, SHARED)


def is_iterator(value: Any) -> bool:
    """Whether it is a generator or another iterator of Python's own, or one of a DataLoader."""
    own = hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools")
    return own or isinstance(value, _BaseDataLoaderIter)


def held_by(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every object that modules hold beside submodules, weights and buffers, and its path."""
    for prefix, part in module.named_modules():
        for name, value in attributes_of(part).items():
            if name not in INTERNAL:
                yield from below(value, f"self.{prefix}{'.' if prefix else ''}{name}", NOT_THE_MODULES_OWN)


def refuse_drawn_once(module: LightningModule, step: str) -> None:
    """Raise if ``training_step`` could draw from something a second time: an iterator, queue or file of the module's.

    Other steps are chosen by the user, who knows what they do.

    Raises:
        MisconfigurationException: With the path of the attribute.
    """
    for path, value in held_by(module) if step == "training_step" else ():
        if is_shared(value) or is_iterator(value):
            raise MisconfigurationException(
                f"PreciseBatchNorm(step={step!r}): {path} ({type(value).__name__}) gives each item only once: items "
                f"that {step} takes during a recalibration would be missing in training. Choose step='forward' or a "
                "method of your own that runs the network on a batch and does not use it."
            )


def refuse_shared(loaders: Any, path: str) -> None:
    """Raise if something below loaders would be read by a copy of this process at this one's expense.

    Raises:
        MisconfigurationException: With the path of the attribute.
    """
    for where, value in below(loaders, path, NOT_THE_DATASETS_OWN):
        if is_shared(value) or isinstance(value, _BaseDataLoaderIter):
            of = "" if where == path else f" below a {type(loaders).__name__}"
            raise MisconfigurationException(
                f"PreciseBatchNorm: {where} ({type(value).__name__}){of} gives each item only once: a second pass "
                f"would take batches away from training. {CHOICES}"
            )


def below(root: Any, path: str, leave: tuple[type, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield every object that is reachable from ``root``, and its path; nothing is changed.

    Followed are attributes and slots, containers, bound methods, partials, closures and the variables of generators.

    Args:
        root: Where to begin.
        path: What it is called.
        leave: Instances of these are not looked at, nor are modules. Services are, and not what they hold.
    """
    leave = (*_ATOMS, nn.Module, *leave)
    seen: dict[int, Any] = {}
    stack = [(path, root)]
    while stack:
        where, value = stack.pop()
        if id(value) in seen or isinstance(value, leave):
            continue
        seen[id(value)] = value
        if len(seen) > _MOST:
            rank_zero_warn(
                f"PreciseBatchNorm looked for files, queues and iterators in the first {_MOST:,} objects below "
                f"{path}, and not in the rest: a recalibration would take items away from training there."
            )
            return
        yield where, value
        if is_service(value):
            continue
        stack.extend(_members(where, value))


def _members(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", held) for key, held in value.items())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((f"{path}[{index}]", held) for index, held in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield from ((path, value.__self__), (path, value.__func__))
    elif isinstance(value, functools.partial):
        yield from ((path, held) for held in (value.func, value.args, value.keywords))
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((f"{path}:{name}", held) for name, cell in cells for held in _held(cell))
        yield from ((path, held) for held in (value.__defaults__, value.__kwdefaults__))
    elif isinstance(value, types.GeneratorType) and value.gi_frame is not None:
        yield from ((f"{path}:{name}", held) for name, held in value.gi_frame.f_locals.items())
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        # A loader's own, which it begins anew, and what was set, which Lightning may go on recording.
        own = ("_iterator", "__pl_attrs_record") if isinstance(value, DataLoader) else ()
        yield from ((f"{path}.{name}", held) for name, held in attributes.items() if name not in own)
    for kind in filter(_is_python, type(value).__mro__):
        for name, slot in vars(kind).items():
            if isinstance(slot, types.MemberDescriptorType) and hasattr(value, name):
                yield f"{path}.{name}", getattr(value, name)


def _is_python(kind: type) -> bool:
    """Whether a class was made by a class statement: slots of C types are no business of ours."""
    return bool(kind.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE


def _held(cell: types.CellType) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # still empty
        return
