"""Other tensors, parameters or attributes in a module's place for a while: the one way to do something for a while."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_bn.functional._text import named
from lightning_bn.functional.layers.torch_private import attributes_of, buffers_of, parameters_of

COLLECTING = "recalibrate"
"""Who collects what a layer is given, instead of having it normalize with or move its running statistics."""
_HOLDINGS = "_lightning_bn_exchanged_by"
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
    It may be used again after it has ended, which is then all the faster.

    Args:
        holder: Who exchanges, for errors.
        entries: What each module is to hold.

    Raises:
        ExchangeError: At the end, if another exchange of the same entries lies on top in one of the modules: nothing
            has been changed then, both are still in place, and the end may be tried again.
    """

    def __init__(self, holder: str, entries: Sequence[Entries]) -> None:
        self._holder = holder
        self._places = [_Place(one, attributes_of(one.module), one.places()) for one in entries]
        self._begin_anew()
        self._found: list[tuple[_Place, list[dict[str, Any]]]] = []

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> None:
        if any(_HOLDINGS in place.attributes for place in self._places):
            # It lies on top of what began later than it was made.
            self._begin_anew()
        found = self._found
        try:
            for place in self._places:
                found.append((place, [{key: home[key] for key in new if key in home} for home, new in place.homes]))
                others = place.attributes.get(_HOLDINGS)
                place.attributes[_HOLDINGS] = _Holdings((*others, place.holding)) if others else place.alone
                for home, new in place.homes:
                    home.update(new)
        except BaseException:
            self._put_back()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for place, _own in self._found:
                if place.attributes.get(_HOLDINGS) is not place.alone:
                    _check_on_top(place.one, place.holding)
        self._put_back()

    def _begin_anew(self) -> None:
        serial = next(_serial)
        for index, place in enumerate(self._places):
            keys = frozenset(key for _, new in place.homes for key in new)
            place.holding = (serial, self._holder, keys, index)
            place.alone = _Holdings((place.holding,))

    def _put_back(self) -> None:
        found, self._found = self._found, []
        for place, own in reversed(found):
            holdings = place.attributes.get(_HOLDINGS, ())
            if holdings is place.alone:
                del place.attributes[_HOLDINGS]
            elif place.holding not in holdings:
                # Put back already, by one that lies below and failed.
                continue
            else:
                gone = [*_above(place.one.module, place.holding), place.holding]
                _record(place.one.module, tuple(other for other in holdings if other not in gone))
            for (home, new), values in zip(place.homes, own, strict=True):
                home.update(values)
                if len(values) < len(new):
                    for key in new.keys() - values.keys():
                        del home[key]


@dataclass(slots=True, eq=False)
class _Place:
    """Where entries go: the module's dictionaries, what is to be put into each, and the record of who does it."""

    one: Entries
    attributes: dict[str, Any]
    homes: list[tuple[dict[str, Any], Mapping[str, Any]]]
    holding: _Holding = (0, "", frozenset(), 0)
    alone: Any = ()


class _Holdings(tuple[_Holding, ...]):
    """What lies on one module; a copy of the module is nobody's."""

    def __deepcopy__(self, memo: object) -> tuple[()]:
        return ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (tuple, ())


def is_held(module: nn.Module) -> bool:
    """Whether anybody holds the place of what a module holds itself."""
    return _HOLDINGS in attributes_of(module)


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
        top = f"{above[-1][1]!r} put something on top of it later" if there else "it is not there any more"
        raise ExchangeError(
            f"layer {named(one.name)}: what {holding[1]!r} put in the place of its values cannot be taken out, since "
            f"{top}. End first what began last. Nothing was changed."
        )
