"""What a switch of statistics costs: against a snapshot taken and restored, and in a training step."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from statistics import median
from typing import Any

import torch
from _networks import resnet50, seeded
from _processes import on_processes
from _results import Results
from _rounds import Clock, Comparison, compare
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn.functional import TaskStatistics, restore_snapshot, take_snapshot, task_statistics
from lightning_bn.functional.distributed.agreement import agree

ROUNDS, SWITCHES = 60, 20
TURNS = 60
TASKS = [f"task {index}" for index in range(12)]


class Counted(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def switches(clock: Clock, count: int) -> dict[str, object]:
    """In and out of a context of one of ``count`` tasks, against a snapshot taken and restored."""
    model = seeded(resnet50)
    bank = task_statistics(model, TASKS[:count], start="shared")

    def switch() -> None:
        with bank.task(TASKS[1]):
            pass

    def snapshot() -> None:
        restore_snapshot(model, take_snapshot(model))

    bank.outside.begin(lambda message: None)  # a snapshot that is restored is no forward
    times: dict[Callable[[], None], list[float]] = {switch: [], snapshot: []}
    for _ in range(ROUNDS):
        for act, taken in times.items():
            act()
            begun = clock.now()
            for _ in range(SWITCHES):
                act()
            taken += [seconds / SWITCHES for seconds in clock.seconds([(begun, clock.now())])]
    with Counted() as counted:
        switch()
    found = compare(times[switch], times[snapshot])
    per_layer = 1e6 * found.seconds / 2 / len(bank.layers)
    # In and out are two switches.
    return {
        "tasks": count,
        "us per layer and switch": per_layer,
        "snapshot, us": 1e6 * found.base,
        "ratio of a switch": found.ratio / 2,
        "median": found.median / 2,
        "operators": counted.operators,
    }


def steps(clock: Clock) -> list[dict[str, object]]:
    """A training step with its statistics put in place and taken out, against one without."""
    images = torch.randn(2, 3, 32, 32)
    networks = {name: seeded(resnet50) for name in ("no statistics per task", "two switches", "none again")}
    bank = task_statistics(networks["two switches"], TASKS[:3], start="shared")
    names = cycle(bank.tasks[1:])

    def contexts(name: str) -> AbstractContextManager[None]:
        return bank.task(next(names)) if name == "two switches" else nullcontext()

    return [
        {"step": name, "ms": 1e3 * found.seconds, "ratio": found.ratio, "median": found.median}
        for name, found in _compared(networks, images, clock, contexts).items()
    ]


def _compared(
    networks: dict[str, nn.Module],
    images: torch.Tensor,
    clock: Clock,
    contexts: Callable[[str], AbstractContextManager[None]],
) -> dict[str, Comparison]:
    times: dict[str, list[float]] = {name: [] for name in networks}
    optimizers = {name: torch.optim.SGD(network.parameters(), lr=0.0) for name, network in networks.items()}
    for turn in range(TURNS + 3):
        for name, network in networks.items():
            begun = clock.now()
            with contexts(name):
                optimizers[name].zero_grad()
                network(images).square().mean().backward()
                optimizers[name].step()
            if turn >= 3:
                times[name] += clock.seconds([(begun, clock.now())])
    return {name: compare(taken, times["no statistics per task"]) for name, taken in times.items()}


def memory() -> list[dict[str, object]]:
    """Bytes of one more task."""
    bank: TaskStatistics = task_statistics(seeded(resnet50), TASKS[:2])
    sets = dict(bank.parts())[TASKS[1]]
    held = sum(buffer.untyped_storage().nbytes() for one in sets.values() for buffer in one.values())
    return [{"network": "ResNet-50", "layers": len(sets), "bytes per task": held}]


def agreement(rank: int, processes: int) -> list[float]:
    """Seconds of agreeing on the task of a batch, call by call, waiting included."""
    seconds = []
    for index in range(300):
        begun = time.perf_counter()
        agree({"task": TASKS[index % 2]}, torch.device("cpu"), doing="train")
        seconds.append(time.perf_counter() - begun)
    return seconds[50:]


def main() -> None:
    """Prints the tables and writes them to `benchmarks/results/`."""
    torch.manual_seed(0)
    clock = Clock(torch.device("cpu"))
    results = Results("tasks", "What statistics per task cost in a ResNet-50, 53 layers.")
    results.table(
        "A switch, against taking and restoring a snapshot",
        [switches(clock, count) for count in (2, 12)],
        f"Fastest of {ROUNDS} turns of {SWITCHES}. In and out of a context are two switches.",
    )
    results.table(
        "A training step with two switches",
        steps(clock),
        f"{TURNS} turns, 2 images of 32x32. The last row is the measurement's own error.",
    )
    waited = {processes: on_processes(agreement, processes) for processes in (2, 4)}
    results.table(
        "Agreeing on the task of a batch, one small all_reduce a step",
        [
            {"processes": processes, "us, fastest": 1e6 * min(seconds), "us, median": 1e6 * median(seconds)}
            for processes, seconds in waited.items()
        ],
        "Only where ranks share the statistics of a batch: broadcast buffers or SyncBatchNorm. Wall time, gloo.",
    )
    results.table("Memory", memory())
    results.write()


if __name__ == "__main__":
    main()
