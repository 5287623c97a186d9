"""What the processes of a distributed run gathered, merged into the same numbers on every one of them.

One float64 all_reduce whatever the number of layers, and one small one before it, by which the processes agree that
they mean the same layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.functional.collecting import Collected
from lightning_bn.functional.moments import Moments, variance


@dataclass(frozen=True)
class Pooled:
    """What is known of one layer over all processes.

    Attributes:
        moments: Pooled over all batches, ``count`` of shape ``()``, the others ``(C,)``, float64.
        mean_error: Squared deviations of the mean, see :meth:`~.spread.Spread.squared_deviations`; ``(C,)``.
        var_error: Of the variance.
        averages: Sums over uses of batch mean and unbiased batch variance, ``(2, C)``.
        uses: Forwards with finite statistics.
        nonfinite: Forwards left out.
    """

    moments: Moments
    mean_error: Tensor
    var_error: Tensor
    averages: Tensor
    uses: int
    nonfinite: int


@dataclass(frozen=True)
class Totals:
    """Counts over all processes.

    Attributes:
        batches: Used.
        skipped: Left out.
        samples: In those used; None if a process cannot count its own.
    """

    batches: int
    skipped: int
    samples: int | None


def alone(gathered: Mapping[str, Collected]) -> dict[str, Pooled]:
    """What one process gathered, as if it were all of them."""
    pooled = {}
    for name, found in gathered.items():
        mean_error, var_error = found.spread.squared_deviations(found.moments)
        pooled[name] = Pooled(found.moments, mean_error, var_error, found.averages, found.uses, found.nonfinite)
    return pooled


def agree_on_layers(layers: Mapping[str, int], device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Returns where all processes mean the same layers with the same channels, and raises on all of them otherwise.

    Args:
        layers: Channels by name.
        device: Where the process group can communicate.
        group: Which processes; None for all.

    Raises:
        RuntimeError: On every process, with the layers of this one and those that differ.
    """
    digest = hashlib.sha256(repr(sorted(layers.items())).encode()).digest()
    number = torch.tensor(int.from_bytes(digest[:7], "big"), dtype=torch.int64, device=device)
    bounds = torch.stack((number, -number))
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = bounds.tolist()
    if largest == -smallest:
        return
    plans: list[dict[str, int] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(plans, dict(layers), group=group)
    told = "; ".join(f"rank {rank}: {len(plan or {})} layers" for rank, plan in enumerate(plans))
    others = [plan for plan in plans if plan != dict(layers) and plan is not None]
    differing = sorted({name for plan in others for name, _ in plan.items() ^ layers.items()})
    raise RuntimeError(
        f"the processes would recalibrate different layers ({told}); they differ in {differing[:5]}. All ranks need "
        f"the same model, the same selection and the same layers frozen. Nothing was changed."
    )


def across_processes(
    gathered: Mapping[str, Collected] | None,
    layers: Mapping[str, int],
    totals: Totals,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> tuple[dict[str, Pooled], Totals]:
    """What all processes gathered, the same bits on every one of them; one all_reduce.

    Args:
        gathered: What this process gathered; None if it failed, so that the others are told instead of left waiting.
        layers: Channels by name, the same on every process.
        totals: Counts of this process.
        device: Where the process group can communicate.
        group: Which processes; None for all.

    Raises:
        RuntimeError: On the processes that did not fail, if another one did.
    """
    rows = _rows(gathered, layers, device)
    uncounted = float(totals.samples is None)
    counts = [float(gathered is None), totals.batches, totals.skipped, totals.samples or 0, uncounted]
    forwards = [(0, 0) if gathered is None else (gathered[n].uses, gathered[n].nonfinite) for n in layers]
    counts += [float(value) for pair in forwards for value in pair]
    extra = torch.tensor(counts, dtype=torch.float64, device=device)
    flat = torch.cat((extra, rows.flatten()))
    dist.all_reduce(flat, group=group)
    failed, batches, skipped, samples, uncounted = flat[:5].tolist()
    if failed and gathered is not None:
        raise RuntimeError(
            f"recalibration failed on {int(failed)} of {dist.get_world_size(group)} processes, whose own error says "
            f"why. Nothing was changed on this one."
        )
    heads = flat[5 : len(extra)].view(-1, 2).tolist()
    summed = _from_rows(flat[len(extra) :].view(rows.shape), layers, heads)
    return summed, Totals(int(batches), int(skipped), None if uncounted else int(samples))


def _rows(gathered: Mapping[str, Collected] | None, layers: Mapping[str, int], device: torch.device) -> Tensor:
    """One row for each sum, one column for each channel: count, sum, sum of squares, errors and averages."""
    if gathered is None:
        return torch.zeros(7, sum(layers.values()), dtype=torch.float64, device=device)
    parts = []
    for found in alone({name: gathered[name] for name in layers}).values():
        count, mean, m2 = found.moments
        rows = (
            count.expand_as(mean),
            count * mean,
            m2 + count * mean.square(),
            # Fewer than two batches have no spread to add.
            found.mean_error.nan_to_num(posinf=0.0, nan=0.0),
            found.var_error.nan_to_num(posinf=0.0, nan=0.0),
            *found.averages,
        )
        parts.append(torch.stack([row.to(device, torch.float64) for row in rows]))
    return torch.cat(parts, dim=1)


def _from_rows(rows: Tensor, layers: Mapping[str, int], heads: list[list[float]]) -> dict[str, Pooled]:
    pooled = {}
    for (name, part), (uses, nonfinite) in zip(
        zip(layers, rows.split(list(layers.values()), dim=1), strict=True), heads, strict=True
    ):
        count, total, squares = part[0], part[1], part[2]
        mean = total / count.clamp(min=1)
        moments = Moments(count[0], mean, (squares - count * mean.square()).clamp(min=0))
        pooled[name] = Pooled(moments, part[3], part[4], part[5:7], int(uses), int(nonfinite))
    return pooled


def statistics(found: Pooled, estimator: str) -> tuple[Tensor, Tensor]:
    """Mean and variance to be stored, ``(C,)`` each: pooled and unbiased, or means over batches."""
    if estimator == "mean_of_batches":
        mean, var = found.averages / max(found.uses, 1)
        return mean, var
    return found.moments.mean, variance(found.moments)
