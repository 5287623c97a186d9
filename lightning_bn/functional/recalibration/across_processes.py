"""What the processes of a distributed run gathered, merged into the same numbers on all of them, by one all_reduce."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_bn.functional.distributed.waiting import waiting
from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.recalibration.run import Counts
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments


def across_processes(
    gathered: Population | None, layout: ChannelLayout, eps: tuple[float, ...], counts: Counts, device: torch.device
) -> tuple[Population, Counts]:
    """Return what all processes gathered, the same bits on every one of them; one all_reduce.

    Args:
        gathered: What this process gathered; None if it failed, so that the others are told instead of left waiting.
        layout: Of the layers, the same on every process.
        eps: Of the layers.
        counts: Of this process.
        device: Where the process group can communicate.

    Raises:
        RuntimeError: On the processes that did not fail, if another one did.
    """
    nothing = torch.zeros(len(layout) * 3 + 10 * layout.channels, dtype=torch.float64, device=device)
    samples = counts.samples or 0, counts.samples is None
    head = (gathered is None, counts.batches, counts.skipped, *samples, counts.ended_early)
    head_tensor = torch.tensor(head, dtype=torch.float64, device=device)
    flat = torch.cat((head_tensor, nothing if gathered is None else _packed(gathered).to(device)))
    with waiting("this process"):
        dist.all_reduce(flat)
        flat = flat.cpu()
    failed, batches, skipped, total, uncounted, ended_early = flat[: len(head)].int().tolist()
    if failed and gathered is not None:
        raise RuntimeError(
            f"recalibration failed on {failed} of {dist.get_world_size()} processes, whose own error says "
            f"why. Nothing was changed on this one."
        )
    uses, nonfinite, empty, rows = flat[len(head) :].split((*[len(layout)] * 3, 10 * layout.channels))
    count, sums, squares, mean_error, var_error, *others, unknown = rows.view(10, -1)
    mean = sums / count.clamp(min=1)
    moments = Moments(count, mean, (squares - count * mean.square()).clamp(min=0))
    errors = torch.where(unknown > 0, torch.inf, torch.stack((mean_error, var_error)))
    eps_of = layout.constant(eps, flat.device)
    averages, apart = torch.stack(others).split(2)
    pooled = Population(layout, moments, errors, averages, apart, eps_of, uses, nonfinite, empty)
    return pooled, Counts(batches, skipped, None if uncounted else total, ended_early)


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
