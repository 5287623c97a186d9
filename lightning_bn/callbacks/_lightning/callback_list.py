"""The Trainer's callbacks: who is beside whom, and in which order they are called."""

from __future__ import annotations

import sys
from typing import Any

from lightning_bn.callbacks._lightning.namespaces import Callback, Trainer


def same_kind_beside(trainer: Trainer, callback: Callback) -> list[Any]:
    """Other callbacks of the same class in the Trainer."""
    return [other for other in callbacks_of(trainer) if type(other) is type(callback) and other is not callback]


def callbacks_named(trainer: Trainer, *names: str) -> list[Any]:
    """Callbacks whose class, or a base of it, has one of these names: the two namespaces have their own classes."""
    return [one for one in callbacks_of(trainer) if any(base.__name__ in names for base in type(one).__mro__)]


def is_asked_by(function: str) -> bool:
    """Whether the attribute that asks this is read by a function of that name."""
    return sys._getframe(2).f_code.co_name == function


def put_first(trainer: Trainer, callback: Callback, *, but_for: type[Callback] | None = None) -> None:
    """Move a callback in front of all others but those of a class."""
    others = [other for other in callbacks_of(trainer) if other is not callback]
    before = [other for other in others if but_for is not None and isinstance(other, but_for)]
    _set_callbacks(trainer, [*before, callback, *(other for other in others if other not in before)])


def put_before_checkpoints(trainer: Trainer, callback: Callback) -> None:
    """Move a callback behind all others but those that save checkpoints, which come last."""
    others = [other for other in callbacks_of(trainer) if other is not callback]
    # By name: each of the two namespaces has its own class.
    saving = [other for other in others if any(base.__name__ == "Checkpoint" for base in type(other).__mro__)]
    rest = [other for other in others if other not in saving]
    _set_callbacks(trainer, [*rest, callback, *saving])


def callbacks_of(trainer: Trainer) -> list[Any]:
    # Set by one of the Trainer's connectors, so that type checkers do not know it.
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def _set_callbacks(trainer: Trainer, callbacks: list[Any]) -> None:
    trainer.callbacks = callbacks  # type: ignore[attr-defined]
