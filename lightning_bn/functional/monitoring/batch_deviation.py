"""What a single batch looked like to each layer, recovered from what it did to the moving average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.snapshots import Snapshot


def momenta(layers: list[_BatchNorm], device: torch.device) -> Tensor:
    """Each layer's weight of a new batch, ``(L,)``; NaN for a cumulative average, whose weight changes."""
    values = [float("nan") if layer.momentum is None else layer.momentum for layer in layers]
    return torch.tensor(values, dtype=torch.float64, device=device)


def surprise(before: Snapshot, after: Snapshot, momentum: Tensor) -> Tensor:
    """How far the mean of the batch between two snapshots was from the moving average, ``(C,)``, in its sigma.

    With running = (1 - m) running + m batch, batch - running_before = (after - before) / m. NaN where there was not
    exactly one update in between.

    Args:
        before: Statistics right before a training batch.
        after: Right after it.
        momentum: Of the layers, as :func:`momenta` gives it.
    """
    once = (after.num_batches_tracked - before.num_batches_tracked) == 1
    weight = after.layout.expand(torch.where(once & (momentum > 0), momentum, torch.nan))
    sigma = (before.var.to(torch.float64) + after.eps_of()).sqrt()
    return (after.mean.to(torch.float64) - before.mean.to(torch.float64)) / weight / sigma


def gap(everywhere: Snapshot, here: Snapshot, momentum: Tensor) -> Tensor:
    """How far the last batch here was from those everywhere, ``(C,)``, in standard deviations.

    Args:
        everywhere: Means over all processes right after a batch that all began with the same statistics.
        here: Of this process.
        momentum: Of the layers, as :func:`momenta` gives it.
    """
    sigma = (here.var.to(torch.float64) + here.eps_of()).sqrt()
    weight = here.layout.expand(torch.where(momentum > 0, momentum, torch.nan))
    return (here.mean.to(torch.float64) - everywhere.mean.to(torch.float64)) / weight / sigma


@dataclass(frozen=True)
class Surprises:
    """The surprises of several batches, summed up by channel.

    Attributes:
        count: Batches with a finite surprise, ``(C,)`` like all others.
        total: Sum.
        squares: Sum of squares.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Surprises:
        """Of no batch yet."""
        zeros = torch.zeros_like(like, dtype=torch.float64)
        return cls(zeros, zeros, zeros)

    def with_batch(self, values: Tensor, most: float) -> Surprises:
        """With one batch more; channels that are not finite are left out.

        Args:
            values: Its surprise, ``(C,)``.
            most: Standard deviations that it can add: one batch that is far off is one batch, not two sources.
        """
        there = values.isfinite()
        taken = torch.where(there, values, 0).clamp(-most, most)
        return Surprises(self.count + there, self.total + taken, self.squares + taken.square())

    def bias(self, layout: ChannelLayout) -> Tensor:
        """Root mean square over a layer's channels of the mean surprise, ``(L,)``: a moving average that lags."""
        return layout.mean((self.total / self.count.clamp(min=1)).square()).sqrt()

    def spread(self, layout: ChannelLayout) -> Tensor:
        """Root mean square over a layer's channels of the deviation around it, ``(L,)``: batches that differ."""
        mean = self.total / self.count.clamp(min=1)
        return layout.mean((self.squares / self.count.clamp(min=1) - mean.square()).clamp(min=0)).sqrt()
