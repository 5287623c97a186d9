"""Real processes over gloo: started together, ended together, their results read."""

import multiprocessing
import os
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

ROOT = Path(__file__).parents[1]

#: In what a rank saves: why scenarios were skipped, by scenario.
SKIPPED = "skipped"


class Found(dict[str, Any]):
    """What a rank found, by scenario; who asks for one that the rank had to skip is skipped too."""

    def __missing__(self, name: str) -> Any:
        if name in self[SKIPPED]:
            pytest.skip(self[SKIPPED][name])
        raise KeyError(name)


#: What each rank found.
Results = list[Found]


def results_of(module: str, world: int, factory: pytest.TempPathFactory, limit: float) -> Results:
    """Run a module as ``python -m module rank world folder`` on every rank, once for all workers that share the tests.

    Args:
        module: Whose ``__main__`` calls :func:`take_part`.
        world: How many processes.
        factory: pytest's.
        limit: Seconds after which they are ended.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{module}-{world}"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            _run(module, world, folder, limit)
            (folder / "done").touch()
    failed = sorted(folder.glob("rank*.txt"))
    assert not failed, failed[0].read_text()
    files = [folder / f"rank{rank}.pt" for rank in range(world)]
    assert all(file.exists() for file in files), (folder / "log.txt").read_text()[-5000:]
    return [Found(torch.load(file, weights_only=True)) for file in files]


def _run(module: str, world: int, folder: Path, limit: float) -> None:
    # Forked from a process that has imported what takes seconds to import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_bn.callbacks.precise", "tests.ranks"])
    arguments = [(module, str(rank), str(world), str(folder)) for rank in range(world)]
    processes = [context.Process(target=_as_a_script, args=(*one, folder / "log.txt")) for one in arguments]
    for process in processes:
        process.start()
    try:
        end = time.monotonic() + limit
        while time.monotonic() < end and any(process.exitcode is None for process in processes):
            if any(process.exitcode for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


def _as_a_script(module: str, *given: Any) -> None:
    """What ``python -m module`` does, with its output in a file."""
    *arguments, log = given
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start_group(rank: int, world: int, store: Path, timeout: float) -> None:
    """The default process group, met in a file: no addresses, no ports."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )


def take_part(
    run: Callable[[str, Path], dict[str, Any]], scenarios: list[str], alone: list[str], timeout: float = 45
) -> None:
    """All scenarios on this rank; what it found is saved as plain data, an error as text.

    Args:
        run: One scenario, given a folder to write in.
        scenarios: Run one after another in one process group.
        alone: Each run in a group of its own with a short timeout, as what goes wrong in it may leave ranks waiting.
        timeout: Seconds that a collective waits.
    """
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {SKIPPED: {}}
    try:
        start_group(rank, world, folder / "rendezvous", timeout)
        for name in scenarios:
            try:
                found[name] = run(name, folder)
            except pytest.skip.Exception as reason:  # the version is too old, on every rank
                found[SKIPPED][name] = str(reason)
        dist.barrier()
        dist.destroy_process_group()
        for index, name in enumerate(alone):
            start_group(rank, world, folder / f"rendezvous{index}", 20)
            dist.barrier()
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=STRANDED), dist.group.WORLD)
            found[name] = run(name, folder)
            dist.destroy_process_group()
        torch.save(found, folder / f"rank{rank}.pt")
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # the other ranks are waiting for this one


#: Seconds after which a rank that waits for another one in vain gives up.
STRANDED = 6
