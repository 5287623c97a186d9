"""How much memory something needs at its peak, counted from torch's allocator by its profiler."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

MIB = 2**20


@contextmanager
def no_stderr() -> Iterator[None]:
    """The profiler's C++ part announces every start and stop there."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak(run: Callable[[], object]) -> int:
    """The most bytes that were allocated at one time, beyond those before the run."""
    with no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocated = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["args"]["Ev Idx"]):
        allocated += event["args"]["Bytes"]
        most = max(most, allocated)
    return most
