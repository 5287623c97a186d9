"""What a diagnosis rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """What is known of L layers at one sample, L values each.

    Attributes:
        names: Of the layers.
        training: Whether a layer is in train mode.
        frozen_by: Who froze its statistics; empty if nobody.
        nonfinite: Channels with statistics that are not finite, on the process that has most of them.
        nonfinite_here: Those of this process.
        collapsed: Channels whose variance is below ``eps`` and was not at the reference.
        explosion: Geometric mean over the channels of variance over that of the reference.
        updates: Updates per training batch; NaN where it is not known.
        changed: Whether any value differs from the last sample's.
        idle: Training batches since the last update.
        samples: In a training batch; None if that is not known.
        judged: How many batches the next three rest on.
        bias: Mean distance of batch means from the moving average, in standard deviations.
        scatter: Deviation of batch means around that.
        gap: Mean distance of this rank's batches from those of all ranks; 0 in one process.
        processes: That train together.
        synchronized: Whether a layer normalizes the batches of several of them together.
    """

    names: Sequence[str]
    training: Sequence[bool]
    frozen_by: Sequence[str]
    nonfinite: Sequence[float]
    nonfinite_here: Sequence[float]
    collapsed: Sequence[float]
    explosion: Sequence[float]
    updates: Sequence[float]
    changed: Sequence[bool]
    idle: Sequence[int]
    samples: int | None
    judged: int
    bias: Sequence[float]
    scatter: Sequence[float]
    gap: Sequence[float]
    processes: int
    synchronized: Sequence[bool]
