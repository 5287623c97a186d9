"""Output that ends early without a word where whoever reads it has seen enough, as ``head`` and ``grep -q`` have."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Stream:
    """A text stream that takes what nobody reads any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do nothing where nobody reads."""
        try:
            return int(self._stream.write(text))
        except BrokenPipeError:
            self._into_nothing()
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or do nothing where nobody reads."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._into_nothing()

    def close(self) -> None:
        """Flush alone: whoever closes what code prints to, the command still has something to say."""
        self.flush()

    def _into_nothing(self) -> None:
        """Also what is still in a buffer, which the interpreter writes at its end."""
        with suppress(OSError, ValueError):  # a stream without a file behind it
            os.dup2(nothing := os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            os.close(nothing)


@contextmanager
def whoever_reads() -> Iterator[None]:
    """Inside, a pipe that its reader has closed is no error: what is printed into it is lost, and the work goes on."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ours = _Stream(before[0]), _Stream(before[1])
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before
