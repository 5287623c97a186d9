"""What the processes of a distributed run gathered, merged into the same numbers on all of them, by one all_reduce."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.functional.distributed.waiting import waiting
from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.recalibration.run import Counts
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments


def across_processes(
    gathered: Mapping[str | None, Population] | None,
    layers: Mapping[str | None, tuple[ChannelLayout, tuple[float, ...]]],
    counts: Mapping[str | None, Counts],
    device: torch.device,
    told: tuple[int, int] = (0, 0),
) -> tuple[dict[str | None, Population], dict[str | None, Counts], tuple[int, int]]:
    """Return what all processes gathered, the same bits on every one of them; one all_reduce.

    Args:
        gathered: What this process gathered, by task; None if it failed, so that the others are told instead of left
            waiting.
        layers: Of each task their layout and ``eps``, the same on every process.
        counts: Of this process, by task.
        device: Where the process group can communicate.
        told: Numbers that are summed up too.

    Raises:
        RuntimeError: On the processes that did not fail, if another one did.
    """
    flat = torch.cat(
        (
            torch.tensor((gathered is None, *told), dtype=torch.float64, device=device),
            *(_counted(one).to(device) for one in counts.values()),
            *(
                torch.zeros(_size(layout), dtype=torch.float64, device=device)
                if gathered is None
                else _packed(gathered[key]).to(device)
                for key, (layout, _) in layers.items()
            ),
        )
    )
    with waiting("this process"):
        dist.all_reduce(flat)
        flat = flat.cpu()
    failed, *of_all = flat[:3].int().tolist()
    if failed and gathered is not None:
        raise RuntimeError(
            f"recalibration failed on {failed} of {dist.get_world_size()} processes: look for their errors. Nothing "
            "was changed on this process."
        )
    sizes = [5] * len(counts) + [_size(layout) for layout, _ in layers.values()]
    parts = iter(flat[3:].split(sizes))
    merged = {}
    for key in counts:
        batches, skipped, total, uncounted, ended_early = next(parts).int().tolist()
        merged[key] = Counts(batches, skipped, None if uncounted else total, ended_early)
    return {key: _unpacked(next(parts), *one) for key, one in layers.items()}, merged, (of_all[0], of_all[1])


def _size(layout: ChannelLayout) -> int:
    return len(layout) * 3 + 10 * layout.channels


def _counted(counts: Counts) -> Tensor:
    samples = counts.samples or 0, counts.samples is None
    return torch.tensor((counts.batches, counts.skipped, *samples, counts.ended_early), dtype=torch.float64)


def _unpacked(flat: Tensor, layout: ChannelLayout, eps: tuple[float, ...]) -> Population:
    uses, nonfinite, empty, rows = flat.split((*[len(layout)] * 3, 10 * layout.channels))
    count, sums, squares, mean_error, var_error, *others, unknown = rows.view(10, -1)
    mean = sums / count.clamp(min=1)
    moments = Moments(count, mean, (squares - count * mean.square()).clamp(min=0))
    errors = torch.where(unknown > 0, torch.inf, torch.stack((mean_error, var_error)))
    averages, apart = torch.stack(others).split(2)
    return Population(
        layout, moments, errors, averages, apart, layout.constant(eps, flat.device), uses, nonfinite, empty
    )


def _packed(gathered: Population) -> Tensor:
    """Everything that is summed up: uses, non-finite and empty forwards of each layer, then a row for each sum.

    The rows are count, sum, squares, errors of mean and variance, averages, uses apart, and where no error is known.
    """
    count, mean, m2 = gathered.moments
    # A single batch has no deviation to add, and leaves the error unknown.
    unknown = (count > 0) & ~gathered.errors[0].isfinite()
    sums = torch.stack((count, count * mean, m2 + count * mean.square()))
    rows = torch.cat(
        (
            sums,
            gathered.errors.nan_to_num(nan=0.0, posinf=0.0),
            gathered.averages,
            gathered.apart,
            unknown.to(count)[None],
        )
    )
    return torch.cat((gathered.uses, gathered.nonfinite, gathered.empty, rows.flatten()))
