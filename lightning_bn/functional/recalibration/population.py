"""What was gathered of many layers, flat: the statistics of the population and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_bn.functional.recalibration.standard_error import relative_errors
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments, variance

Estimator: TypeAlias = Literal["pooled", "mean_of_batches"]


@dataclass(frozen=True)
class Population:
    """Statistics of L layers with C channels altogether, those of a layer one after another.

    Attributes:
        layout: Of the layers, in order.
        moments: Pooled over all batches, shape ``(C,)`` each, float64 where the device has it.
        mean_error: Squared deviations of the mean, see :meth:`~.spread.Spread.squared_deviations`; ``(C,)``.
        var_error: Of the variance.
        averages: Sums over uses of batch mean and unbiased batch variance, ``(2, C)``.
        eps: Of the layers, ``(C,)``.
        uses: Forwards with finite statistics, by layer.
        nonfinite: Forwards left out because a statistic was not finite, by layer.
    """

    layout: ChannelLayout
    moments: Moments
    mean_error: Tensor
    var_error: Tensor
    averages: Tensor
    eps: Tensor
    uses: Mapping[str, int]
    nonfinite: Mapping[str, int]

    @classmethod
    def of(cls, parts: Sequence[Population], names: Sequence[str]) -> Population:
        """Several populations as one, on the device of the first, in the order of ``names``."""
        if len(parts) == 1:
            return parts[0]
        joined, device = ChannelLayout.joined([part.layout for part in parts]), parts[0].eps.device

        def gather(*of_parts: Tensor) -> Tensor:
            return joined.pick(torch.cat([values.to(device) for values in of_parts], -1), names)

        uses = {name: count for part in parts for name, count in part.uses.items()}
        nonfinite = {name: count for part in parts for name, count in part.nonfinite.items()}
        return cls(
            layout=joined.restrict(names),
            moments=Moments(*(gather(*values) for values in zip(*(part.moments for part in parts), strict=True))),
            mean_error=gather(*(part.mean_error for part in parts)),
            var_error=gather(*(part.var_error for part in parts)),
            averages=gather(*(part.averages for part in parts)),
            eps=gather(*(part.eps for part in parts)),
            uses={name: uses[name] for name in names},
            nonfinite={name: nonfinite[name] for name in names},
        )

    def reached(self) -> list[str]:
        """Layers of which there are at least two values per channel."""
        if not len(self.layout):
            return []
        counts = self.layout.mean(self.moments.count).tolist()
        return [name for name, count in zip(self.layout.names, counts, strict=True) if count > 1]

    def statistics(self, estimator: Estimator) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and variance to be stored, ``(C,)`` each, by layer: pooled and unbiased, or means over batches."""
        if estimator == "mean_of_batches":
            uses = torch.tensor([max(count, 1) for count in self.uses.values()]).to(self.averages)
            mean, var = self.averages / self.layout.expand(uses)
        else:
            mean, var = self.moments.mean, variance(self.moments)
        means, variances = self.layout.split(mean), self.layout.split(var)
        return {name: (means[name], variances[name]) for name in self.layout.names}

    def standard_error(self) -> float:
        """The largest relative standard error of any channel that was reached, see :func:`~.spread.relative_errors`."""
        errors = relative_errors(self.moments, self.mean_error, self.var_error, self.eps)
        return float(torch.where(self.moments.count > 1, errors, 0).max())
