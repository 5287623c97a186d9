"""Batch statistics of many layers at once, collected while a model runs and pooled in float64: one merge for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.exchange import COLLECTING, exchanged
from lightning_bn.functional.recalibration.arena import Arena
from lightning_bn.functional.recalibration.collected_forward import NOT_CALLED
from lightning_bn.functional.recalibration.gathered import Gathered
from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments


class Collector:
    """What was collected of layers; :func:`collecting` makes one.

    A synchronized layer writes the statistics of the batches of its whole process group, in every process of it. What
    is gathered of it in one process is a share: those of all processes, merged, are the statistics of all values.

    Args:
        layers: By name; each with running statistics. Whoever runs the forwards puts them in train mode.
        tasks: What is to be told apart, the first one runs to begin with; none for all batches together.

    Attributes:
        arena: Where the forwards write.
        parts: What was gathered, by task; under None where none is told apart.

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

    def __init__(self, layers: Mapping[str, _BatchNorm], tasks: Sequence[str] = ()) -> None:
        self.arena = Arena(layers, self.merge)
        device, dtype, layout = self.arena.device, self.arena.dtype, ChannelLayout.of(layers)
        # A layer whose tracking was switched off writes nothing; its own values are taken, whoever it normalizes with.
        forwards = zip(self.arena.forwards, layers.values(), strict=True)
        sharing = tuple(one.processes if layer.track_running_stats else 1 for one, layer in forwards)
        none = torch.zeros(len(layout), device=device, dtype=torch.int64)
        zeros = torch.zeros(layout.channels, device=device, dtype=dtype)
        both, eps = torch.stack((zeros, zeros)), tuple(layer.eps for layer in layers.values())
        nothing, eps_of = Moments(zeros, zeros, zeros), layout.constant(eps, device, dtype)
        population = Population(layout, nothing, both, both, both, eps_of, none, none, none)
        together = layout.constant(sharing, device, dtype)
        self.parts: dict[str | None, Gathered] = {task: Gathered(population, together) for task in tasks or (None,)}
        self._running = next(iter(self.parts.values()))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Merge at the end what the forwards of one batch leave, or drop it after an exception."""
        parts = self.parts.values()
        for part in parts:
            part.begin_batch()
        self.arena.begin_batch()
        try:
            yield
            self.arena.end_batch()
        except BaseException:
            # Layers used twice had merged a part of it already.
            for part in parts:
                part.drop_batch()
            self.arena.clear()
            raise
        self.merge()
        for part in parts:
            part.end_batch()

    def change(self, task: str) -> None:
        """What layers are given from now on is a task's; what lies in the arena is that of the one before."""
        if self.called():
            self.merge()
        self._take_empty()
        self._running = self.parts[task]

    def called(self) -> bool:
        """Whether something of the batch that runs has not been merged yet."""
        return any(forward.count != NOT_CALLED for forward in self.arena.forwards)

    def merge(self) -> None:
        """Move what lies in the arena to the task that runs."""
        mean, var = self.arena.read()
        self._running.add(mean, var, [forward.count for forward in self.arena.forwards])
        self.arena.clear()

    def population(self, task: str | None = None) -> Population:
        """Return what was gathered of all layers so far, or of a task, flat and in their order.

        Raises:
            RecalibrationError: If a forward of the user's own wrote other statistics than those of its input.
        """
        self.arena.refuse_others()
        self._take_empty()
        return self.parts[task].population()

    def _take_empty(self) -> None:
        for index, forward in enumerate(self.arena.forwards):
            self._running.empty[index] += forward.empty
            forward.empty = 0


@contextmanager
def collecting(layers: Mapping[str, _BatchNorm], tasks: Sequence[str] = ()) -> Iterator[Collector]:
    """Yield a collector that the forwards of ``layers`` write into; afterwards they are exactly as they were.

    Args:
        layers: By name.
        tasks: What is to be told apart, the first one runs to begin with; none for all batches together.

    Raises:
        ValueError: If a layer has no running statistics.
    """
    collector = Collector(layers, tasks)
    with exchanged(COLLECTING, collector.arena.entries()):
        yield collector
