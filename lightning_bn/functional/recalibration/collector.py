"""Batch statistics of many layers at once, collected while a model runs and merged in float64.

For the duration each layer's running statistics are views into one flat arena and its momentum is 1, so that after a
forward the arena holds the statistics of that batch, which the layer computes anyway: no second pass over the
activations, and one vectorized merge for all layers. Per layer and call, Python only reads a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from lightning_bn.functional.layers.properties import is_synchronized, processes_of
from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.recalibration.standard_error import Spread, relative_errors
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments, merge

_REBOUND = ("running_mean", "running_var", "num_batches_tracked")
_NOT_CALLED = -1
_ALIGNED = 8
"""Elements that a layer's part of the arena begins at a multiple of: kernels may load several of them at once."""


class OneValuePerChannelError(ValueError):
    """A layer was given one value per channel, of which there is no variance.

    Attributes:
        layer: Its name.
    """

    def __init__(self, layer: str) -> None:
        super().__init__(f"BatchNorm layer {layer!r} was given one value per channel, of which there is no variance")
        self.layer = layer


class Collector:
    """Collects statistics of ``layers`` as a context manager; afterwards they are exactly as they were.

    A synchronized layer writes the statistics of the batches of its whole process group, in every process of it. What
    is gathered of it in one process is a share: those of all processes, merged, are the statistics of all values.

    Args:
        layers: By name; each with running statistics. Whoever runs the forwards puts them in train mode.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> with Collector({"bn": layer}) as collector:
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
        self._arenas = [_Arena(members, *key) for key, members in grouped.items()]

    def __enter__(self) -> Self:
        try:
            for arena in self._arenas:
                arena.bind()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for arena in self._arenas:
            arena.release()

    def batch(self) -> _Batch:
        """A context for the forwards of one batch: what they leave is merged at its end, dropped on an exception."""
        return _Batch(self._arenas)

    def largest_standard_error(self) -> float:
        """Over all channels of all layers reached so far, see :class:`Spread`; infinite before the second batch."""
        largest = max(float(arena.standard_errors().max()) for arena in self._arenas)
        return largest if largest >= 0 else float("inf")

    def population(self) -> Population:
        """What was gathered of all layers so far, flat and in their order."""
        return Population.of([arena.population() for arena in self._arenas], self._names)


@contextmanager
def single_values_refused(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Inside, a forward that gives one of ``layers`` one value per channel raises :class:`OneValuePerChannelError`.

    For layers without running statistics, which normalize with the batch in every mode, so that torch would raise an
    error of its own that says nothing of the layer.
    """

    def hook(name: str, channels: int) -> Any:
        def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _count(name, channels, args, kwargs)

        return before_forward

    handles = [
        layer.register_forward_pre_hook(hook(name, layer.num_features), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count(name: str, channels: int, args: tuple[Any, ...], kwargs: dict[str, Any], alone: bool = True) -> int:
    """Values per channel in what a layer was called with.

    Raises:
        OneValuePerChannelError: If it is one, and the layer is alone with it.
    """
    batch: Tensor = args[0] if args else next(iter(kwargs.values()))
    count = batch.numel() // channels
    if count == 1 and alone:
        raise OneValuePerChannelError(name)
    return count


def _read_in(layer: _BatchNorm, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a layer's statistics are read: that of its buffers.

    In SyncBatchNorm's kernels counts have the dtype of the running statistics, which for float16 ends at 65,504.
    """
    narrow = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if narrow and is_synchronized(layer) else dtype


class _Batch:
    def __init__(self, arenas: list[_Arena]) -> None:
        self._arenas = arenas

    def __enter__(self) -> None:
        for arena in self._arenas:
            arena.begin()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for arena in self._arenas:
            if kind is None:
                arena.end()
            else:
                arena.abandon()


@dataclass(frozen=True)
class _Gathered:
    """What an arena has gathered; moments, spread and averages by channel, the counts by layer."""

    moments: Moments
    spread: Spread
    averages: Tensor
    uses: Tensor
    nonfinite: Tensor


class _Arena:
    """The layers whose statistics share a device and a dtype."""

    def __init__(self, layers: Mapping[str, _BatchNorm], device: torch.device, dtype: torch.dtype) -> None:
        self._layers = dict(layers)
        # A bf16 model needs bf16 buffers: its statistics are read with bf16's precision, and summed in float64.
        self._exact = torch.float32 if device.type == "mps" else torch.float64
        self._layout = layout = ChannelLayout.of(layers)
        aligned = ChannelLayout(layout.names, tuple(-(-size // _ALIGNED) * _ALIGNED for size in layout.sizes))
        # Ordinary tensors, also where the caller is in inference mode: they are written to again outside of it.
        with torch.inference_mode(False):
            self._flat = torch.zeros(2, aligned.channels, device=device, dtype=dtype)
            starts = [part.start for part in aligned.slices.values()]
            self._parts = {
                name: slice(start, start + size)
                for name, start, size in zip(layout.names, starts, layout.sizes, strict=True)
            }
            filled = torch.cat([torch.arange(part.start, part.stop) for part in self._parts.values()])
            self._filled = None if len(filled) == aligned.channels else filled.to(device)
            zeros = torch.zeros(layout.channels, device=device, dtype=self._exact)
            self._eps = layout.constant(tuple(layer.eps for layer in layers.values()), device, self._exact)
            self._gathered = _Gathered(
                Moments(zeros, zeros, zeros),
                Spread.none(zeros),
                torch.stack((zeros, zeros)),
                *torch.zeros(2, len(layout), device=device, dtype=torch.int64),
            )
        self._before = self._gathered
        self._batch: Moments | None = None
        self._counts = [_NOT_CALLED] * len(layout)
        # With others of its group a layer can do with one value.
        self._alone = [processes_of(layer) == 1 for layer in layers.values()]
        # A layer whose tracking was switched off writes nothing; its own values are taken, whoever it normalizes with.
        sharing = tuple(processes_of(layer) if layer.track_running_stats else 1 for layer in layers.values())
        self._together = layout.constant(sharing, device, self._exact)
        self._found: list[tuple[_BatchNorm, dict[str, Tensor | None], float | None, dict[str, Any]]] = []

    def bind(self) -> None:
        for index, (name, layer) in enumerate(self._layers.items()):
            part = self._parts[name]
            own_forward = {"forward": layer.__dict__["forward"]} if "forward" in layer.__dict__ else {}
            found = {key: layer._buffers[key] for key in _REBOUND}
            self._found.append((layer, found, layer.momentum, own_forward))
            layer._buffers["running_mean"] = self._flat[0, part]
            layer._buffers["running_var"] = self._flat[1, part]
            counter = layer._buffers["num_batches_tracked"]
            layer._buffers["num_batches_tracked"] = None if counter is None else counter.clone()
            layer.momentum = 1.0
            # On the instance, where compiled code run as written finds it: half of what a hook would cost.
            layer.__dict__["forward"] = self._counting(index, name, part, layer)

    def release(self) -> None:
        for layer, buffers, momentum, forward in self._found:
            layer._buffers.update(buffers)
            layer.momentum = momentum
            layer.__dict__.pop("forward", None)
            layer.__dict__.update(forward)
        self._found = []

    def _counting(self, index: int, name: str, part: slice, layer: _BatchNorm) -> Callable[..., Any]:
        """The layer's forward, which first reads how many values per channel it is given."""
        counts, channels, buffers, forward = self._counts, part.stop - part.start, layer._buffers, layer.forward
        counter = buffers["num_batches_tracked"]
        # torch's own forward does without the counter; counting costs a kernel.
        uncounted = None if type(layer).forward is _BatchNorm.forward else counter
        alone = self._alone[index]

        def counted_forward(*args: Any, **kwargs: Any) -> Any:
            count = _count(name, channels, args, kwargs, alone)
            if counts[index] != _NOT_CALLED:
                # A second use in this forward would overwrite the first.
                self.merge()
            if not layer.track_running_stats:
                # Switched off after construction: the layer would not write, so that its statistics are computed here.
                input: Tensor = args[0] if args else next(iter(kwargs.values()))
                var, mean = torch.var_mean(
                    input.detach().movedim(1, 0).flatten(1).to(self._exact), 1, correction=min(1, count - 1)
                )
                self._flat[0, part], self._flat[1, part] = mean, var
            counts[index] = count
            buffers["num_batches_tracked"] = uncounted
            try:
                return forward(*args, **kwargs)
            finally:
                buffers["num_batches_tracked"] = counter

        return counted_forward

    def begin(self) -> None:
        """Starts a batch: what was gathered so far is remembered, the arena cleared."""
        self._before = self._gathered
        self._batch = None
        self.clear()

    def abandon(self) -> None:
        """Ends a batch that failed: layers used twice had merged a part of it already."""
        self._gathered = self._before
        self.clear()

    def clear(self) -> None:
        # Also before each forward: with momentum 1 an old inf or NaN would come back as 0 * inf.
        self._flat.zero_()
        self._counts[:] = [_NOT_CALLED] * len(self._counts)

    def merge(self) -> None:
        """Adds what lies in the arena to the batch and clears it; layers with a non-finite statistic are left out."""
        values = self._flat if self._filled is None else self._flat[:, self._filled]
        mean, var = values.to(self._exact)
        counts = torch.tensor(self._counts, dtype=self._exact, device=mean.device)
        bad = self._layout.sum((~torch.isfinite(mean + var)).to(counts.dtype)) > 0
        called = counts != _NOT_CALLED
        used = called & ~bad
        taken = self._layout.expand(used)
        count = torch.where(taken, self._layout.expand(counts), 0)
        mean, var = torch.where(taken, mean, 0), torch.where(taken, var, 0)
        # With N values in the batches of P processes the sum of squares is var (N - 1): of which this process has
        # var (n - 1 / P) for its n, so that the shares add up without anybody knowing N.
        use = Moments(count, mean, var * (count - 1 / self._together))
        self._batch = use if self._batch is None else merge(self._batch, use)
        before = self._gathered
        # Replaced, not written to: begin() keeps the old ones.
        self._gathered = replace(
            before,
            averages=before.averages + torch.stack((mean, var)),
            uses=before.uses + used,
            nonfinite=before.nonfinite + (called & bad),
        )
        self.clear()

    def end(self) -> None:
        """Ends a batch: its statistics, all uses together, are one more sample of the population's."""
        self.merge()
        if self._batch is not None:
            before = self._gathered
            self._gathered = replace(
                before, moments=merge(before.moments, self._batch), spread=before.spread.with_batch(self._batch)
            )

    def standard_errors(self) -> Tensor:
        """The largest standard error of each channel; below 0 where a layer has gathered nothing."""
        found = self._gathered
        errors = relative_errors(found.moments, *self._squared_deviations(), self._eps)
        return torch.where(found.moments.count > 0, errors, -1)

    def _squared_deviations(self) -> tuple[Tensor, Tensor]:
        """Those of :meth:`Spread.squared_deviations`, for which processes of one group have but one sample."""
        mean, var = self._gathered.spread.squared_deviations(self._gathered.moments)
        return mean * self._together, var * self._together

    def population(self) -> Population:
        found = self._gathered
        mean_error, var_error = self._squared_deviations()
        return Population(
            layout=self._layout,
            moments=found.moments,
            mean_error=mean_error,
            var_error=var_error,
            averages=found.averages,
            eps=self._eps,
            uses=dict(zip(self._layout.names, found.uses.tolist(), strict=True)),
            nonfinite=dict(zip(self._layout.names, found.nonfinite.tolist(), strict=True)),
        )
