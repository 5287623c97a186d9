"""How far batches were from the moving average, recovered from what each did to it, and several judged together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_bn.functional.layers.sets_per_task import Statistics
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.snapshots import Snapshot


def momenta(layers: Iterable[Statistics], device: torch.device) -> Tensor:
    """Return each layer's weight of a new batch, ``(L,)``; NaN for a cumulative average, whose weight changes."""
    known = tuple(torch.nan if layer.momentum is None else layer.momentum for layer in layers)
    return on_device(known, device, torch.float64)


# The same at most samples: copying it would wait for the device.
@lru_cache(maxsize=64)
def on_device(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return values of the layers, ``(L,)``; made once for a device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).to(device)


def innovation(before: Snapshot, after: Snapshot, momentum: Tensor) -> Tensor:
    """Return how far the mean of the batch between two snapshots was from the moving average, ``(C,)``, in its sigma.

    With running = (1 - m) running + m batch, batch - running_before = (after - before) / m. NaN where there was not
    exactly one update in between.

    Args:
        before: Statistics right before a training batch.
        after: Right after it.
        momentum: Of the layers, as :func:`momenta` gives it.
    """
    once = (after.num_batches_tracked - before.num_batches_tracked) == 1
    return _in_sigma(after.mean, before.mean, torch.where(once, momentum, torch.nan), before)


def _in_sigma(mean: Tensor, base: Tensor, momentum: Tensor, scale: Snapshot) -> Tensor:
    """Return how far the batches behind two running means lie apart, ``(C,)``, if one update made the difference."""
    weight = scale.layout.expand(torch.where(momentum > 0, momentum, torch.nan))
    sigma = (scale.var.to(torch.float64) + scale.eps_of()).sqrt()
    return (mean.to(torch.float64) - base.to(torch.float64)) / weight / sigma


@dataclass(frozen=True)
class BatchDeviations:
    """Deviations of several batches, summed up by channel.

    Attributes:
        count: Batches with a finite deviation, ``(C,)`` like all others.
        total: Sum.
        squares: Sum of squares.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def none(cls, like: Tensor) -> BatchDeviations:
        """Return those of no batch yet."""
        zeros = torch.zeros_like(like, dtype=torch.float64)
        return cls(zeros, zeros, zeros)

    def with_batch(self, values: Tensor, most: float) -> BatchDeviations:
        """Return those with one batch more; channels that are not finite are left out.

        Args:
            values: Its deviation, ``(C,)``.
            most: Standard deviations that it can add: one batch that is far off is one batch, not two sources.
        """
        finite = values.isfinite()
        taken = torch.where(finite, values, 0).clamp(-most, most)
        return BatchDeviations(self.count + finite, self.total + taken, self.squares + taken.square())

    def bias(self, layout: ChannelLayout) -> Tensor:
        """Return the root mean square over a layer's channels of the mean deviation, ``(L,)``: an average that lags."""
        return layout.mean((self.total / self.count.clamp(min=1)).square()).sqrt()

    def scatter(self, layout: ChannelLayout) -> Tensor:
        """Return the root mean square over a layer's channels of what is left around it, ``(L,)``: batches differ."""
        mean = self.total / self.count.clamp(min=1)
        return layout.mean((self.squares / self.count.clamp(min=1) - mean.square()).clamp(min=0)).sqrt()


class BatchWindow:
    """What several sampled batches looked like.

    Args:
        like: Of all channels, ``(C,)``, on the statistics' device.

    Attributes:
        innovations: How far each batch was from the moving average.
        gaps: How far those of this process were from those of all.
        uses: How far the uses of a layer in one batch were from its first one.
        judged: How many batches there are.
    """

    def __init__(self, like: Tensor) -> None:
        self.innovations = self.gaps = self.uses = BatchDeviations.none(like)
        self.judged = 0

    def add(self, before: Snapshot, after: Snapshot, momentum: Tensor, most: float) -> None:
        """Add the batch between two snapshots.

        Args:
            before: Right before it.
            after: Right after it.
            momentum: Of the layers.
            most: Standard deviations that it can add.
        """
        self.innovations = self.innovations.with_batch(innovation(before, after, momentum), most)
        self.judged += 1

    def add_gap(self, after: Snapshot, everywhere: Tensor, momentum: Tensor, most: float) -> None:
        """Add how far the batch of this process was from those of all.

        Args:
            after: The statistics right after it.
            everywhere: Running means of all processes right after it, averaged, ``(C,)``.
            momentum: Of the layers.
            most: Standard deviations that it can add.
        """
        self.gaps = self.gaps.with_batch(_in_sigma(after.mean, everywhere, momentum, after), most)

    def add_uses(self, apart: Tensor) -> None:
        """Add how far the uses of layers in one batch lay apart, ``(C,)``; NaN where there was but one."""
        self.uses = self.uses.with_batch(apart, torch.inf)
