"""What Python objects hold, as deep as it goes, kept and restored."""

from __future__ import annotations

import functools
import io
import multiprocessing.process
import queue
import random
import socket
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_bn.functional._bits import is_plain, same_bits

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, torch.dtype, torch.device)
_MACHINERY = (
    threading.Thread,
    threading.Condition,
    threading.Event,
    threading.Semaphore,
    type(threading.Lock()),
    type(threading.RLock()),
    queue.Queue,
    queue.SimpleQueue,
    multiprocessing.process.BaseProcess,
    socket.socket,
    io.IOBase,
    types.GeneratorType,
    types.CoroutineType,
)
"""What runs or is connected to something that does: it has no state that could be put back."""
_MOST_OBJECTS = 50_000
"""That are looked at: what has more is data."""
_LONG = 1000
"""Of longer containers the order and the members are kept, not what is inside these: they are data."""


@contextmanager
def preserved_object_state(
    roots: Iterable[Any], leave: tuple[type, ...] = (), most_bytes: int | None = None, known: Iterable[Any] = ()
) -> Iterator[None]:
    """Restore at the end what everything that is reachable from ``roots`` held at the beginning.

    Followed are attributes and slots, lists, tuples, dicts, sets and deques of any class, bound methods, partials and
    closures. What is there is restored by identity; of random number generators, tensors and arrays, the state and the
    values. Not followed: what lies at module level, iterators that are no datasets, and machinery: threads, processes,
    locks, queues, files and sockets, or an object that has one of these for an attribute.

    Args:
        roots: Where to begin.
        leave: Instances of these are not looked into.
        known: Objects that somebody else restores: neither kept nor looked into.
        most_bytes: Tensors and arrays larger than this are taken to be data, which nobody writes to; None for no limit.
    """
    state = _ObjectState(leave, most_bytes, known)
    for root in roots:
        state.add(root)
    try:
        yield
    finally:
        state.restore()


