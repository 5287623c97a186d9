"""A BatchNorm layer held in eval mode through any ``.train()``, deepcopy and pickling."""

from __future__ import annotations

from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

GIVEN_MODE = "_lightning_bn_given_mode"
HOLDERS = "_lightning_bn_holders"
_HELD_CLASSES: dict[type[_BatchNorm], type[_BatchNorm]] = {}


def hold_in_eval(layer: _BatchNorm, by: str) -> None:
    """Puts a layer into eval mode, where it stays through any ``.train()`` until everyone who holds it lets go."""
    if not isinstance(layer, _HeldInEval):
        layer.__class__ = _held_class(type(layer))
    holders = layer.__dict__.setdefault(HOLDERS, {})
    # The first holder found the layer's own mode; later ones would find that it is held.
    holders.setdefault(by, next(iter(holders.values()), layer.training))
    layer.__dict__.setdefault(GIVEN_MODE, layer.training)
    layer.training = False


def let_go(layer: _BatchNorm, by: str, *, as_found: bool = False, parent_trains: bool = False) -> None:
    """Lets go of a layer that ``by`` holds; with the last holder it is an ordinary layer again.

    Args:
        layer: Which; one that ``by`` does not hold is left alone.
        by: Who.
        as_found: Whether it goes back to the mode it was in when it was first held. By default to the one it was given
            last.
        parent_trains: Whether the model around it is in training. Lightning's validation gives eval mode to everything
            and takes it back by setting flags directly, so that the mode a held layer was given last is eval although
            the model trains: it then goes back to the mode it was found in, unless it was given train mode.
    """
    holders = layer.__dict__.get(HOLDERS, {})
    found = holders.pop(by, None)
    if found is None or holders:
        return
    del layer.__dict__[HOLDERS]
    given = layer.__dict__.pop(GIVEN_MODE)
    layer.training = found if as_found else given or (found and parent_trains)
    if _is_held_class(type(layer)):
        layer.__class__ = type(layer).__mro__[2]


class _HeldInEval(_BatchNorm):
    """Put before the class of a frozen layer: it stays in eval mode whatever mode it is given.

    The layer carries the mode it would be in were it not frozen; without one it is not held, which matters where
    another tool has put a class of its own on top of this one. No annotations here: torch.jit.script reads them.
    """

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if GIVEN_MODE in self.__dict__:
            self.__dict__[GIVEN_MODE] = mode
            self.training = False
        return self

    def extra_repr(self) -> str:
        described: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{described}, frozen" if GIVEN_MODE in self.__dict__ else described

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle cannot find it by name: it is made again from the base.
        reduced: tuple[Any, ...] | str = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[1][:1] == (type(self),) and _is_held_class(type(self)):
            return (_new_held, (type(self).__mro__[2],), *reduced[2:])
        return reduced


def _is_held_class(kind: type) -> bool:
    return kind in _HELD_CLASSES.values()


def _held_class(base: type[_BatchNorm]) -> type[_BatchNorm]:
    """The class of a frozen layer that was a ``base``; the same one every time."""
    if base in _HELD_CLASSES:
        return _HELD_CLASSES[base]
    # Name and module stay the base's: exporters, tracers and summaries recognize layers by them.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return _HELD_CLASSES.setdefault(base, type(base.__name__, (_HeldInEval, base), names))


def _new_held(base: type[_BatchNorm]) -> _BatchNorm:
    held = _held_class(base)
    return held.__new__(held)
