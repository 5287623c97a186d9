"""What a piece of code asks of the device, counted by torch's profiler."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.profiler import profile

# The profiler says on the error stream when it starts and when it stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

#: What is counted, by type of device: the columns, and how the names of the events begin.
_COUNTED = {
    "cpu": {"operators": "aten::", "values read": "aten::_local_scalar_dense$"},
    "cuda": {
        "launches": "cu(da)?(Graph)?Launch",
        "copies": "Memcpy DtoH",
        "waits": "cuda(Device|Stream|Event)Synchronize$",
        "values read": "aten::_local_scalar_dense$",
    },
}

#: What the columns mean, by type of device.
MEANING = {
    "cpu": "operators: of ATen, those called by other ones left out. values read: by `.item()` and the like.",
    "cuda": "launches: of kernels. copies: from the device to the host. waits: synchronizations with the device, a "
    "stream or an event. values read: by `.item()` and the like; one on the device takes a copy and a wait.",
}


def title(device: torch.device, per: str) -> str:
    """Of a table of counts."""
    return f"{'Launches' if device.type == 'cuda' else 'Operators'} per {per}"


def count(events: Iterable[Any], device: torch.device) -> dict[str, int]:
    """How many of a profiler's events belong in each column."""
    columns = _COUNTED[device.type]
    counts = dict.fromkeys(columns, 0)
    for event in events:
        for column, pattern in columns.items():
            inner = column == "operators" and event.cpu_parent and event.cpu_parent.name.startswith("aten::")
            counts[column] += bool(re.match(pattern, event.name)) and not inner
    return counts


@contextmanager
def counting(device: torch.device) -> Iterator[dict[str, int]]:
    """Counts what the code inside asks of the device, in this thread and in the backward passes that it starts.

    Yields:
        The counts by column, filled in at the end.

    Raises:
        RuntimeError: If the profiler sees nothing of a CUDA device.
    """
    counts: dict[str, int] = {}
    own = profilers_own(device)
    with _profile(device) as profiler:
        yield counts
        _synchronize(device)
    counts.update({column: found - own[column] for column, found in count(profiler.events(), device).items()})


@cache
def profilers_own(device: torch.device) -> dict[str, int]:
    """What an empty profile has: on CUDA it is synchronized, by us and by the profiler.

    The first profile of a process belongs in its main thread: in another one the profiler complains, on stderr.
    """
    # The first one may have more.
    for _ in range(2):
        with _profile(device) as profiler:
            _synchronize(device)
    found = count(profiler.events(), device)
    if device.type == "cuda" and not found["waits"]:
        raise RuntimeError("torch's profiler sees no CUDA calls here; with KINETO_LOG_LEVEL=0 it says why.")
    return found


def _profile(device: torch.device) -> profile:
    _synchronize(device)
    # Of all that there is: after a first one of the CPU alone, torch's profiler may stay without CUDA.
    return profile()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
