"""All that one sample knows of all layers: what was measured, in one table that is copied to the host at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_bn.functional.monitoring.batch_deviation import BatchWindow
from lightning_bn.functional.monitoring.health import Health, initial_shares, newly_collapsed
from lightning_bn.functional.statistics.drift_measures import Measure, of_standardized, standardized
from lightning_bn.functional.statistics.snapshots import Snapshot
from lightning_bn.functional.statistics.summary import summary_scalars

_COLLAPSED_BELOW = 0.02
"""Variance over that of the reference, ``eps`` added to both, that a channel has to fall below to have collapsed."""


@dataclass(frozen=True)
class LayerTable(Health):
    """Measurements of L layers beside their health, each but for the summary of shape ``(L,)``; float64 on the host.

    Attributes:
        summary: What :func:`~lightning_bn.functional.statistics.drift_measures.read_summary` reads.
        largest: The largest drift of a layer's channels.
        explosion: Geometric mean over the channels of variance over that of the reference.
        newly_collapsed: Channels whose variance is below ``eps`` and was not at the reference.
        initial_share: Share of initial values in the moving average.
        bias: Mean distance of batch means from the moving average, in standard deviations.
        scatter: Deviation of batch means around that.
        apart: Mean distance of later uses of a layer in one batch from the first, in standard deviations.
        gap: Mean distance of this process's batches from those of all; of the process where it is largest.
        nonfinite_anywhere: Channels with statistics that are not finite, on the process that has most of them.
        largest_anywhere: ``largest`` of the process where it is largest; infinite where it is not a number.
    """

    summary: Tensor
    largest: Tensor
    explosion: Tensor
    newly_collapsed: Tensor
    initial_share: Tensor
    bias: Tensor
    scatter: Tensor
    apart: Tensor
    gap: Tensor
    nonfinite_anywhere: Tensor
    largest_anywhere: Tensor

    def without(self, layers: Tensor) -> LayerTable:
        """Return the same table with nothing of some layers, ``(L,)``, but the gap between processes."""
        kept = ("summary", "gap")
        blank = {name: torch.where(layers, 0, one) for name, one in vars(self).items() if name not in kept}
        return replace(self, **blank)

    def row(self, index: int) -> dict[str, float]:
        """Return what was measured of one layer, by name."""
        return {name: float(column[index]) for name, column in vars(self).items() if name != "summary"}


def over_ranks(tables: Sequence[LayerTable], max_over_ranks: Callable[[Tensor], Tensor]) -> list[LayerTable]:
    """Return the same tables with what is of all processes, which exchange one tensor."""
    here = [torch.stack((one.gap, one.nonfinite_anywhere, one.largest_anywhere)) for one in tables]
    everywhere = max_over_ranks(torch.cat(here, 1)).split([one.shape[1] for one in here], 1)
    return [
        replace(one, gap=gap, nonfinite_anywhere=nonfinite, largest_anywhere=largest)
        for one, (gap, nonfinite, largest) in zip(tables, everywhere, strict=True)
    ]


def to_host(tables: Sequence[LayerTable]) -> list[LayerTable]:
    """Return the same tables on the CPU, in float64; waits for the device once."""
    columns = [column.to(torch.float64) for one in tables for column in vars(one).values()]
    there = torch.cat(columns).cpu().split([len(column) for column in columns])
    width = len(fields(LayerTable))
    return [LayerTable(*there[start : start + width]) for start in range(0, len(there), width)]


@dataclass(frozen=True)
class Evidence:
    """What is known of L layers at one sample, on the host.

    Attributes:
        table: What was measured; updates are NaN where it is not known.
        names: Of the layers.
        frozen_by: Who froze each layer's statistics; empty if nobody.
        training: Whether a layer is in train mode, ``(L,)``.
        dtypes: Of the layers' statistics.
        synchronized: Whether a layer normalizes the batches of several processes together, ``(L,)``.
        idle: Training batches since the last update, ``(L,)``.
        samples: In a training batch; None if that is not known.
        judged: How many batches bias, scatter and gap rest on.
        processes: That train together.
        task: Whose statistics these are; None for the layers' own.
        others: Names of the model's other BatchNorm layers.
    """

    table: LayerTable
    names: tuple[str, ...]
    frozen_by: tuple[tuple[str, ...], ...]
    training: Tensor
    dtypes: tuple[str, ...]
    synchronized: Tensor
    idle: Tensor
    samples: int | None
    judged: int
    processes: int
    task: str | None = None
    others: tuple[str, ...] = ()


def measure(
    name: Measure,
    reference: Snapshot,
    current: Snapshot,
    momentum: Tensor,
    health: Health,
    window: BatchWindow,
    threshold: float | None = None,
    unmeasured: Tensor | None = None,
) -> LayerTable:
    """Return what the statistics of now show, without waiting for the device.

    Args:
        name: Of the measure of drift.
        reference: What is measured from.
        current: The statistics now; of the same layers.
        momentum: Of the layers, NaN for a cumulative average.
        health: Of ``current``.
        window: The batches that are judged.
        threshold: Of drift; the share of channels above it is counted.
        unmeasured: Layers whose drift is 0 whatever they are, ``(L,)``; None for none.
    """
    layout = current.layout
    shift, ratio = standardized(reference, current)
    if unmeasured is not None:
        channels = layout.expand(unmeasured)
        shift, ratio = torch.where(channels, 0, shift), torch.where(channels, 1, ratio)
    values = of_standardized(name, shift, ratio, current.weight).abs()
    largest = layout.max(values)
    return LayerTable(
        **vars(health),
        summary=torch.stack(summary_scalars(values, shift, ratio, threshold)),
        largest=largest,
        explosion=layout.mean(ratio.log()).exp(),
        newly_collapsed=newly_collapsed(current, reference, momentum, _COLLAPSED_BELOW),
        initial_share=initial_shares(current, momentum),
        bias=window.innovations.bias(layout),
        scatter=window.innovations.scatter(layout),
        apart=window.uses.bias(layout),
        gap=window.gaps.bias(layout),
        nonfinite_anywhere=health.nonfinite,
        # NaN would lose against numbers in a maximum.
        largest_anywhere=largest.nan_to_num(nan=torch.inf, posinf=torch.inf),
    )
