"""Sets of several processes merged over gloo: what each holds afterwards, and how many collectives that took."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bn.functional import task_statistics
from lightning_bn.functional.tasks.across_processes import merge_across_processes
from tests.ranks import take_part

CHANNELS = 3


def inputs(task: int, rank: int) -> Tensor:
    """What a rank saw of a task: other means, and other numbers of samples."""
    generator = torch.Generator().manual_seed(100 * task + rank)
    return torch.randn(5 + 7 * rank, CHANNELS, generator=generator, dtype=torch.float64) * (1 + rank) + task + rank


def run(name: str, folder: Path) -> dict[str, Any]:
    """Sets of some tasks, of which the last one was seen by rank 0 alone, or by nobody."""
    tasks = [f"task {index}" for index in range(int(name.split(maxsplit=1)[0]))]
    model = nn.Sequential(nn.BatchNorm1d(CHANNELS, momentum=1.0), nn.Identity(), nn.BatchNorm1d(CHANNELS, momentum=1.0))
    bank = task_statistics(model.double(), tasks, start="shared")
    rank, samples = dist.get_rank(), dict[str, int]()
    for index, task in enumerate(tasks):
        if "nobody" in name or ("alone" in name and index == len(tasks) - 1 and rank):
            continue
        with bank.task(task):
            model(inputs(index, rank))
        samples[task] = len(inputs(index, rank))
    counted: Counter[str] = Counter()
    gather = dist.all_gather

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted["all_gather"] += 1
        return gather(*args, **kwargs)

    before = {task: {name: dict(one) for name, one in sets.items()} for task, sets in bank.parts()}
    dist.all_gather = counting
    try:
        merge_across_processes(bank.parts(), samples, torch.device("cpu"))
        first = {
            task: {n: {k: b.clone() for k, b in one.items()} for n, one in sets.items()} for task, sets in bank.parts()
        }
        merge_across_processes(bank.parts(), samples, torch.device("cpu"))
    finally:
        dist.all_gather = gather
    parts = dict(bank.parts())
    return {
        "collectives": counted["all_gather"] / 2,
        "first": {task: sets["0"] for task, sets in first.items()},
        "again": {task: sets["0"] for task, sets in parts.items()},
        "in place": all(
            parts[task][n][k] is one[k] for task, sets in before.items() for n, one in sets.items() for k in one
        ),
    }


SCENARIOS = ["1 task", "8 tasks", "2 tasks, one alone", "2 tasks that nobody saw"]

if __name__ == "__main__":
    take_part(run, SCENARIOS, [])
