"""Pooled statistics of many layers, flat: what was gathered of the population, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_bn.functional.recalibration.standard_error import relative_errors
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments, variance

APART = 1.0
"""Standard deviations of a use between the means of two uses, from which on they are two inputs."""

Estimator: TypeAlias = Literal["pooled", "mean_of_batches"]


@dataclass(frozen=True)
class Population:
    """Statistics of L layers with C channels altogether, those of a layer one after another.

    Attributes:
        layout: Of the layers, in order.
        moments: Pooled over all batches, shape ``(C,)`` each, float64 where the device has it.
        errors: Squared deviations of the mean and of the variance, see :meth:`~.standard_error.ErrorSums.squared`;
            ``(2, C)``.
        averages: Sums over uses of batch mean and unbiased batch variance, ``(2, C)``.
        apart: Sums of how far the mean of one use lay from that of those before it in the same batch, and how many
            they are, ``(2, C)``.
        eps: Of the layers, ``(C,)``.
        uses: Forwards with finite statistics, ``(L,)``.
        nonfinite: Forwards left out because a statistic was not finite, ``(L,)``.
        empty: Forwards of no value, ``(L,)``.
    """

    layout: ChannelLayout
    moments: Moments
    errors: Tensor
    averages: Tensor
    apart: Tensor
    eps: Tensor
    uses: Tensor
    nonfinite: Tensor
    empty: Tensor

    def by_layer(self, counts: Tensor) -> dict[str, int]:
        """Return counts of layers, ``(L,)``, by name."""
        return dict(zip(self.layout.names, counts.int().tolist(), strict=True))

    def reached(self) -> list[str]:
        """Return the layers of which there are at least two values per channel."""
        counts = self.layout.mean(self.moments.count).tolist() if len(self.layout) else []
        return [name for name, count in zip(self.layout.names, counts, strict=True) if count > 1]

    def statistics(self, estimator: Estimator) -> Tensor:
        """Return mean and variance to be stored, ``(2, C)``: pooled and unbiased, or means over batches."""
        if estimator == "mean_of_batches":
            return self.averages / self.layout.expand(self.uses.clamp(min=1)).to(self.averages)
        return torch.stack((self.moments.mean, variance(self.moments)))

    def uses_apart(self) -> dict[str, float]:
        """Return by layer how many standard deviations of a use the uses of a batch lie apart, in the furthest channel.

        Only where that is more than :data:`APART`: below it one set of statistics serves all uses.
        """
        sums, times = self.apart
        within = self.averages[1] / self.layout.expand(self.uses.clamp(min=1)).to(self.averages)
        scale = (within + self.eps).sqrt()
        furthest = self.layout.max((sums / times.clamp(min=1) / scale).abs()).tolist()
        return {name: far for name, far in zip(self.layout.names, furthest, strict=True) if far > APART}

    def standard_error(self) -> float:
        """Return the largest relative standard error of any channel that was reached; infinite for no batch or one."""
        errors = relative_errors(self.moments, self.errors, self.eps)
        largest = float(torch.where(self.moments.count > 1, errors, -1).max())
        return largest if largest >= 0 else math.inf
