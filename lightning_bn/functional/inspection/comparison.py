"""What two checkpoints have in common and how far they lie apart, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_bn.functional.statistics.drift_measures import Measure
from lightning_bn.functional.statistics.summary import in_words


@dataclass(frozen=True)
class ComparedLayer:
    """One layer of two files.

    Attributes:
        name: What both share of its name.
        channels: How many.
        drift: The largest of any channel, absolute; NaN where a value is not finite, or one variance is negative.
        mean_drift: Mean over its channels, absolute.
        channel: The channel with the largest.
        variance_ratio: Second over first variance of that channel, each with torch's own eps of 1e-5.
        mean_shift: Of that channel's mean, in standard deviations of the first file.
        updates: Of the running statistics in the first file and in the second; None without a counter.
        identical: Whether mean and variance are the same in all channels.
    """

    name: str
    channels: int
    drift: float
    mean_drift: float
    channel: int
    variance_ratio: float
    mean_shift: float
    updates: tuple[int | None, int | None]
    identical: bool

    def in_words(self) -> str:
        """The worst channel in plain units."""
        if self.variance_ratio < 0:
            return "negative variance"
        return "not finite" if math.isnan(self.drift) else in_words(self.variance_ratio, self.mean_shift)


@dataclass(frozen=True)
class Comparison:
    """How far the running statistics of two checkpoints lie apart.

    Attributes:
        first: One file.
        second: The other.
        measure: Of drift, from the first to the second.
        layers: In the order of the first file.
        only_first: Names of layers that the first file alone has.
        only_second: Names of layers that the second file alone has.
        other_channels: Layers with other numbers of channels: in the first file and in the second, by name.
        broken_first: Why tensors of the first file that look like a layer's are none, by the name that both share.
        broken_second: The same of the second file.
        recalibrated: Layers of the second file that have the statistics of a recalibration, as it says, by the name
            that both share.
        command: Of a shell, that recalibrates the second file; empty where none does.
        assumed: What was assumed, one sentence each.
    """

    first: Path
    second: Path
    measure: Measure
    layers: tuple[ComparedLayer, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other_channels: Mapping[str, tuple[int, int]]
    broken_first: Mapping[str, str]
    broken_second: Mapping[str, str]
    assumed: tuple[str, ...]
    recalibrated: tuple[str, ...]
    command: str

    def worst_first(self) -> list[ComparedLayer]:
        """The layers, those that moved furthest first; what is not a number is furthest."""
        return sorted(self.layers, key=lambda one: -_or_most(one.drift))

    def above(self, threshold: float) -> list[ComparedLayer]:
        """Layers with a channel beyond a threshold, or not finite, the furthest first."""
        return [one for one in self.worst_first() if not one.drift <= threshold]


def _or_most(drift: float) -> float:
    return math.inf if math.isnan(drift) else drift
