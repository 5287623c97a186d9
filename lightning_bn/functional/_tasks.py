"""The task that the running part of a training step belongs to, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str | None], None]

_current: list[str] = []
_listeners: list[Listener] = []


@contextmanager
def task(name: str) -> Iterator[None]:
    """What is run inside belongs to the task ``name``; for training steps that serve several tasks at once.

    Contexts may be nested, the innermost counts. Outside of training they change nothing.

    Args:
        name: As the callbacks know it, for instance a key of ``BatchNormFreezer(by_task=...)``.

    Example:
        >>> with task("seg"):
        ...     pass  # loss = self.seg_loss(self.backbone(x))
    """
    _current.append(name)
    try:
        _tell(name)
        yield
    finally:
        _current.pop()
        _tell(_current[-1] if _current else None)


def _tell(name: str | None) -> None:
    for listener in list(_listeners):
        listener(name)


def listen(listener: Listener) -> None:
    """Have ``listener`` called with the task, or None, whenever a :func:`task` context begins or ends."""
    if listener not in _listeners:
        _listeners.append(listener)


def stop_listening(listener: Listener) -> None:
    """Undo :func:`listen`; harmless when repeated."""
    if listener in _listeners:
        _listeners.remove(listener)
