"""Batch statistics of many layers at once, collected while a model runs and merged in float64.

For the duration each layer's running statistics are views into one flat arena and its momentum is 1, so that after a
forward the arena holds the statistics of that batch, which the layer computes anyway: no second pass over the
activations, and one vectorized merge for all layers. Per layer and call, Python only reads a shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.exchange import exchanged
from lightning_bn.functional.layers.properties import is_synchronized
from lightning_bn.functional.recalibration.arena import Arena
from lightning_bn.functional.recalibration.population import Population


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
        grouped: dict[tuple[torch.device, torch.dtype], dict[str, _BatchNorm]] = {}
        for name, layer in layers.items():
            running = layer.running_mean
            if running is None:
                raise ValueError(f"BatchNorm layer {name!r} has no running statistics to collect into")
            grouped.setdefault((running.device, _read_in(layer, running.dtype)), {})[name] = layer
        self._names = tuple(layers)
        self.arenas = [Arena(members, *key) for key, members in grouped.items()]

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Merge at the end what the forwards of one batch leave, or drop it after an exception."""
        for arena in self.arenas:
            arena.begin()
        try:
            yield
        except BaseException:
            for arena in self.arenas:
                arena.abandon()
            raise
        for arena in self.arenas:
            arena.end()

    def largest_standard_error(self) -> float:
        """Over all channels of all layers reached so far; infinite before the second batch."""
        largest = max(float(arena.standard_errors().max()) for arena in self.arenas)
        return largest if largest >= 0 else float("inf")

    def population(self) -> Population:
        """Return what was gathered of all layers so far, flat and in their order.

        Raises:
            RecalibrationError: If a layer was called but its statistics were written elsewhere.
        """
        return Population.of([arena.population() for arena in self.arenas], self._names)


@contextmanager
def collecting(layers: Mapping[str, _BatchNorm]) -> Iterator[Collector]:
    """Yield a collector that the forwards of ``layers`` write into; afterwards they are exactly as they were.

    Raises:
        ValueError: If a layer has no running statistics.
    """
    collector = Collector(layers)
    with exchanged("recalibrate", [entry for arena in collector.arenas for entry in arena.entries()]):
        yield collector


def _read_in(layer: _BatchNorm, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a layer's statistics are read: that of its buffers.

    In SyncBatchNorm's kernels counts have the dtype of the running statistics, which for float16 ends at 65,504.
    """
    narrow = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if narrow and is_synchronized(layer) else dtype