class _ObjectState:
    def __init__(self, leave: tuple[type, ...], most_bytes: int | None, known: Iterable[Any]) -> None:
        self._leave = (*_ATOMS, *leave)
        self._most_bytes = most_bytes
        # The objects themselves too, so that no id is used twice.
        self._seen: dict[int, Any] = {id(value): value for value in known}
        # Aliases of known tensors are known too: a state dict that somebody keeps.
        self._known_memory = {_address(value) for value in self._seen.values() if isinstance(value, Tensor)} - {0}
        self._looked_at = 0
        self._restores: list[Callable[[], object]] = []

    def add(self, root: Any) -> None:
        stack = [root]
        while stack:
            value = stack.pop()
            if self._looked_at >= _MOST_OBJECTS:
                return
            if id(value) not in self._seen and not isinstance(value, self._leave) and not _is_machinery(value):
                self._seen[id(value)] = value
                self._looked_at += 1
                stack.extend(self._look_at(value))

    def restore(self) -> None:
        failed: list[Exception] = []
        for restore in self._restores:
            try:
                restore()
            except Exception as error:
                # What comes behind is restored all the same.
                failed.append(error)
        if failed:
            raise failed[0]

    def _look_at(self, value: Any) -> Iterable[Any]:
        """Keep the state of one object; return what it refers to."""
        numpy = sys.modules.get("numpy")
        if isinstance(value, random.SystemRandom):
            return ()
        if isinstance(value, random.Random):
            self._keep(value.setstate, value.getstate())
        elif isinstance(value, torch.Generator):
            self._keep(value.set_state, value.get_state())
        elif isinstance(value, Tensor):
            small = self._most_bytes is None or value.numel() * value.element_size() <= self._most_bytes
            if is_plain(value) and small and _address(value) not in self._known_memory:
                self._keep(functools.partial(_put_values, value), value.detach().clone())
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            # The state's dictionary is made anew at each look.
            self._keep(functools.partial(setattr, value.bit_generator, "state"), value.bit_generator.state)
        elif numpy is not None and isinstance(value, numpy.random.RandomState):
            self._keep(value.set_state, value.get_state())
        elif numpy is not None and isinstance(value, numpy.ndarray):
            if value.flags.writeable and (self._most_bytes is None or value.nbytes <= self._most_bytes):
                self._keep(functools.partial(numpy.copyto, value), value.copy())
        else:
            return self._look_into(value)
        return ()

    def _look_into(self, value: Any) -> Iterable[Any]:
        referred: list[Any] = []
        if isinstance(value, dict):
            self._keep(functools.partial(_put_items, value), list(value.items()))
            referred.extend(value.values() if len(value) <= _LONG else ())
        elif isinstance(value, list):
            self._keep(functools.partial(list.__setitem__, value, slice(None)), list(value))
            referred.extend(value if len(value) <= _LONG else ())
        elif isinstance(value, set | deque):
            self._keep(functools.partial(_put_members, value), list(value))
            referred.extend(value if len(value) <= _LONG else ())
        elif isinstance(value, tuple):
            referred.extend(value if len(value) <= _LONG else ())
        elif isinstance(value, types.MethodType):
            return (value.__self__, value.__func__)
        elif isinstance(value, types.FunctionType):
            full = [cell for cell in value.__closure__ or () if _is_full(cell)]
            for cell in full:
                self._keep(functools.partial(setattr, cell, "cell_contents"), cell.cell_contents)
            referred += [*(cell.cell_contents for cell in full), value.__defaults__, value.__kwdefaults__]
        elif isinstance(value, functools.partial):
            return (value.func, value.args, value.keywords)
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._keep(functools.partial(_put_items, attributes), list(attributes.items()))
            referred.extend(attributes.values())
        referred.extend(self._look_at_slots(value))
        return referred

    def _look_at_slots(self, value: Any) -> Iterator[Any]:
        for kind in type(value).__mro__:
            for slot in vars(kind).values():
                if isinstance(slot, types.MemberDescriptorType) and slot.__objclass__ is kind and _is_python(kind):
                    try:
                        held = slot.__get__(value)
                    except AttributeError:
                        self._keep(functools.partial(_unset, value, slot), None)
                        continue
                    self._keep(functools.partial(slot.__set__, value), held)
                    yield held

    def _keep(self, restore: Callable[[Any], object], state: Any) -> None:
        self._restores.append(functools.partial(restore, state))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) else 0


def _is_machinery(value: Any) -> bool:
    if isinstance(value, _MACHINERY) or (hasattr(type(value), "__next__") and not isinstance(value, Dataset)):
        return True
    attributes = getattr(value, "__dict__", None)
    return isinstance(attributes, dict) and any(isinstance(held, _MACHINERY) for held in attributes.values())


def _is_python(kind: type) -> bool:
    """Whether a class was made by a class statement: slots of C types are no business of ours."""
    return bool(kind.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # an empty cell raises
    except ValueError:
        return False
    return True


def _unset(value: Any, slot: types.MemberDescriptorType, _: None) -> None:
    with suppress(AttributeError):
        slot.__delete__(value)


def _put_values(tensor: Tensor, values: Tensor) -> None:
    if tensor.shape != values.shape:
        # Its data were replaced by others: a memory bank that grows.
        tensor.data = values
    elif not same_bits(tensor, values):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(values)


def _put_items(mapping: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    # Past what a subclass may make of it (Counter.update adds); an OrderedDict keeps a list of its own.
    if len(mapping) == len(items) and all(
        now == key and found is value for (now, found), (key, value) in zip(mapping.items(), items, strict=True)
    ):
        return
    kind = OrderedDict if isinstance(mapping, OrderedDict) else dict
    kind.clear(mapping)
    for key, value in items:
        kind.__setitem__(mapping, key, value)


def _put_members(members: Any, values: list[Any]) -> None:
    members.clear()
    (members.update if isinstance(members, set) else members.extend)(values)
