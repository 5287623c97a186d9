"""What the processes of a distributed run gathered, merged into the same numbers on all of them, by one all_reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.functional.distributed.waiting import waiting
from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments


@dataclass(frozen=True)
class Totals:
    """Counts over all processes.

    Attributes:
        batches: Used.
        skipped: Left out.
        samples: In those used; None if a process cannot count its own.
        ended_early: Processes whose data ended before what was asked for.
    """

    batches: int
    skipped: int
    samples: int | None
    ended_early: int


def across_processes(
    gathered: Population | None,
    layout: ChannelLayout,
    eps: tuple[float, ...],
    totals: Totals,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> tuple[Population, Totals]:
    """What all processes gathered, the same bits on every one of them; one all_reduce.

    Args:
        gathered: What this process gathered; None if it failed, so that the others are told instead of left waiting.
        layout: Of the layers, the same on every process.
        eps: Of the layers.
        totals: Counts of this process.
        device: Where the process group can communicate.
        group: Which processes; None for all.

    Raises:
        RuntimeError: On the processes that did not fail, if another one did.
    """
    size = layout.channels
    rows = torch.zeros(8, size, dtype=torch.float64) if gathered is None else _rows(gathered)
    counts = [
        gathered is None,
        totals.batches,
        totals.skipped,
        totals.samples or 0,
        totals.samples is None,
        totals.ended_early,
    ]
    uses = [0 if gathered is None else gathered.uses[name] for name in layout.names]
    nonfinite = [0 if gathered is None else gathered.nonfinite[name] for name in layout.names]
    heads = torch.tensor([float(value) for value in (*counts, *uses, *nonfinite)], dtype=torch.float64)
    flat = torch.cat((heads.to(device), rows.to(device).flatten()))
    with waiting("this process"):
        dist.all_reduce(flat, group=group)
        heads, rows = flat[: len(heads)].cpu(), flat[len(heads) :].view(8, size)
    failed, batches, skipped, samples, uncounted, ended_early = heads[:6].tolist()
    if failed and gathered is not None:
        raise RuntimeError(
            f"recalibration failed on {int(failed)} of {dist.get_world_size(group)} processes, whose own error says "
            f"why. Nothing was changed on this one."
        )
    by_layer = heads[6:].view(2, -1).int().tolist()
    count, total, squares = rows[0], rows[1], rows[2]
    mean = total / count.clamp(min=1)
    pooled = Population(
        layout=layout,
        moments=Moments(count, mean, (squares - count * mean.square()).clamp(min=0)),
        mean_error=torch.where(rows[7] > 0, torch.inf, rows[3]),
        var_error=torch.where(rows[7] > 0, torch.inf, rows[4]),
        averages=rows[5:7],
        eps=layout.constant(eps, rows.device),
        uses=dict(zip(layout.names, by_layer[0], strict=True)),
        nonfinite=dict(zip(layout.names, by_layer[1], strict=True)),
    )
    return pooled, Totals(int(batches), int(skipped), None if uncounted else int(samples), int(ended_early))


def _rows(gathered: Population) -> Tensor:
    """A row for each sum, a column for each channel: count, sum, squares, errors, averages, and where none is known."""
    count, mean, m2 = (values.to(torch.float64) for values in gathered.moments)
    # A single batch has no spread to add, and leaves the error unknown.
    unknown = (count > 0) & ~gathered.mean_error.isfinite()
    errors = [e.to(torch.float64).nan_to_num(nan=0.0, posinf=0.0) for e in (gathered.mean_error, gathered.var_error)]
    return torch.stack(
        (
            count,
            count * mean,
            m2 + count * mean.square(),
            *errors,
            *gathered.averages.to(torch.float64),
            unknown.to(count),
        )
    )
