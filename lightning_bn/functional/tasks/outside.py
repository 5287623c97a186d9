"""What moves the default task's statistics outside of any context, while contexts are used."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from lightning_bn.functional._text import quoted
from lightning_bn.functional.tasks.placed_sets import PlacedSets


class OutsideOfContexts:
    """Forwards that should have run inside a context: counted, and told once.

    Args:
        default: The task whose statistics these move.

    Attributes:
        times: How often a context began after one.
        tell: Called with the sentence; by default it is a warning.
    """

    def __init__(self, default: str) -> None:
        self._default, self._used, self._told = default, False, False
        self.times = 0
        self.tell: Callable[[str], object] = _warn

    def begin(self, tell: Callable[[str], object]) -> None:
        """Tell somebody once more, in a new fit; what was moved until now was meant."""
        self._used, self._told, self.tell = False, False, tell

    def look(self, placed: PlacedSets) -> None:
        """Look, before a context begins."""
        moved = placed.moved_outside() if self._used else []
        self.times += bool(moved)
        if moved and not self._told:
            self._told = True
            self.tell(
                f"the statistics of the default task {self._default!r} in BatchNorm layer {quoted(moved)} moved "
                "outside of any task's context: a forward ran in train mode, or other code wrote to them. Run that "
                "forward inside the context of a task, or in eval mode."
            )

    def seen(self, placed: PlacedSets) -> None:
        """What has moved until the end of a context was inside of it, or has been told."""
        placed.see_own()
        self._used = True


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=7)
