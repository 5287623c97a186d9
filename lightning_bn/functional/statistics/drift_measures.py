"""Distances between two snapshots of running statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_bn.functional._text import quoted
from lightning_bn.functional.statistics.snapshots import Snapshot

Measure: TypeAlias = Literal["jeffreys", "wasserstein", "mean_shift", "log_variance_ratio", "hellinger", "output"]
MEASURES: tuple[str, ...] = get_args(Measure)


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
            'neck.bn3 variance x2.0, mean +0.3 sigma'
        """
        return f"{self.worst_layer} {in_words(self.variance_ratio, self.mean_shift)}"


def in_words(variance_ratio: float, mean_shift: float) -> str:
    """A change of statistics in plain units.

    Args:
        variance_ratio: Current over reference variance.
        mean_shift: In standard deviations of the reference.

    Example:
        >>> in_words(0.0123, -12.34)
        'variance x0.012, mean -12 sigma'
    """

    def short(value: float, sign: str = "") -> str:
        return f"{value:{sign}.1f}" if value == 0 or 0.095 <= abs(value) < 10 else f"{value:{sign}.2g}"

    shift = f"{mean_shift:+.2f}" if abs(mean_shift) < 0.095 and mean_shift else short(mean_shift, "+")
    return f"variance x{short(variance_ratio)}, mean {shift} sigma"


def drift(reference: Snapshot, current: Snapshot, measure: Measure = "jeffreys") -> dict[str, Tensor]:
    """How far each channel's running statistics are from a reference: per layer a tensor of shape ``(C,)``, float64.

    With m0, v0 of the reference and m1, v1 now, each layer's ``eps`` added to both variances, z = (m1 - m0) / sqrt(v0)
    and r = v1 / v0, all of them are free of the input's scale and 0 where nothing moved:

    - ``"jeffreys"``: symmetrized Kullback-Leibler divergence of the two Gaussians, 1/2 [r + 1/r - 2 + z^2 (1 + 1/r)],
      in [0, inf). 0.1 is a variance ratio of 1.56 or a mean shift of 0.32 sigma.
    - ``"wasserstein"``: squared 2-Wasserstein distance over v0, z^2 + (sqrt(r) - 1)^2, in [0, inf).
    - ``"mean_shift"``: z, signed, in standard deviations of the reference.
    - ``"log_variance_ratio"``: ln r, signed; 0.69 is a doubled variance.
    - ``"hellinger"``: Hellinger distance of the two Gaussians, in [0, 1].
    - ``"output"``: mean squared change of the layer's evaluation output for inputs distributed as the reference says,
      weight^2 [(1/sqrt(r) - 1)^2 + z^2 / r] with the current affine weight, in squared units of the output.

    Args:
        reference: What to measure from.
        current: What to measure; of the same layers.
        measure: One of the above.

    Raises:
        ValueError: If ``measure`` is unknown or the snapshots are of different layers.

    Source: Jeffreys (1946); Olkin & Pukelsheim (1982) for the 2-Wasserstein distance of Gaussians.
    """
    shift, ratio = standardized(reference, current)
    return reference.layout.split(of_standardized(measure, shift, ratio, current.weight))


def of_standardized(measure: Measure, shift: Tensor, ratio: Tensor, weight: Tensor) -> Tensor:
    """A measure from its ingredients: z and r of :func:`standardized`, and the affine weight."""
    if measure not in _FORMULAS:
        raise ValueError(f"measure={measure!r} is not one of {', '.join(MEASURES)}")
    return _FORMULAS[measure](shift, ratio, weight.to(shift))


def standardized(reference: Snapshot, current: Snapshot) -> tuple[Tensor, Tensor]:
    """z, the shift of the mean in standard deviations of the reference, and r, the ratio of variances; float64."""
    if reference.layout != current.layout:
        sizes_now = dict(zip(current.names, current.layout.sizes, strict=True))
        sizes_then = dict(zip(reference.names, reference.layout.sizes, strict=True))
        names = [*reference.names, *(name for name in current.names if name not in sizes_then)]
        differing = [name for name in names if sizes_then.get(name) != sizes_now.get(name)] or names
        raise ValueError(
            f"drift needs two snapshots of the same layers in the same order; they differ in {quoted(differing)} "
            f"({sizes_then.get(differing[0], 'no')} and {sizes_now.get(differing[0], 'no')} channels)."
        )
    reference, current = reference.where_doubles_are(), current.where_doubles_are()
    device = current.mean.device
    eps = reference.eps_of().to(device)
    v0 = reference.var.to(device, torch.float64) + eps
    v1 = current.var.to(torch.float64) + eps
    shift = (current.mean.to(torch.float64) - reference.mean.to(device, torch.float64)) / v0.sqrt()
    return shift, v1 / v0


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


def _jeffreys(shift: Tensor, ratio: Tensor, _: Tensor) -> Tensor:
    # (r - 1)^2 / r is r + 1/r - 2 without the cancellation near r = 1.
    return 0.5 * ((ratio - 1).square() / ratio + shift.square() * (1 + 1 / ratio))


def _wasserstein(shift: Tensor, ratio: Tensor, _: Tensor) -> Tensor:
    return shift.square() + (ratio.sqrt() - 1).square()


def _hellinger(shift: Tensor, ratio: Tensor, _: Tensor) -> Tensor:
    # -log of the Bhattacharyya coefficient; log1p and expm1 keep small distances from rounding to 0 or below.
    distance = 0.25 * shift.square() / (1 + ratio) + 0.5 * torch.log1p((ratio.sqrt() - 1).square() / (2 * ratio.sqrt()))
    return (-torch.expm1(-distance)).sqrt()


def _output(shift: Tensor, ratio: Tensor, weight: Tensor) -> Tensor:
    return weight.square() * ((ratio.rsqrt() - 1).square() + shift.square() / ratio)


_FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "jeffreys": _jeffreys,
    "wasserstein": _wasserstein,
    "mean_shift": lambda shift, ratio, weight: shift,
    "log_variance_ratio": lambda shift, ratio, weight: ratio.log(),
    "hellinger": _hellinger,
    "output": _output,
}
