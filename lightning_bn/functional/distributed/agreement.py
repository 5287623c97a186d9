"""What the processes of a distributed run gathered, merged into the same numbers on every one of them.

One float64 all_reduce whatever the number of layers, and one small one before it, by which the processes agree that
they mean the same layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments

_LOST = ("gloo", "nccl", "connection closed", "connection reset", "timed out")
"""What a collective says in which another process did not take part; gloo raises a plain RuntimeError."""


@contextmanager
def waiting(who: str) -> Iterator[None]:
    """Says in words when the others did not come.

    Args:
        who: Waits.

    Raises:
        RuntimeError: Instead of what the process group raised.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST):
            raise RuntimeError(
                f"{who} waited for another process, which failed, was too late or did something else; its own error "
                f"says why. What was asked for has ended, and nothing was changed on this process."
            ) from error
        raise


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


@contextmanager
def others_told(device: torch.device, doing: str = "recalibrate") -> Iterator[None]:
    """A failure inside is told to the other processes, who wait in :func:`agree_on_layers`."""
    try:
        yield
    except BaseException as error:
        try:
            # That this one means nothing.
            agree_on_layers({}, device, doing=doing)
        except RuntimeError as disagreement:
            raise error from disagreement
        raise


def agree_on_layers(
    layers: Mapping[str, int],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    doing: str = "recalibrate",
) -> None:
    """Returns where all processes mean the same layers with the same channels, and raises on all of them otherwise.

    Args:
        layers: Channels by name, in order; what else has to be the same is a name with 0 channels.
        device: Where the process group can communicate.
        group: Which processes; None for all.
        doing: What is to be done to them, for the error.

    Raises:
        RuntimeError: On every process, with the number of layers on each and the names that differ.
    """
    # In their order, in which their values lie in what is reduced.
    digest = hashlib.sha256(repr(list(layers.items())).encode()).digest()
    number = torch.tensor(int.from_bytes(digest[:7], "big"), dtype=torch.int64, device=device)
    bounds = torch.stack((number, -number))
    with waiting("this process"):
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
        largest, smallest = bounds.tolist()
    if largest == -smallest:
        return
    # The slow way round, to say which.
    plans: list[dict[str, int] | None] = [None] * dist.get_world_size(group)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        dist.all_gather_object(plans, dict(layers), group=group)
    told = "; ".join(f"rank {rank}: {sum(map(bool, (plan or {}).values()))} layers" for rank, plan in enumerate(plans))
    others = [plan for plan in plans if plan != dict(layers) and plan is not None]
    differing = sorted({name for plan in others for name, _ in plan.items() ^ layers.items()})
    how = f"they differ in {differing[:5]}" if differing else "they have the same ones in another order"
    raise RuntimeError(
        f"the processes would {doing} different layers ({told}); {how}. All ranks need the "
        f"same model, selection, settings and frozen layers. Nothing was changed."
    )


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
