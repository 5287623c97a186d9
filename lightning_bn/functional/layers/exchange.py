"""Other tensors, parameters or attributes in a module's place for a while: the one way to do something for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor, nn

from lightning_bn.functional.layers.torch_private import attributes_of, buffers_of, parameters_of

_HOLDERS = "_lightning_bn_exchanged_by"
_ABSENT = object()
_serial = count()


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


@contextmanager
def exchanged(holder: str, entries: Sequence[Entries]) -> Iterator[None]:
    """Inside, modules hold these entries instead of their own; afterwards the very objects that were there before.

    Exchanges nest: the last one in is the first one out. Who holds a module's place is recorded on the module. After
    an exception everything is as it was before this one began, whatever was put on top of it and left there.

    Args:
        holder: Who exchanges, for errors.
        entries: What each module is to hold.

    Raises:
        ExchangeError: At the end, if another exchange lies on top in one of the modules: nothing has been changed
            then, and both are still in place.
    """
    token = (holder, next(_serial))
    found: list[tuple[Entries, list[dict[str, Any]]]] = []
    try:
        for one in entries:
            places = one.places()
            found.append((one, [{key: home.get(key, _ABSENT) for key in new} for home, new in places]))
            _record(one.module, (*_holders(one.module), token))
            for home, new in places:
                home.update(new)
        yield
    except BaseException:
        _put_back(found, token)
        raise
    for one, _ in found:
        _check_on_top(one, token)
    _put_back(found, token)


def holders_of(module: nn.Module) -> tuple[str, ...]:
    """Who holds the place of what a module holds itself, the last one in at the end; empty if nobody does."""
    return tuple(holder for holder, _ in _holders(module))


def _holders(module: nn.Module) -> tuple[tuple[str, int], ...]:
    found: tuple[tuple[str, int], ...] = attributes_of(module).get(_HOLDERS, ())
    return found


def _record(module: nn.Module, holders: tuple[tuple[str, int], ...]) -> None:
    if holders:
        attributes_of(module)[_HOLDERS] = holders
    else:
        attributes_of(module).pop(_HOLDERS, None)


def _put_back(found: Sequence[tuple[Entries, list[dict[str, Any]]]], token: tuple[str, int]) -> None:
    for one, own in reversed(found):
        holders = _holders(one.module)
        if token not in holders:
            # Put back already, by one that lies below and failed.
            continue
        _record(one.module, holders[: len(holders) - 1 - holders[::-1].index(token)])
        for (home, _), values in zip(one.places(), own, strict=True):
            home.update(values)
            for key in [key for key, value in values.items() if value is _ABSENT]:
                del home[key]


def _check_on_top(one: Entries, token: tuple[str, int]) -> None:
    holders = _holders(one.module)
    if holders[-1:] != (token,):
        top = f"{holders[-1][0]!r} lies on top of it" if token in holders else "nothing of it is left there"
        raise ExchangeError(
            f"layer {one.name!r}: what {token[0]!r} put in its place cannot be taken out, since {top}. Take out last "
            f"in, first out: end what began later first. Nothing was changed."
        )
