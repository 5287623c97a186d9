"""All that one sample measures of all layers, in one table that is copied to the host at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_bn.functional.monitoring.batch_deviation import BatchWindow
from lightning_bn.functional.monitoring.diagnosis import COLLAPSED_BELOW
from lightning_bn.functional.monitoring.health import Health, initial_shares, newly_collapsed
from lightning_bn.functional.statistics.drift_measures import Measure, of_standardized, standardized
from lightning_bn.functional.statistics.snapshots import Snapshot
from lightning_bn.functional.statistics.summary import summary_scalars


@dataclass(frozen=True)
class LayerTable:
    """Measurements of L layers, float64, shape ``(L,)``, but for the summary.

    Attributes:
        summary: What :func:`~lightning_bn.functional.statistics.drift_measures.read_summary` reads.
        largest: The largest drift of a layer's channels.
        explosion: Geometric mean over the channels of variance over that of the reference.
        newly_collapsed: Channels whose variance is below ``eps`` and was not at the reference.
        collapsed: Channels whose variance is below ``eps``.
        nonfinite: Channels with statistics that are not finite.
        updates: Updates per training batch; NaN where it is not known.
        reset: 1 where a layer was reset since the last sample.
        changed: 1 where any value differs from the last sample's.
        initial_share: Share of initial values in the moving average.
        bias: Mean distance of batch means from the moving average, in standard deviations.
        scatter: Deviation of batch means around that.
        gap: Mean distance of this process's batches from those of all.
    """

    summary: Tensor
    largest: Tensor
    explosion: Tensor
    newly_collapsed: Tensor
    collapsed: Tensor
    nonfinite: Tensor
    updates: Tensor
    reset: Tensor
    changed: Tensor
    initial_share: Tensor
    bias: Tensor
    scatter: Tensor
    gap: Tensor

    def to_host(self) -> LayerTable:
        """Return the same table on the CPU; waits for the device once."""
        columns: list[Tensor] = [getattr(self, field.name) for field in fields(self)]
        return LayerTable(*torch.cat(columns).cpu().split([len(column) for column in columns]))


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
    return LayerTable(
        summary=torch.stack(summary_scalars(values, shift, ratio, threshold)),
        largest=layout.max(values),
        explosion=layout.mean(ratio.log()).exp(),
        newly_collapsed=newly_collapsed(current, reference, momentum, COLLAPSED_BELOW),
        collapsed=health.collapsed,
        nonfinite=health.nonfinite,
        updates=health.updates,
        reset=health.reset.to(torch.float64),
        changed=health.changed.to(torch.float64),
        initial_share=initial_shares(current, momentum),
        bias=window.innovations.bias(layout),
        scatter=window.innovations.scatter(layout),
        gap=window.gaps.bias(layout),
    )
