"""What was gathered of many layers, flat: the statistics of the population and how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_bn.functional.recalibration.standard_error import relative_errors
from lightning_bn.functional.statistics.sample_moments import Moments, variance

Estimator: TypeAlias = Literal["pooled", "mean_of_batches"]


@dataclass(frozen=True)
class Population:
    """Statistics of L layers with C channels altogether, those of a layer one after another.

    Attributes:
        channels: Channels of each layer, by name, in order.
        moments: Pooled over all batches, shape ``(C,)`` each, float64 where the device has it.
        mean_error: Squared deviations of the mean, see :meth:`~.spread.Spread.squared_deviations`; ``(C,)``.
        var_error: Of the variance.
        averages: Sums over uses of batch mean and unbiased batch variance, ``(2, C)``.
        eps: Of the layers, ``(C,)``.
        uses: Forwards with finite statistics, by layer.
        nonfinite: Forwards left out because a statistic was not finite, by layer.
    """

    channels: Mapping[str, int]
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
        places = {name: (part, where) for part in parts for name, where in part.slices().items()}
        device = parts[0].eps.device

        ordered = [places[name] for name in names]

        def gather(pick: Callable[[Population], Tensor]) -> Tensor:
            return torch.cat([pick(part)[..., where].to(device) for part, where in ordered], -1)

        return cls(
            channels={name: places[name][0].channels[name] for name in names},
            moments=Moments(
                gather(lambda part: part.moments.count),
                gather(lambda part: part.moments.mean),
                gather(lambda part: part.moments.m2),
            ),
            mean_error=gather(lambda part: part.mean_error),
            var_error=gather(lambda part: part.var_error),
            averages=gather(lambda part: part.averages),
            eps=gather(lambda part: part.eps),
            uses={name: places[name][0].uses[name] for name in names},
            nonfinite={name: places[name][0].nonfinite[name] for name in names},
        )

    def slices(self) -> dict[str, slice]:
        """Where each layer's channels lie."""
        ends = accumulate(self.channels.values())
        return {name: slice(end - size, end) for (name, size), end in zip(self.channels.items(), ends, strict=True)}

    def reached(self) -> list[str]:
        """Layers of which there are at least two values per channel."""
        if not self.channels:
            return []
        first = torch.tensor([part.start for part in self.slices().values()])
        counts = self.moments.count[first.to(self.moments.count.device)].tolist()
        return [name for name, count in zip(self.channels, counts, strict=True) if count > 1]

    def statistics(self, estimator: Estimator) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and variance to be stored, ``(C,)`` each, by layer: pooled and unbiased, or means over batches."""
        if estimator == "mean_of_batches":
            uses = torch.tensor([max(count, 1) for count in self.uses.values()], dtype=self.averages.dtype)
            sizes = torch.tensor(list(self.channels.values()))
            mean, var = self.averages / uses.repeat_interleave(sizes).to(self.averages.device)
        else:
            mean, var = self.moments.mean, variance(self.moments)
        sizes_listed = list(self.channels.values())
        return dict(
            zip(self.channels, zip(mean.split(sizes_listed), var.split(sizes_listed), strict=True), strict=True)
        )

    def standard_error(self) -> float:
        """The largest relative standard error of any channel that was reached, see :func:`~.spread.relative_errors`."""
        errors = relative_errors(self.moments, self.mean_error, self.var_error, self.eps)
        return float(torch.where(self.moments.count > 1, errors, 0).max())
