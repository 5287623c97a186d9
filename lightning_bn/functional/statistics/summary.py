"""A measure of drift over all channels in a few numbers, and in the words of its worst channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.functional.statistics.drift_measures import Measure, of_standardized, standardized
from lightning_bn.functional.statistics.snapshots import Snapshot


@dataclass(frozen=True)
class DriftSummary:
    """One measure over all channels of two snapshots, of absolute values.

    Attributes:
        mean: Over all channels.
        p95: 95th percentile over all channels.
        max: The largest; NaN if any channel's is.
        worst_layer: The layer that has it; one with a NaN comes first.
        worst_channel: Its index within that layer.
        variance_ratio: Current over reference variance of that channel.
        mean_shift: Shift of that channel's mean in units of the reference's standard deviation.
        share_above: Share of channels above the threshold, in [0, 1]; None if there was no threshold.
    """

    mean: float
    p95: float
    max: float
    worst_layer: str
    worst_channel: int
    variance_ratio: float
    mean_shift: float
    share_above: float | None = None

    def in_words(self) -> str:
        """The worst channel in plain units.

        Example:
            >>> DriftSummary(0.1, 0.2, 0.25, "neck.bn3", 4, 2.0, 0.3).in_words()
            'neck.bn3: variance x2.0, mean +0.3 sigma'
        """
        return f"{self.worst_layer or '(the model itself)'}: {in_words(self.variance_ratio, self.mean_shift)}"


def in_words(variance_ratio: float, mean_shift: float) -> str:
    """A change of statistics in plain units.

    Args:
        variance_ratio: Current over reference variance.
        mean_shift: In standard deviations of the reference.

    Example:
        >>> in_words(0.0123, -12.34)
        'variance x0.012, mean -12 sigma'
    """
    return f"variance x{_short(variance_ratio)}, {_shift_in_words(mean_shift)}"


def compared_in_words(one: str, other: str, variance_ratio: float, mean_shift: float) -> str:
    """A difference of statistics in plain units, with which is compared with which.

    Args:
        one: What the current statistics are called.
        other: What those of the reference are.
        variance_ratio: Current over reference variance.
        mean_shift: In standard deviations of the reference.

    Example:
        >>> compared_in_words("old", "new", 1.5, 0.054)
        'old variance 1.5 times the new one, mean +0.05 sigma'
    """
    return f"{one} variance {_short(variance_ratio)} times the {other} one, {_shift_in_words(mean_shift)}"


def _shift_in_words(shift: float) -> str:
    said = f"{shift:+.2f}" if abs(shift) < 0.095 and shift else _short(shift, "+")
    return f"mean {said} sigma"


def _short(value: float, sign: str = "") -> str:
    return f"{value:{sign}.1f}" if value == 0 or 0.095 <= abs(value) < 10 else f"{value:{sign}.2g}"


def summarize(
    reference: Snapshot, current: Snapshot, measure: Measure = "jeffreys", threshold: float | None = None
) -> DriftSummary:
    """One measure over all channels of two snapshots in a few numbers and the name of the worst layer.

    Args:
        reference: What to measure from.
        current: What to measure; of the same layers.
        measure: As for :func:`drift`; of signed measures the absolute value counts.
        threshold: If given, the share of channels above it is counted.

    Raises:
        ValueError: As for :func:`drift`.
    """
    shift, ratio = standardized(reference, current)
    values = of_standardized(measure, shift, ratio, current.weight).abs()
    # One stack, one transfer: on an accelerator each float() would wait for the device.
    return read_summary(reference, torch.stack(summary_scalars(values, shift, ratio, threshold)).tolist(), threshold)


def summary_scalars(values: Tensor, shift: Tensor, ratio: Tensor, threshold: float | None = None) -> list[Tensor]:
    """What :func:`read_summary` makes a summary of, still on the device: 0-dimensional float64 tensors.

    Args:
        values: Of a measure, absolute, ``(C,)``.
        shift: z of :func:`standardized`.
        ratio: r of :func:`standardized`.
        threshold: If given, the share of channels above it is counted.
    """
    # NaN sorts as the largest: a channel that cannot be measured is the worst there is.
    worst = values.nan_to_num(nan=torch.inf, posinf=torch.inf).argmax()
    share = values.new_tensor(torch.nan) if threshold is None else (values > threshold).double().mean()
    # Indexing with a tensor would wait for the device.
    of_worst = [torch.take(ratio, worst), torch.take(shift, worst)]
    return [values.mean(), percentile_95(values), values.max(), *of_worst, share, worst.double()]


def percentile_95(values: Tensor) -> Tensor:
    """The 95th percentile, 0-dimensional, interpolated as ``torch.quantile`` does; NaN if any value is.

    Only the upper twentieth is sorted, which takes an eighth of the time; infinities are not subtracted.
    """
    position = 0.95 * (len(values) - 1)
    below = int(position)
    top = values.topk(len(values) - below).values
    low, high = top[-1], top[max(len(top) - 2, 0)]
    between = torch.where(low == high, low, low + (high - low) * (position - below))
    return torch.where(values.isnan().any(), torch.nan, between)


def read_summary(snapshot: Snapshot, scalars: list[float], threshold: float | None = None) -> DriftSummary:
    """The summary that :func:`summary_scalars` prepared."""
    mean, p95, largest, variance_ratio, mean_shift, share_above, position = scalars
    layer, channel = snapshot.layout.locate(int(position))
    return DriftSummary(
        mean=mean,
        p95=p95,
        max=largest,
        worst_layer=layer,
        worst_channel=channel,
        variance_ratio=variance_ratio,
        mean_shift=mean_shift,
        share_above=None if threshold is None else share_above,
    )
