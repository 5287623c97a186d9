"""Other tensors, parameters or attributes in a module's place for a while: the one way to do something for a while."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_bn.functional._text import named
from lightning_bn.functional.layers.torch_private import attributes_of, buffers_of, parameters_of

_HOLDINGS = "_lightning_bn_exchanged_by"
_ABSENT = object()
_serial = count()

_Holding: TypeAlias = tuple[int, str, frozenset[str], int]
"""A running number, who exchanges, which entries, and of which module in turn; plain, so that it can be copied."""


class ExchangeError(RuntimeError):
    """Something that was put in a layer's place was to be taken out while something else lay on top of it."""


@dataclass(frozen=True)
class Entries:
    """What one module is to hold for a while.

    Attributes:
        name: Of the module, for errors.
        module: Which.
        buffers: Tensors by the names of its buffers.
        parameters: Tensors by the names of its parameters.
        attributes: Values by the names of its attributes; one that the class has is shadowed on the instance.
    """

    name: str
    module: nn.Module
    buffers: Mapping[str, Tensor | None] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def places(self) -> list[tuple[dict[str, Any], Mapping[str, Any]]]:
        """The module's own dictionaries and what is to be put into each."""
        homes = (buffers_of(self.module), parameters_of(self.module), attributes_of(self.module))
        given = (self.buffers, self.parameters, self.attributes)
        return [(home, new) for home, new in zip(homes, given, strict=True) if new]


class exchanged:  # a context manager is named for what is so inside
    """Inside, modules hold these entries instead of their own; afterwards the very objects that were there before.

    Exchanges of the same entries nest: the last one in is the first one out. Who holds a module's place is recorded on
    the module. After an exception these entries are as they were before, whatever was put on top of them and left.

    Args:
        holder: Who exchanges, for errors.
        entries: What each module is to hold.

    Raises:
        ExchangeError: At the end, if another exchange of the same entries lies on top in one of the modules: nothing
            has been changed then, both are still in place, and the end may be tried again.
    """

    def __init__(self, holder: str, entries: Sequence[Entries]) -> None:
        self._holder, self._entries = holder, entries
        self._found: list[tuple[Entries, list[dict[str, Any]], _Holding]] = []

    def __enter__(self) -> None:
        serial = next(_serial)
        try:
            for index, one in enumerate(self._entries):
                places = one.places()
                holding = (serial, self._holder, frozenset(key for _, new in places for key in new), index)
                own = [{key: home.get(key, _ABSENT) for key in new} for home, new in places]
                self._found.append((one, own, holding))
                _record(one.module, (*_holdings(one.module), holding))
                for home, new in places:
                    home.update(new)
        except BaseException:
            self._put_back()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for one, _own, holding in self._found:
                _check_on_top(one, holding)
        self._put_back()

    def _put_back(self) -> None:
        found, self._found = self._found, []
        for one, own, holding in reversed(found):
            holdings = _holdings(one.module)
            if holding not in holdings:
                # Put back already, by one that lies below and failed.
                continue
            gone = [*_above(one.module, holding), holding]
            _record(one.module, tuple(other for other in holdings if other not in gone))
            for (home, _), values in zip(one.places(), own, strict=True):
                home.update(values)
                for key in [key for key, value in values.items() if value is _ABSENT]:
                    del home[key]


class _Holdings(tuple[_Holding, ...]):
    """What lies on one module; a copy of the module is nobody's."""

    def __deepcopy__(self, memo: object) -> tuple[()]:
        return ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (tuple, ())


def holders_of(module: nn.Module) -> tuple[str, ...]:
    """Return who holds the place of what a module holds itself, the last one in at the end; empty if nobody does."""
    return tuple(holder for _, holder, _, _ in _holdings(module))


def _holdings(module: nn.Module) -> tuple[_Holding, ...]:
    found: tuple[_Holding, ...] = attributes_of(module).get(_HOLDINGS, ())
    return found


def _record(module: nn.Module, holdings: tuple[_Holding, ...]) -> None:
    if holdings:
        attributes_of(module)[_HOLDINGS] = _Holdings(holdings)
    else:
        attributes_of(module).pop(_HOLDINGS, None)


def _above(module: nn.Module, holding: _Holding) -> list[_Holding]:
    """What lies on top of it: exchanges that began later, of the same entries."""
    serial, _, keys, _ = holding
    return [other for other in _holdings(module) if other[0] > serial and other[2] & keys]


def _check_on_top(one: Entries, holding: _Holding) -> None:
    there, above = holding in _holdings(one.module), _above(one.module, holding)
    if above or not there:
        top = f"{above[-1][1]!r} lies on top of it" if there else "nothing of it is left there"
        raise ExchangeError(
            f"layer {named(one.name)}: what {holding[1]!r} put in its place cannot be taken out, since {top}. "
            f"Take out last "
            f"in, first out: end what began later first. Nothing was changed."
        )
