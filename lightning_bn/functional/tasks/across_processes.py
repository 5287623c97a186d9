"""Statistics of each task that the processes of a run keep, merged into the same numbers on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.functional.distributed.waiting import waiting
from lightning_bn.functional.tasks.task_sets import Buffers


def merge_across_processes(
    parts: Sequence[tuple[str, Mapping[str, Buffers]]], samples: Mapping[str, float], device: torch.device
) -> None:
    """Merge sets of statistics in place, with one all_gather for all of them; every process has to call this.

    Means are averaged, weighted by the samples that each process saw of the task. The variance is the average of
    variances plus the variance of means. Sets of a task that no process saw are left alone; what all processes hold
    alike stays as it is, bit for bit.

    Args:
        parts: Tasks and their sets by layer, the same on every process; a task may have several.
        samples: By task, that this process has seen since it last merged; 0 where a task is missing.
        device: Where the process group can communicate.

    Raises:
        RuntimeError: If another process did not come.

    Source: the law of total variance.
    """
    with torch.no_grad():
        here = torch.cat([_packed(sets, samples.get(task, 0)).to(device) for task, sets in parts])
        of_all = [torch.empty_like(here) for _ in range(dist.get_world_size())]
        with waiting("this process"):
            dist.all_gather(of_all, here)
        rows = torch.stack(of_all).cpu()
        for _, sets in parts:
            size = 1 + sum(buffer.numel() for one in sets.values() for buffer in one.values())
            _write(rows[:, :size], sets)
            rows = rows[:, size:]


def _packed(sets: Mapping[str, Buffers], samples: float) -> Tensor:
    """The weight, then every value, float64."""
    values = [buffer.detach().reshape(-1).double().cpu() for one in sets.values() for buffer in one.values()]
    return torch.cat([torch.tensor([samples], dtype=torch.float64), *values])


def _write(rows: Tensor, sets: Mapping[str, Buffers]) -> None:
    """Merge the rows of all processes, (P, 1 + values), into sets."""
    seen = rows[rows[:, 0] > 0]
    if not len(seen):
        return
    weights = (seen[:, :1] / seen[:, 0].sum()).double()
    at = 1
    for one in sets.values():
        values = {key: seen[:, at + start : at + end] for key, (start, end) in _places(one).items()}
        at += sum(buffer.numel() for buffer in one.values())
        spread = _average((values["running_mean"] - _average(values["running_mean"], weights)).square(), weights)
        for key, buffer in one.items():
            if key == "num_batches_tracked":
                merged = values[key].amax(0)
            else:
                merged = _average(values[key], weights) + (spread if key == "running_var" else 0)
            buffer.copy_(merged.reshape(buffer.shape))


def _places(one: Buffers) -> dict[str, tuple[int, int]]:
    ends = torch.tensor([buffer.numel() for buffer in one.values()]).cumsum(0).tolist()
    return dict(zip(one, zip([0, *ends], ends, strict=False), strict=True))


def _average(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over processes, exact where all are alike."""
    return values[0] + (weights * (values - values[0])).sum(0)
