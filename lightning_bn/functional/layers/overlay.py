"""A class that is put before a layer's own for a while; by its name, and to isinstance, the layer is what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch.nn.modules.batchnorm import _BatchNorm

_Kind: TypeAlias = "type[Overlay]"
_MADE: dict[type[_BatchNorm], tuple[type[_BatchNorm], tuple[_Kind, ...]]] = {}
"""Of each class that was made: the layer's own, and what was put before it, the last one first."""
_CLASSES: dict[tuple[type[_BatchNorm], tuple[_Kind, ...]], type[_BatchNorm]] = {}


class Overlay(_BatchNorm):
    """Base of such classes. No annotations in it: torch.jit.script reads them.

    Without what the layer carries under ``mark`` it has to do nothing, since it cannot be taken away from below a class
    that another tool has put on top.

    Attributes:
        mark: Name of the layer's attribute that belongs to it.
        in_copies: Whether copies and pickles of the layer have both as well.
    """

    mark = ""
    in_copies = True

    @classmethod
    def above(cls, forward: Callable[..., Any]) -> type[Overlay]:
        """Return what is put before a class with this forward: this class, or one of its kind that is made for it."""
        return cls

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle cannot find it by name: it is made again from the layer's own.
        reduced: tuple[Any, ...] | str = super().__reduce_ex__(protocol)
        made = _MADE.get(type(self))
        if made is None or isinstance(reduced, str) or reduced[1][:1] != (type(self),):
            return reduced
        base, kinds = made
        kept = tuple(kind for kind in kinds if kind.in_copies)
        state, *rest = reduced[2:]
        if isinstance(state, dict):
            gone = [kind.mark for kind in kinds if not kind.in_copies]
            state = {key: value for key, value in state.items() if key not in gone}
        return (_new, (base, kept), state, *rest)


def put_before(layer: _BatchNorm, kind: _Kind) -> None:
    """Put a class before the layer's, on top of others; not a second time."""
    if not isinstance(layer, kind):
        base, kinds = _MADE.get(type(layer), (type(layer), ()))
        _become(layer, _class_of(base, (kind, *kinds)))


def take_away(layer: _BatchNorm, kind: _Kind) -> None:
    """Take a class away again, from between others too; it stays below a class that another tool has put on top."""
    base, kinds = _MADE.get(type(layer), (type(layer), ()))
    if kind in kinds:
        _become(layer, _class_of(base, tuple(other for other in kinds if other is not kind)))


def own_class(layer: _BatchNorm) -> type[_BatchNorm]:
    """Return the class that a layer had before others were put before it."""
    return _MADE.get(type(layer), (type(layer), ()))[0]


def _become(layer: _BatchNorm, kind: type[_BatchNorm]) -> None:
    object.__setattr__(layer, "__class__", kind)  # a module's own look-up of what is set is slow


def _class_of(base: type[_BatchNorm], kinds: tuple[_Kind, ...]) -> type[_BatchNorm]:
    """Return the class of a ``base`` with others before it; the same one every time."""
    if not kinds:
        return base
    if (base, kinds) not in _CLASSES:
        # Name and module stay the base's: exporters, tracers and summaries recognize layers by them.
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        bases: list[type[_BatchNorm]] = [base]
        forward: Callable[..., Any] = base.forward
        for kind in reversed(kinds):
            bases.insert(0, kind.above(forward))
            forward = vars(bases[0]).get("forward", forward)
        made = _CLASSES.setdefault((base, kinds), type(base.__name__, tuple(bases), names))
        _MADE[made] = (base, kinds)
    return _CLASSES[base, kinds]


def _new(base: type[_BatchNorm], kinds: tuple[_Kind, ...]) -> _BatchNorm:
    made = _class_of(base, kinds)
    return made.__new__(made)
