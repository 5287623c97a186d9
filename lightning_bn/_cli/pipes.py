"""Output that ends early without a word where whoever reads it has seen enough, as ``head`` and ``grep -q`` have."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Stream:
    """A text stream that takes what nobody reads any more, and says once what cannot be written."""

    def __init__(self, stream: Any) -> None:
        # Without a stream behind it, as after `>&-`, the next file that is opened would be written to instead.
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.failed: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do nothing where nobody reads."""
        with self._lost():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or do nothing where nobody reads."""
        with self._lost():
            self._stream.flush()

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._into_nothing()
        except OSError as error:  # a full disk
            self.failed = error
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
def whoever_reads(unwritten: list[OSError]) -> Iterator[None]:
    """Inside, a pipe that its reader has closed is no error: what is printed into it is lost, and the work goes on.

    The same where a disk is full, but for one line on standard error at the end.

    Args:
        unwritten: Gets the error then.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err = _Stream(before[0]), _Stream(before[1])
    try:
        yield
    finally:
        out.flush()
        if out.failed is not None:
            unwritten.append(out.failed)
            err.write(f"lightning-bn: the output cannot be written ({out.failed.strerror or out.failed}).\n")
        err.flush()
        sys.stdout, sys.stderr = before
