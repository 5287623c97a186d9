"""Copies of what Python objects hold, so that a run may do with them what it likes."""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_bn.functional._bits import is_plain
from lightning_bn.functional._services import is_service

_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
_AS_THEY_ARE = (type, types.ModuleType, types.BuiltinFunctionType, weakref.ref, torch.dtype, torch.device)
LARGEST = 1 << 28
"""Bytes of a tensor or array that is copied; a larger one is data, and whoever writes to it is refused."""


@contextmanager
def on_copies(
    homes: Sequence[dict[str, Any]], known: Iterable[Any], leave: tuple[type, ...] = (), skip: Iterable[str] = ()
) -> Iterator[list[Any]]:
    """Inside, these dictionaries hold copies of what they hold; afterwards the very objects that were there before.

    Args:
        homes: For instance the attributes of objects.
        known: Objects that copies refer to as they are, and whose memory is theirs.
        leave: Copies refer to instances of these as they are.
        skip: Keys that somebody else sees to.

    Yields:
        What could not be copied, and is there as it is.

    Raises:
        RuntimeError: At the end, if something was written to a tensor that is too large to be copied.
    """
    skipped = frozenset(skip)
    found = [{key: value for key, value in home.items() if key not in skipped} for home in homes]
    held = [{key: value for key, value in own.items() if type(value) not in _ATOMS} for own in found]
    copier, copies = _copies(held, list(known), leave)
    for home, copy in zip(homes, copies, strict=True):
        home.update(copy)
    try:
        yield copier.uncopied
        copier.check_large()
    finally:
        copier.release()
        for home, own in zip(homes, found, strict=True):
            for key in [key for key in home if key not in own and key not in skipped]:
                del home[key]
            home.update(own)


def _copies(held: list[dict[str, Any]], known: list[Any], leave: tuple[type, ...]) -> tuple[Copier, Any]:
    copier = Copier(known, leave)
    try:
        return copier, copier.copied(held)
    except Exception:
        copier.release()
    # Somebody's own way of being copied fails: what has it is used as it is.
    failing = [value for own in held for value in own.values() if not _can_be_copied(value, known, leave)]
    copier = Copier([*known, *failing], leave)
    copier.uncopied += failing
    return copier, copier.copied(held)


def _can_be_copied(value: Any, known: list[Any], leave: tuple[type, ...]) -> bool:
    copier = Copier(known, leave)
    try:
        copier.copied(value)
    except Exception:
        return False
    finally:
        copier.release()
    return True


class _Itself:
    """Stands for an object that a copy refers to as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Reader(pickle.Unpickler):
    """What a copier wrote, with the objects that are referred to."""

    def __init__(self, file: io.BytesIO, referred: list[Any]) -> None:
        super().__init__(file)
        self._referred = referred

    def persistent_load(self, index: int) -> Any:
        return self._referred[index]


class Copier(pickle.Pickler):
    """Pickles into memory and back; what cannot be pickled, or must not be copied, is referred to as it is."""

    def __init__(self, known: Iterable[Any], leave: tuple[type, ...]) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, protocol=5)
        # The objects themselves too, so that no id is used twice.
        self._known = {id(value): value for value in known}
        self._leave = (*_AS_THEY_ARE, *leave)
        self._memory = {
            value.untyped_storage().data_ptr(): None
            for value in self._known.values()
            if isinstance(value, Tensor) and is_plain(value) and value.numel()
        }
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._referred: list[Any] = []
        self._large: list[tuple[Tensor, int]] = []
        self._locked: list[Any] = []
        self.uncopied: list[Any] = []

    def copied(self, value: Any) -> Any:
        with warnings.catch_warnings():
            # Python 3.12 and 3.13 say so of each; where it has gone, they cannot be copied, and are told of as such.
            warnings.filterwarnings("ignore", ".*support will be removed from itertools", DeprecationWarning)
            self.dump(value)
        self._file.seek(0)
        result = _Reader(self._file, self._referred).load()
        self._file.close()
        return result

    def check_large(self) -> None:
        if any(tensor._version != version for tensor, version in self._large):
            raise RuntimeError(f"a tensor of more than {LARGEST >> 20} MiB that the module holds was written to")

    def release(self) -> None:
        for array in self._locked:
            array.flags.writeable = True

    def persistent_id(self, value: Any) -> int | None:
        if type(value) in _ATOMS:
            return None
        if isinstance(value, _Itself):
            value = value.value
        elif isinstance(value, _BaseDataLoaderIter):
            # A copy of a loader begins anew.
            value = None
        elif is_service(value):
            self.uncopied.append(value)
        elif id(value) not in self._known and not isinstance(value, self._leave) and not _is_stateless(value):
            return None
        self._referred.append(value)
        return len(self._referred) - 1

    def reducer_override(self, value: Any) -> Any:
        itself = (_value, (_Itself(value),))
        if isinstance(value, Tensor):
            return (_value, (_Itself(self._copied_tensor(value)),))
        if isinstance(value, torch.Generator):
            return (_value, (_Itself(value.clone_state()),))
        if _is_array(value) and value.nbytes > LARGEST:
            if value.flags.writeable:
                value.flags.writeable = False
                self._locked.append(value)
            return itself
        if isinstance(value, types.FunctionType):
            return (_function, (_Itself(value), value.__closure__), value.__dict__ or None)
        if isinstance(value, types.MethodType):
            return (types.MethodType, (value.__func__, value.__self__))
        if isinstance(value, types.CellType):
            return (types.CellType, (), _contents(value), None, None, _fill)
        try:
            known_to_pickle: Callable[[Any], Any] | None = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(5) if known_to_pickle is None else known_to_pickle(value)
        except Exception:
            self.uncopied.append(value)
            return itself
        # A string is the name of something global.
        return itself if isinstance(reduced, str) else reduced

    def _copied_tensor(self, value: Tensor) -> Tensor:
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or not is_plain(value):
            self.uncopied.append(value)
            return value
        storage = value.untyped_storage()
        where = storage.data_ptr()
        if where in self._memory and value.numel():
            return value
        if storage.nbytes() > LARGEST:
            self._large.append((value, value._version))
            return value
        if where not in self._storages:
            self._storages[where] = storage.clone()
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        with torch.no_grad():
            copy.set_(self._storages[where], value.storage_offset(), value.size(), value.stride())
        if isinstance(value, nn.Parameter):
            return nn.Parameter(copy, value.requires_grad)
        return copy.requires_grad_(value.requires_grad)


def _is_stateless(value: Any) -> bool:
    return type(value) is types.FunctionType and not value.__closure__ and not value.__dict__


def _is_array(value: Any) -> bool:
    """Whether it is one of numpy's, which is not imported for that."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _value(value: Any) -> Any:
    return value


def _function(original: types.FunctionType, closure: Any) -> types.FunctionType:
    made = types.FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__, closure
    )
    made.__kwdefaults__ = original.__kwdefaults__
    return made


def _contents(cell: types.CellType) -> Any:
    try:
        return (cell.cell_contents,)
    except ValueError:  # still empty
        return None


def _fill(cell: types.CellType, contents: tuple[Any]) -> None:
    cell.cell_contents = contents[0]
