"""The calls that a pickle asks for, rehearsed: none may fill the memory with what the file does not hold.

Reading with ``weights_only=True`` executes nothing that is foreign, and calls what it knows with whatever a file says:
``bytearray(3_000_000_000)`` in one of 400 bytes, or a set of the values of a tensor that repeats one value.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from io import BufferedReader
from typing import Any

_MOST_IN_A_KEY = 100
"""Values in a tuple that is a key: hashing one whose parts are shared takes as long as if they were not."""
_CODECS = ("latin1", "latin-1", "ascii")
_PICKLES = 5
"""In a file of torch before 1.6: three marks, the content, and the order of its tensors."""


class FilledMemoryError(ValueError):
    """A file is made to fill the memory."""


def check_calls(file: BufferedReader[Any], name: str, size: int, most: int) -> None:
    """Raise where reading a pickle would fill the memory with what is not in it.

    Args:
        file: The pickle, or several of them one after the other.
        name: Of the file, for the error.
        size: Of the file in bytes, which its tensors are in.
        most: Values that containers and texts may be made of by all calls together.

    Raises:
        ValueError: Then, or if it is no pickle.
    """
    rehearsal = _Rehearsal(file, size, most)
    try:
        for _ in range(_PICKLES):
            rehearsal.load()
            if file.peek(1)[:1] != b"\x80":
                return
    except FilledMemoryError as error:
        raise FilledMemoryError(f"{name} is made to fill the memory: {error}. It is not read.") from None
    except Exception as error:
        if rehearsal.foreign:  # which torch refuses, and says so better
            return
        raise ValueError(
            f"{name} cannot be read as a file of torch.save: it is another kind of file, or incomplete "
            f"({type(error).__name__})."
        ) from error


class _Tuple(tuple[Any, ...]):
    """That knows how many values are in it, however deep."""

    __slots__ = ()

    def __hash__(self) -> int:
        if _values_in(self, _MOST_IN_A_KEY) > _MOST_IN_A_KEY:
            raise FilledMemoryError("a key is a tuple of tuples without end")
        return super().__hash__()


def _values_in(value: Any, most: int) -> int:
    """How many values are in tuples in tuples, counted as far as needed."""
    count = 1
    for one in value if isinstance(value, tuple) else ():
        if count > most:
            break
        count += _values_in(one, most - count)
    return count


class _Dictionary(dict[Any, Any]):
    """With attributes, which an OrderedDict in a file may have."""


class _Made:
    """What a call would return, most likely a tensor."""

    __slots__ = ("repeats",)

    def __init__(self, *, repeats: bool = False) -> None:
        self.repeats = repeats

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage:
    __slots__ = ("values",)

    def __init__(self, values: int) -> None:
        self.values = values


class _Named:
    """What a file has by its name, and may call."""

    __slots__ = ("_rehearsal", "name")

    def __init__(self, name: str, rehearsal: _Rehearsal) -> None:
        self.name, self._rehearsal = name, rehearsal

    def __call__(self, *given: Any) -> Any:
        return self._rehearsal.called(self.name, given)


class _Rehearsal(pickle._Unpickler):
    """Reads a pickle as torch does, and makes nothing but plain values."""

    def __init__(self, file: BufferedReader[Any], size: int, most: int) -> None:
        super().__init__(file, encoding="bytes")
        self._left, self._size = most, size
        self._stored: dict[Any, int] = {}
        self.foreign = False

    def find_class(self, module: str, name: str) -> Any:
        """What stands for something by its name."""
        self.foreign |= name not in _PLAIN and module not in _TORCHS
        return _Named(name, self)

    def persistent_load(self, pid: Any) -> Any:
        """What stands for the storage of a tensor.

        Raises:
            FilledMemoryError: If the file cannot hold so many.
        """
        key, values = (pid[2], pid[4]) if isinstance(pid, tuple) and len(pid) > 4 else (None, 0)
        values = values if isinstance(values, int) else 0
        self._size -= max(values - self._stored.get(key, 0), 0)
        self._stored[key] = max(values, self._stored.get(key, 0))
        if self._size < 0:
            raise FilledMemoryError(
                f"it claims tensors of {sum(self._stored.values()):,} values, more than it has bytes"
            )
        return _Storage(values)

    def called(self, name: str, given: tuple[Any, ...]) -> Any:
        """What a call returns, or stands for it.

        Raises:
            FilledMemoryError: If it would need more than what it is given.
        """
        if name == "_rebuild_from_type_v2" and len(given) > 2 and isinstance(given[0], _Named):
            return given[0](*given[2])
        if name.startswith("_rebuild"):
            if "parameter" not in name and any(isinstance(one, _Made) and one.repeats for one in given):
                raise FilledMemoryError(f"it calls {name} with a tensor that has more values than there are")
            return _Made(repeats=_repeats(given))
        if name in _PLAIN:
            self._spend(name, given)
            return _PLAIN[name](*given)
        if name.endswith(("Tensor", "Storage")) and any(isinstance(one, int | tuple | list) for one in given):
            raise FilledMemoryError(f"it calls {name[:100]!a} with numbers")
        return _Made()

    def _spend(self, name: str, given: tuple[Any, ...]) -> None:
        if name != "complex" and any(isinstance(one, int) for one in given):
            raise FilledMemoryError(f"it calls {name!r} with a number")
        # An OrderedDict may be made of pairs, each of which is gone through.
        inside = [one for part in given if isinstance(part, list | tuple) for one in part]
        if any(isinstance(one, _Made) for one in (*given, *inside)):
            raise FilledMemoryError(f"it calls {name!r} with a tensor")
        if name in ("bytearray", "encode") and any(one not in _CODECS for one in given[1:]):
            raise FilledMemoryError(f"it calls {name!r} with another encoding than bytes are saved with")
        self._left -= sum(len(one) for one in given if hasattr(one, "__len__"))
        if self._left < 0:
            raise FilledMemoryError(f"it calls {name!r} again and again with the same values")


def _encode(text: str, *_: str) -> bytes:
    return text.encode("latin-1")


def _bytearray(given: str | bytes = b"", *_: str) -> bytes:
    return given.encode("latin-1") if isinstance(given, str) else bytes(given)


_PLAIN: dict[str, Callable[..., Any]] = {
    "OrderedDict": _Dictionary,
    "Counter": lambda given=(): _Dictionary.fromkeys(given, 1),
    "set": set,
    "complex": complex,
    "Size": lambda given=(): _Tuple(given),
    "bytearray": _bytearray,
    "encode": _encode,
}
"""What is made of plain values, and what makes it here."""
_OF_TENSORS = ("", "._utils", "._tensor", ".storage", ".serialization", ".nn.parameter", ".cuda", ".sparse")
_TORCHS = tuple(f"torch{one}" for one in (*_OF_TENSORS, ".cuda.sparse"))
"""Modules of what torch itself writes about tensors."""


def _repeats(given: Sequence[Any]) -> bool:
    """Whether a tensor has more values than its storage."""
    if len(given) < 3 or not isinstance(given[0], _Storage) or not isinstance(given[2], tuple):
        return False
    return math.prod(one for one in given[2] if isinstance(one, int)) > given[0].values


def _tuples(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """The same, but for the tuple that it makes."""

    def loaded(self: Any) -> None:
        load(self)
        self.stack[-1] = _Tuple(self.stack[-1])

    return loaded


def _new_object(self: Any) -> None:
    given = self.stack.pop()
    self.stack[-1] = self.stack[-1](*given)


_KNOWN = {code[0]: load for code, load in ((bytes([key]), one) for key, one in pickle._Unpickler.dispatch.items())}
for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _KNOWN[_code[0]] = _tuples(_KNOWN[_code[0]])
_KNOWN[pickle.NEWOBJ[0]] = _new_object
del _KNOWN[pickle.BYTEARRAY8[0]]  # allocates what it announces; torch knows no such thing
_Rehearsal.dispatch = _KNOWN
