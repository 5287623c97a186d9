"""Real processes in one group over gloo, started and ended together; what the first of them found."""

import json
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Seconds that a collective waits, and after which the processes of one run are ended.
PATIENCE, LIMIT = 60, 180


def on_processes(measure: Callable[[int, int], Any], processes: int) -> Any:
    """What ``measure(rank, processes)`` returns on the first of them; none of them is left, whatever happens.

    Args:
        measure: A function of a module, whose result can be written as JSON.
        processes: How many.

    Raises:
        TimeoutError: If they take too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _take_part, (processes, folder, measure), nprocs=processes, join=False, daemon=True, start_method="spawn"
        )
        try:
            end = time.monotonic() + LIMIT
            while not context.join(timeout=max(0, end - time.monotonic())):
                if time.monotonic() >= end:
                    raise TimeoutError(f"{processes} processes were not done after {LIMIT} seconds")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return json.loads(Path(folder, "found.json").read_text())


def _take_part(rank: int, processes: int, folder: str, measure: Callable[[int, int], Any]) -> None:
    # Sent by the system where the parent was killed: ends this process even in the middle of a collective.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=PATIENCE),
    )
    found = measure(rank, processes)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
