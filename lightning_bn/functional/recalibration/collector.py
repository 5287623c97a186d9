"""Batch statistics of many layers at once, collected while a model runs and pooled in float64: one merge for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.exchange import COLLECTING, exchanged
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.recalibration.arena import Arena
from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.recalibration.standard_error import ErrorSums
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments, merge


class Collector:
    """What was collected of layers; :func:`collecting` makes one.

    A synchronized layer writes the statistics of the batches of its whole process group, in every process of it. What
    is gathered of it in one process is a share: those of all processes, merged, are the statistics of all values.

    Args:
        layers: By name; each with running statistics. Whoever runs the forwards puts them in train mode.

    Example:
        >>> layer = torch.nn.BatchNorm1d(1)
        >>> with collecting({"bn": layer}) as collector:
        ...     for batch in (torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])):
        ...         with collector.batch():
        ...             _ = layer(batch)
        >>> collector.population().moments.mean
        tensor([4.], dtype=torch.float64)
        >>> layer.running_mean
        tensor([0.])
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self.arena = Arena(layers, self.merge)
        device, dtype, layout = self.arena.device, self.arena.dtype, ChannelLayout.of(layers)
        # A layer whose tracking was switched off writes nothing; its own values are taken, whoever it normalizes with.
        sharing = tuple(processes_of(layer) if layer.track_running_stats else 1 for layer in layers.values())
        self._together = layout.constant(sharing, device, dtype)
        none = torch.zeros(len(layout), device=device, dtype=torch.int64)
        zeros = torch.zeros(layout.channels, device=device, dtype=dtype)
        both, eps = torch.stack((zeros, zeros)), tuple(layer.eps for layer in layers.values())
        nothing, eps_of = Moments(zeros, zeros, zeros), layout.constant(eps, device, dtype)
        self._population = Population(layout, nothing, both, both, both, eps_of, none, none, none)
        self._error_sums = ErrorSums.none(zeros)
        self._batch: Moments | None = None

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Merge at the end what the forwards of one batch leave, or drop it after an exception."""
        before, self._batch = self._population, None
        self.arena.begin_batch()
        try:
            yield
            self.arena.end_batch()
        except BaseException:
            # Layers used twice had merged a part of it already.
            self._population = before
            self.arena.clear()
            raise
        # All uses together are one more sample of the population's.
        batch = self.merge()
        self._population = replace(self._population, moments=merge(self._population.moments, batch))
        self._error_sums = self._error_sums.with_batch(batch)

    def merge(self) -> Moments:
        """Return the batch with what lies in the arena, and clear that; layers not finite are left out."""
        known, layout = self._population, self._population.layout
        mean, var = self.arena.read()
        counts = torch.tensor([forward.count for forward in self.arena.forwards], dtype=mean.dtype, device=mean.device)
        bad = layout.sum((~torch.isfinite(mean + var)).to(counts.dtype)) > 0
        called = counts >= 0
        used = called & ~bad
        taken = layout.expand(used)
        count = torch.where(taken, layout.expand(counts), 0)
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
        self.arena.clear()
        return self._batch

    def largest_standard_error(self) -> float:
        """Over all channels of all layers reached so far; infinite before the second batch."""
        return replace(self._population, errors=self._errors()).standard_error()

    def _errors(self) -> Tensor:
        """Squared deviations, for which processes of one group have but one sample."""
        return self._error_sums.squared(self._population.moments) * self._together

    def population(self) -> Population:
        """Return what was gathered of all layers so far, flat and in their order.

        Raises:
            RecalibrationError: If a forward of the user's own wrote other statistics than those of its input.
        """
        self.arena.refuse_others()
        empty = torch.tensor([forward.empty for forward in self.arena.forwards], device=self.arena.device)
        return replace(self._population, errors=self._errors(), empty=empty)


@contextmanager
def collecting(layers: Mapping[str, _BatchNorm]) -> Iterator[Collector]:
    """Yield a collector that the forwards of ``layers`` write into; afterwards they are exactly as they were.

    Raises:
        ValueError: If a layer has no running statistics.
    """
    collector = Collector(layers)
    with exchanged(COLLECTING, collector.arena.entries()):
        yield collector
