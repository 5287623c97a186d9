"""A BatchNorm layer pinned in eval mode through any ``.train()``, deepcopy and pickling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from lightning_bn.functional.freezing.memory_efficient import Constants, memory_efficient
from lightning_bn.functional.layers.overlay import Overlay, put_before, take_away
from lightning_bn.functional.layers.torch_private import attributes_of

PIN = "_lightning_bn_pin"
FUNCTION = "freeze_batch_norm"
"""Who freezes where no session does: ``weight`` and ``bias`` require no gradient then."""


@dataclass(frozen=True)
class Pin:
    """What a pinned layer carries.

    Attributes:
        owners: Who pins it.
        found: The mode it was in when it was first pinned.
        given: The mode it would be in now were it not pinned.
        constant_for: Those of the owners for whom all its values are constants, ``weight`` and ``bias`` too: while
            there is one, the layer keeps nothing of its input for the backward.
    """

    owners: tuple[str, ...]
    found: bool
    given: bool
    constant_for: tuple[str, ...] = ()


def pin_in_eval(
    layer: _BatchNorm, owner: str, like: _BatchNorm | None = None, *, constant: bool | None = False
) -> None:
    """Put a layer into eval mode, where it stays through any ``.train()`` until all its owners have released it.

    Args:
        layer: Which.
        owner: Who asks.
        like: A pinned layer in whose place it is: it then goes back to the mode that this one would.
        constant: Whether its ``weight`` and ``bias`` are constants too for this owner; None leaves that as it is.
    """
    put_before(layer, _PinnedInEval)
    attributes = attributes_of(layer)
    found = None if like is None else attributes_of(like).get(PIN)
    found = found or Pin((), layer.training, layer.training)
    before = attributes.get(PIN) or replace(found, owners=(), constant_for=())
    pin = _without(before, owner)
    constant = owner in before.constant_for if constant is None else constant
    constant_for = (*pin.constant_for, owner) if constant else pin.constant_for
    attributes[PIN] = replace(pin, owners=(*pin.owners, owner), constant_for=constant_for)
    layer.training = False


def let_affine_train(layer: _BatchNorm, owner: str) -> None:
    """Have a layer that ``owner`` pins give ``weight`` and ``bias`` gradients again, if no other owner objects."""
    attributes = attributes_of(layer)
    pin = attributes.get(PIN)
    if pin is not None:
        attributes[PIN] = replace(pin, constant_for=_without(pin, owner).constant_for)


def release(layer: _BatchNorm, owner: str, *, as_found: bool = False, parent_trains: bool = False) -> None:
    """Release a layer that ``owner`` pins; with the last owner it is an ordinary layer again.

    Args:
        layer: Which; one that ``owner`` does not pin is left alone.
        owner: Who.
        as_found: Whether it goes back to the mode it was in when it was first pinned. By default to the one it was
            given last.
        parent_trains: Whether the model around it is in training. Lightning's validation gives eval mode to everything
            and takes it back by setting flags directly, so that the mode a pinned layer was given last is eval although
            the model trains: it then goes back to the mode it was found in, unless it was given train mode.
    """
    attributes = attributes_of(layer)
    pin = attributes.get(PIN)
    if pin is None or owner not in pin.owners:
        return
    attributes[PIN] = pin = _without(pin, owner)
    if pin.owners:
        return
    del attributes[PIN]
    layer.training = pin.found if as_found else pin.given or (pin.found and parent_trains)
    take_away(layer, _PinnedInEval)


def _without(pin: Pin, owner: str) -> Pin:
    """Return a pin without one of its owners."""
    owners, constant_for = ((*(one for one in those if one != owner),) for those in (pin.owners, pin.constant_for))
    return replace(pin, owners=owners, constant_for=constant_for)


def _constants_of(layer: _BatchNorm) -> Constants:
    pin = layer.__dict__.get(PIN)
    if pin is None or not pin.constant_for:
        return Constants.NONE
    return Constants.WITHOUT_GRADIENTS if pin.constant_for == (FUNCTION,) else Constants.WITH_ZEROS


class _PinnedInEval(Overlay):
    """Put before the class of a frozen layer: it stays in eval mode whatever mode it is given.

    The layer carries the mode it would be in were it not frozen; without one it is not pinned.
    """

    mark = PIN

    @classmethod
    def above(cls, forward: Callable[..., Any]) -> type[Overlay]:
        return type(cls.__name__, (cls,), {"forward": memory_efficient(forward, _constants_of)})

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if PIN in self.__dict__:
            self.__dict__[PIN] = replace(self.__dict__[PIN], given=mode)
            self.training = False
        return self

    def extra_repr(self) -> str:
        described: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{described}, frozen" if PIN in self.__dict__ else described
