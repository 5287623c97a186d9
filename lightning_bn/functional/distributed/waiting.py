"""Collectives that end with a sentence where another process did not come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_LOST = ("gloo", "nccl", "connection closed", "connection reset", "timed out")
"""What a collective says in which another process did not take part; gloo raises a plain RuntimeError."""


@contextmanager
def waiting(who: str) -> Iterator[None]:
    """Say in words when the others did not come.

    Args:
        who: Waits.

    Raises:
        RuntimeError: Instead of what the process group raised.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST):
            raise RuntimeError(
                f"{who} waited for another process, which failed, came too late or did something else: look for the "
                "error of that process. This call was stopped, and nothing was changed on this process."
            ) from error
        raise
