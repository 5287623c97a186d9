"""What the tensors of one BatchNorm layer say by themselves, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.claimed_values import distinct

EPS = 1e-5
"""torch's own; a file does not say a layer's."""
MOMENTUM = 0.1
"""torch's own; a file does not say a layer's."""
NEAR_ZERO = 1e-3
"""Absolute affine weight below which a channel puts out little but its bias."""
LARGEST_HALF = 65_504.0
"""The largest number that float16 can hold."""
_COUNTED = ("nonfinite", "nonfinite_affine", "negative", "collapsed", "exploding")
_OUTLIER = 1e6
"""Variance of a channel over the median of its layer: a standard deviation 1,000 times the others'."""


@dataclass(frozen=True)
class LayerFacts:
    """One BatchNorm layer of a file.

    Attributes:
        name: As the file has it.
        channels: How many.
        updates: Of the running statistics, as the layer counted; None without the counter.
        initial_left: Share of the initial values left in the running statistics, (1 - 0.1) ** updates, with torch's own
            momentum, which a file does not say; None without the counter, or where it does not tell: it was lost, an
            average has other ones, or a recalibration replaced the statistics.
        lost_counter: Whether it is 0 although the statistics are not the initial ones.
        mean: Smallest, median and largest ``running_mean`` of the finite channels.
        var: The same of ``running_var``.
        nonfinite: Channels whose mean or variance is not finite.
        nonfinite_affine: Channels whose weight or bias is not finite.
        negative: Channels whose variance is below 0.
        collapsed: Channels whose variance is below 1e-5, torch's ``eps``, and whose weight is not near zero.
        exploding: Channels whose values outgrow float16 (mean and four standard deviations beyond 65,504), or whose
            standard deviation is above 1,000 times the median of the layer's.
        weight_near_zero: Channels whose weight is below 1e-3; None without a weight.
        first_channels: The first channel of each kind that there is, by the name of its count.
        is_initial: Whether all means are 0 and all variances 1.
        is_zero: Whether all means and variances are 0.
    """

    name: str
    channels: int
    updates: int | None
    initial_left: float | None
    lost_counter: bool
    mean: tuple[float, float, float]
    var: tuple[float, float, float]
    nonfinite: int
    nonfinite_affine: int
    negative: int
    collapsed: int
    exploding: int
    weight_near_zero: int | None
    first_channels: Mapping[str, int]
    is_initial: bool
    is_zero: bool


def layer_facts(layers: Mapping[str, Mapping[str, Tensor]], size: int) -> list[LayerFacts]:
    """Return what the tensors of layers say; those of one layer under several names are looked at once.

    Args:
        layers: By name, as :class:`~lightning_bn.functional.inspection.entries.Entry` has them.
        size: Of the file that they are from, in bytes.

    Raises:
        ValueError: If the tensors claim more values than the file can hold.
    """
    same = distinct(layers, size)
    unique = {name: layers[name] for name in {*same.values()}}
    measured = dict(zip(unique, _measured(unique), strict=True)) if unique else {}
    return [replace(measured[same[name]], name=name) for name in layers]


@torch.no_grad()
def _measured(layers: Mapping[str, Mapping[str, Tensor]]) -> list[LayerFacts]:
    listed = list(layers.values())
    layout = ChannelLayout(tuple(layers), tuple(len(parts["running_mean"]) for parts in listed))
    mean, var = (_flat(listed, part, 0.0) for part in ("running_mean", "running_var"))
    weight, bias = (_flat(listed, part, default) for part, default in (("weight", 1.0), ("bias", 0.0)))
    nonfinite, near_zero = ~(mean + var).isfinite(), weight.abs() < NEAR_ZERO
    exploding = mean.abs() + 4 * var.clamp(min=0).sqrt() > LARGEST_HALF
    exploding |= (var > _OUTLIER * layout.expand(_median_of_living(layout, var))) & (var > 1)
    channels = {
        "nonfinite": nonfinite,
        "nonfinite_affine": ~(weight + bias).isfinite(),
        "negative": var < 0,
        "collapsed": (var >= 0) & (var < EPS) & ~near_zero,
        "exploding": exploding & ~nonfinite,
        "near_zero": near_zero,
        "initial": (mean == 0) & (var == 1),
        "zero": (mean == 0) & (var == 0),
    }
    counts = layout.sum(torch.stack(list(channels.values())).double()).T.long().tolist()
    found = []
    for (name, parts), row in zip(layers.items(), counts, strict=True):
        here, size = layout.slices[name], len(parts["running_mean"])
        count = dict(zip(channels, row, strict=True))
        found.append(
            LayerFacts(
                name=name,
                channels=size,
                updates=(updates := _updates(parts.get("num_batches_tracked"))),
                initial_left=_initial_left(updates, count["initial"] == size),
                lost_counter=updates == 0 and count["initial"] < size and count["zero"] < size,
                mean=_range(mean[here]),
                var=_range(var[here]),
                weight_near_zero=count["near_zero"] if "weight" in parts else None,
                first_channels={kind: int(channels[kind][here].byte().argmax()) for kind in _COUNTED if count[kind]},
                is_initial=count["initial"] == size,
                is_zero=count["zero"] == size,
                **{kind: count[kind] for kind in _COUNTED},
            )
        )
    return found


def _initial_left(updates: int | None, is_initial: bool) -> float | None:
    if updates is None or (not updates and not is_initial):
        return None  # nobody counted, or they came from elsewhere without their counter
    return float((1 - MOMENTUM) ** updates)


def _flat(layers: list[Mapping[str, Tensor]], part: str, default: float) -> Tensor:
    """One part of all layers, in float64."""
    return torch.cat(
        [
            layer[part].detach().double()
            if part in layer
            else torch.full((len(layer["running_mean"]),), default, dtype=torch.float64)
            for layer in layers
        ]
    )


def _median_of_living(layout: ChannelLayout, var: Tensor) -> Tensor:
    """Of the channels that have not collapsed; infinite where there are fewer than eight of them."""
    living = [one[one.isfinite() & (one >= EPS)] for one in var.split(layout.sizes)]
    return torch.stack([one.median() if len(one) >= 8 else var.new_tensor(math.inf) for one in living])


def _range(values: Tensor) -> tuple[float, float, float]:
    finite = values[values.isfinite()]
    if not len(finite):
        return (math.nan,) * 3
    return float(finite.min()), float(finite.median()), float(finite.max())


def _updates(counter: Tensor | None) -> int | None:
    """What a counter says; None where it cannot be one."""
    value = math.nan if counter is None else float(counter.detach().double())
    return int(value) if math.isfinite(value) and 0 <= value < 2**62 else None
