"""What is gathered of layers while batches run: of all of them, or of what belongs to one task in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.recalibration.standard_error import ErrorSums
from lightning_bn.functional.statistics.sample_moments import Moments, merge


class Gathered:
    """A population that grows by batches, each of which may come in several parts.

    Args:
        nothing: The population of no batch.
        together: How many processes share each layer's batches, ``(C,)``.

    Attributes:
        closed: Whether it has enough: batches that come now leave it as it is.
        empty: Of each layer, forwards of no value.
    """

    def __init__(self, nothing: Population, together: Tensor) -> None:
        self.closed = False
        self.empty = [0] * len(nothing.layout)
        self._population = self._before = nothing
        self._error_sums = ErrorSums.none(nothing.moments.count)
        self._together = together
        self._batch: Moments | None = None

    def begin_batch(self) -> None:
        """Make ready for a batch."""
        self._before, self._batch = self._population, None

    def add(self, mean: Tensor, var: Tensor, counts: Sequence[int]) -> None:
        """Add a part of the batch, one use of each layer; layers not finite are left out.

        Args:
            mean: Of the part, ``(C,)``.
            var: Its unbiased variance, ``(C,)``.
            counts: Of each layer the values per channel, -1 where it was not called.
        """
        known, layout = self._population, self._population.layout
        per_layer = torch.tensor(counts, dtype=mean.dtype, device=mean.device)
        bad = layout.sum((~torch.isfinite(mean + var)).to(per_layer.dtype)) > 0
        called = per_layer >= 0
        used = called & ~bad
        taken = layout.expand(used)
        count = torch.where(taken, layout.expand(per_layer), 0)
        mean, var = torch.where(taken, mean, 0), torch.where(taken, var, 0)
        # With N values in the batches of P processes the sum of squares is var (N - 1): of which this process has
        # var (n - 1 / P) for its n, so that the shares add up without anybody knowing N.
        use = Moments(count, mean, var * (count - 1 / self._together))
        apart = known.apart
        if self._batch is not None:
            # In units of the input, with its sign: what a layer is given twice by chance averages out.
            twice = (count > 0) & (self._batch.count > 0)
            apart = apart + torch.where(twice, torch.stack((mean - self._batch.mean, torch.ones_like(mean))), 0)
        self._batch = use if self._batch is None else merge(self._batch, use)
        # Replaced, not written to: a batch that fails goes back to the old one.
        self._population = replace(
            known,
            averages=known.averages + torch.stack((mean, var)),
            uses=known.uses + used,
            apart=apart,
            nonfinite=known.nonfinite + (called & bad),
        )

    def end_batch(self) -> None:
        """Take all parts together as one more sample of the population's."""
        batch, self._batch = self._batch, None
        if self.closed:
            self._population = self._before
        elif batch is not None:
            self._population = replace(self._population, moments=merge(self._population.moments, batch))
            self._error_sums = self._error_sums.with_batch(batch)

    def drop_batch(self) -> None:
        """Forget the parts of a batch that failed."""
        self._population, self._batch = self._before, None

    def largest_standard_error(self) -> float:
        """Over all channels of all layers reached so far; infinite before the second batch."""
        return replace(self._population, errors=self._errors()).standard_error()

    def population(self) -> Population:
        """Return what was gathered so far."""
        empty = torch.tensor(self.empty, device=self._population.uses.device)
        return replace(self._population, errors=self._errors(), empty=empty)

    def _errors(self) -> Tensor:
        """Squared deviations, for which processes of one group have but one sample."""
        return self._error_sums.squared(self._population.moments) * self._together
