"""Recalibrations per task of several real processes; what each rank was left with, for the tests to compare."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lightning_bn
from lightning_bn.functional import recalibrate
from lightning_bn.functional.tasks import TaskStatistics, task_statistics
from tests.functional.recalibration.recalibrating_ranks import counted_collectives
from tests.models import SmallResNet, bits, fill_statistics, images, seeded
from tests.oracle import everything
from tests.ranks import take_part
from tests.synced import synchronized

TASKS = ["a", "b", "c"]
Batch = tuple[Tensor, str]


class Beside(nn.Module):
    """Two networks that do not feed each other; one of them has statistics per task."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.without = SmallResNet(), SmallResNet(5)

    def forward(self, x: Tensor) -> None:
        self.shared(x)
        self.without(x)


def network() -> nn.Module:
    return fill_statistics(seeded(Beside)).double().train()


def with_bank(model: nn.Module, tasks: list[str] = TASKS) -> TaskStatistics:
    return task_statistics(model, tasks, "shared")


def shard(rank: int, order: str) -> list[Batch]:
    return [
        (images(3 + seed % 4, seed=100 * rank + seed, dtype=torch.float64) * (1 + TASKS.index(task)) + rank, task)
        for seed, task in enumerate(order)
    ]


def task_of(one: Batch) -> str:
    return one[1]


def labelled(model: nn.Module, one: Batch) -> None:
    with lightning_bn.task(one[1]):
        model(one[0])


#: Name -> the tasks of each rank's batches, and what recalibrate is given.
RIGHT: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "each task on both": (("abcab", "babc"), {"task_of": task_of}),
    "by contexts": (("abcab", "babc"), {"forward": labelled}),
    "a rank without a task": (("aabba", "ccac"), {"task_of": task_of}),
    "a rank with one task": (("aaa", "bbb"), {"task_of": task_of}),
    "a task nobody has": (("aba", "bab"), {"task_of": task_of}),
    "prior": (("abcab", "ccac"), {"task_of": task_of, "prior": 16}),
    "num_batches": (("aaaabbab", "baaaaacb"), {"task_of": task_of, "num_batches": 2}),
}
SYNCHRONIZED: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "synchronized": (("abcab", "abca"), {"task_of": task_of}),
    "synchronized, by contexts": (("abcab", "abca"), {"forward": labelled}),
    "synchronized, num_batches": (("aaabaac", "aaabaac"), {"task_of": task_of, "num_batches": 2}),
    "synchronized, num_samples": (("aaabaac", "aaabaac"), {"task_of": task_of, "num_samples": 9}),
}
FAULTS: dict[str, Callable[[int], tuple[list[str], str, dict[str, Any], bool]]] = {
    "an unknown task on one": lambda rank: (TASKS, "ab", {"task_of": lambda one: "d" if rank else "a"}, False),
    "nothing tells": lambda rank: (TASKS, "ab", {}, False),
    "other tasks": lambda rank: (TASKS if rank else ["a", "b", "d"], "ab", {"task_of": task_of}, False),
    "synchronized, different tasks": lambda rank: (TASKS, "aab" if rank else "abb", {"task_of": task_of}, True),
    "synchronized, different contexts": lambda rank: (TASKS, "ab" if rank else "aa", {"forward": labelled}, True),
}


def run(name: str, folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    if name in FAULTS:
        tasks, order, options, sync = FAULTS[name](rank)
    else:
        (orders, options), tasks = {**RIGHT, **SYNCHRONIZED}[name], TASKS
        order, sync = orders[rank], name in SYNCHRONIZED
    model = synchronized(network(), None, (), "cpu") if sync else network()
    bank = with_bank(model, tasks)
    before = everything(model), {task: bits(bank.snapshot(task).mean) for task in tasks}
    told, found = "", {}
    with counted_collectives() as called:
        try:
            done = recalibrate(model, shard(rank, order), distributed=True, **options)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        else:
            found = {
                "amounts": {task: (one.num_batches, one.num_samples) for task, one in done.tasks.items()},
                "errors": {task: one.standard_error for task, one in done.tasks.items()},
                "layers": {task: list(one.layers) for task, one in done.tasks.items()},
                "said": str(done),
                "without": [done.after.mean, done.after.var],
            }
    held = {task: [bank.snapshot(task).mean, bank.snapshot(task).var] for task in tasks}
    unchanged = (everything(model), {task: bits(values[0]) for task, values in held.items()}) == before
    return {**found, "told": told, "sets": held, "collectives": called, "unchanged": unchanged}


if __name__ == "__main__":
    take_part(run, [*FAULTS, *RIGHT, *SYNCHRONIZED], [])
