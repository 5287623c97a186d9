"""The task that the running part of a training step belongs to, and who does something while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class RecomputationError(RuntimeError):
    """A forward that was run for one task would be run again, by the backward, for another one."""


_current: list[str] = []
_listeners: list[Listener] = []
_none_begins: list[None] = []


@contextmanager
def task(name: str) -> Iterator[None]:
    """What is run inside belongs to the task ``name``; for training steps that serve several tasks at once.

    Contexts may be nested, the innermost counts. Where no callback knows tasks they change nothing.

    Args:
        name: As the callbacks know it, for instance a key of ``BatchNormFreezer(by_task=...)``.

    Example:
        >>> with task("seg"):
        ...     pass  # loss = self.seg_loss(self.backbone(x))
    """
    outer = current_task()
    if _none_begins and _heard(outer, name):
        raise RuntimeError(
            f"task {name!r} begins inside a context of rows of several tasks, while a callback does something for "
            "each task: end that context first."
        )
    try:
        _current.append(name)
        _change(outer, name)
        yield
    finally:
        _current.pop()
        _change(name, outer)


@contextmanager
def none_begins() -> Iterator[None]:
    """Inside, a change of the task of which anybody would be told is refused: several tasks run at once."""
    _none_begins.append(None)
    try:
        yield
    finally:
        _none_begins.pop()


def current_task() -> str | None:
    """The task of the innermost context, None outside of any."""
    return _current[-1] if _current else None


@dataclass(eq=False)
class Listener:
    """Who does something while a task runs, from :meth:`begin` to :meth:`end`, for one batch.

    At a change of the task all leave, the one that began last first, and then enter: what one has put over that of
    another is taken back before it.

    Attributes:
        enter: Called with the task that runs next, None for none.
        leave: Called when it runs no more; harmless when repeated.
        batch_task: The task where no context says another.
    """

    enter: Callable[[str | None], None]
    leave: Callable[[], None]
    batch_task: str | None = None

    def begin(self) -> None:
        """Enter what runs now, and listen."""
        if self not in _listeners:
            _listeners.append(self)
        self.enter(self.task_in(current_task()))

    def end(self) -> None:
        """Leave, and listen no more; harmless when repeated."""
        if self in _listeners:
            _listeners.remove(self)
        self.leave()

    def task_in(self, context: str | None) -> str | None:
        """The task that runs in a context, or outside of any."""
        return self.batch_task if context is None else context


def end_batch() -> None:
    """End all that listen, the one that began last first, whoever of them is told first that the batch is over."""
    for listener in reversed(tuple(_listeners)):
        listener.end()


@contextmanager
def nobody_listening() -> Iterator[None]:
    """Inside, who listened has left and hears of nothing, as what runs there is no part of their batch."""
    listeners = tuple(_listeners)
    for listener in reversed(listeners):
        listener.leave()
    _listeners.clear()
    try:
        yield
    finally:
        _listeners[:] = listeners
        for listener in listeners:
            listener.enter(listener.task_in(current_task()))


def _heard(old: str | None, new: str | None) -> bool:
    return any(listener.task_in(old) != listener.task_in(new) for listener in _listeners)


def _change(old: str | None, new: str | None) -> None:
    listeners = tuple(_listeners)
    if not _heard(old, new):
        return
    for listener in reversed(listeners):
        listener.leave()
    for listener in listeners:
        listener.enter(listener.task_in(new))
