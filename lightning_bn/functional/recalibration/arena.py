"""The layers whose statistics share a device and a dtype: one flat tensor that their forwards write batches into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.layers.torch_private import STATISTICS, attributes_of, buffers_of
from lightning_bn.functional.recalibration.one_value_per_channel import batch_in, values_per_channel
from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.recalibration.result import RecalibrationError
from lightning_bn.functional.recalibration.standard_error import ErrorSums, relative_errors
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments, merge

_NOT_CALLED = -1
_UNWRITTEN = -1.0
"""What a cleared arena holds; no variance is. With momentum 1 it has no weight in what a forward writes."""
_ALIGNED = 8
"""Elements that a layer's part of the arena begins at a multiple of: kernels may load several of them at once."""


class Arena:
    """Statistics of the batch that runs, and of all that ran before.

    Args:
        layers: By name; each with running statistics on ``device``.
        device: Of the statistics.
        dtype: In which they are read.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], device: torch.device, dtype: torch.dtype) -> None:
        self._layers = dict(layers)
        # A bf16 model needs bf16 buffers: its statistics are read with bf16's precision, and summed in float64.
        exact = torch.float32 if device.type == "mps" else torch.float64
        layout = ChannelLayout.of(layers)
        aligned = ChannelLayout(layout.names, tuple(-(-size // _ALIGNED) * _ALIGNED for size in layout.sizes))
        starts = [part.start for part in aligned.slices.values()]
        self._parts = [slice(start, start + size) for start, size in zip(starts, layout.sizes, strict=True)]
        filled = torch.cat([torch.arange(part.start, part.stop) for part in self._parts])
        # With others of its group a layer can do with one value.
        self._alone = [processes_of(layer) == 1 for layer in layers.values()]
        # A layer whose tracking was switched off writes nothing; its own values are taken, whoever it normalizes with.
        sharing = tuple(processes_of(layer) if layer.track_running_stats else 1 for layer in layers.values())
        # Ordinary tensors, also where the caller is in inference mode: they are written to again outside of it.
        with torch.inference_mode(False):
            self._flat = torch.full((2, aligned.channels), _UNWRITTEN, device=device, dtype=dtype)
            self._filled = None if len(filled) == aligned.channels else filled.to(device)
            self._starts = torch.tensor(starts, device=device)
            self._together = layout.constant(sharing, device, exact)
            # A batch of no samples writes nothing, but where others of a group have some.
            self._least = torch.tensor([1 if processes == 1 else 0 for processes in sharing], device=device)
            zeros = torch.zeros(layout.channels, device=device, dtype=exact)
            self._population = Population(
                layout,
                moments=Moments(zeros, zeros, zeros),
                errors=torch.stack((zeros, zeros)),
                averages=torch.stack((zeros, zeros)),
                eps=layout.constant(tuple(layer.eps for layer in layers.values()), device, exact),
                uses=torch.zeros(len(layout), device=device, dtype=torch.int64),
                nonfinite=torch.zeros(len(layout), device=device, dtype=torch.int64),
            )
            self._unwritten = torch.zeros(len(layout), device=device, dtype=torch.int64)
        self._error_sums = ErrorSums.none(zeros)
        self._before = self._population
        self._batch: Moments | None = None
        self._counts = [_NOT_CALLED] * len(layout)

    def entries(self) -> list[Entries]:
        """What each layer is to hold while statistics are collected."""
        entries = []
        for index, (name, layer) in enumerate(self._layers.items()):
            mean, var = self._flat[:, self._parts[index]]
            counter = buffers_of(layer)["num_batches_tracked"]
            counter = None if counter is None else counter.clone()
            buffers = {"running_mean": mean, "running_var": var, "num_batches_tracked": counter}
            # On the instance, where compiled code run as written finds it: half of what a hook would cost.
            forward = self._counting(index, name, layer, buffers, dict(buffers_of(layer)))
            entries.append(Entries(name, layer, buffers, attributes={"momentum": 1.0, "forward": forward}))
        return entries

    def _counting(
        self,
        index: int,
        name: str,
        layer: _BatchNorm,
        collecting: Mapping[str, Tensor | None],
        own: Mapping[str, Tensor | None],
    ) -> Callable[..., Any]:
        """The layer's forward between a look at how many values it is given and one at where it wrote."""
        counts, alone, buffers, forward = self._counts, self._alone[index], buffers_of(layer), layer.forward
        mean, var, counter = (collecting[name] for name in STATISTICS)
        attributes = attributes_of(layer)
        # torch's own forward does without the counter; counting costs a kernel.
        uncounted = None if type(layer).forward is _BatchNorm.forward else counter

        def counted_forward(*args: Any, **kwargs: Any) -> Any:
            if not layer.training:
                # A teacher's pass in eval reads the running statistics as they were, and is no batch of training.
                with exchanged("recalibrate", [Entries(name, layer, own)]):
                    return forward(*args, **kwargs)
            batch = batch_in(args, kwargs)
            count = values_per_channel(name, layer, batch, alone)
            if counts[index] != _NOT_CALLED:
                # A second use in this forward would overwrite the first.
                self.merge()
            # A schedule may have set it inside the step.
            attributes["momentum"] = 1.0
            if buffers["running_mean"] is not mean or buffers["running_var"] is not var:
                raise RecalibrationError(_not_written(name))
            if not layer.track_running_stats:
                # Switched off after construction: the layer would not write, so that its statistics are computed here.
                values = batch.detach().movedim(1, 0).flatten(1).to(self._population.eps.dtype)
                self._flat[1, self._parts[index]], self._flat[0, self._parts[index]] = torch.var_mean(
                    values, 1, correction=min(1, count - 1)
                )
            counts[index] = count
            buffers["num_batches_tracked"] = uncounted
            try:
                output = forward(*args, **kwargs)
            finally:
                buffers["num_batches_tracked"] = counter
            if buffers["running_mean"] is not mean or buffers["running_var"] is not var:
                raise RecalibrationError(_not_written(name))
            return output

        return counted_forward

    def begin(self) -> None:
        """Start a batch: keep what was gathered so far, clear the arena."""
        self._before, self._batch = self._population, None
        self.clear()

    def abandon(self) -> None:
        """End a batch that failed: layers used twice had merged a part of it already."""
        self._population = self._before
        self.clear()

    def clear(self) -> None:
        """Also before each forward: with momentum 1 an old inf or NaN would come back as 0 * inf."""
        self._flat.fill_(_UNWRITTEN)
        self._counts[:] = [_NOT_CALLED] * len(self._counts)

    def merge(self) -> None:
        """Add what lies in the arena to the batch and clear it; layers with a non-finite statistic are left out."""
        known, layout = self._population, self._population.layout
        values = self._flat if self._filled is None else self._flat[:, self._filled]
        mean, var = values.to(known.eps.dtype)
        counts = torch.tensor(self._counts, dtype=mean.dtype, device=mean.device)
        bad = layout.sum((~torch.isfinite(mean + var)).to(counts.dtype)) > 0
        called = counts >= self._least
        self._unwritten = self._unwritten + (called & (self._flat[1, self._starts] == _UNWRITTEN))
        used = called & ~bad
        taken = layout.expand(used)
        count = torch.where(taken, layout.expand(counts), 0)
        mean, var = torch.where(taken, mean, 0), torch.where(taken, var, 0)
        # With N values in the batches of P processes the sum of squares is var (N - 1): of which this process has
        # var (n - 1 / P) for its n, so that the shares add up without anybody knowing N.
        use = Moments(count, mean, var * (count - 1 / self._together))
        self._batch = use if self._batch is None else merge(self._batch, use)
        # Replaced, not written to: begin() keeps the old one.
        self._population = replace(
            known,
            averages=known.averages + torch.stack((mean, var)),
            uses=known.uses + used,
            nonfinite=known.nonfinite + (called & bad),
        )
        self.clear()

    def end(self) -> None:
        """End a batch: its statistics, all uses together, are one more sample of the population's."""
        self.merge()
        if self._batch is not None:
            self._population = replace(self._population, moments=merge(self._population.moments, self._batch))
            self._error_sums = self._error_sums.with_batch(self._batch)

    def standard_errors(self) -> Tensor:
        """The largest standard error of each channel; below 0 where a layer has gathered nothing."""
        moments = self._population.moments
        return torch.where(moments.count > 0, relative_errors(moments, self._errors(), self._population.eps), -1)

    def _errors(self) -> Tensor:
        """Squared deviations, for which processes of one group have but one sample."""
        return self._error_sums.squared(self._population.moments) * self._together

    def population(self) -> Population:
        """Return what was gathered so far.

        Raises:
            RecalibrationError: If a layer was called but its statistics were written elsewhere.
        """
        names = self._population.layout.names
        elsewhere = [name for name, count in zip(names, self._unwritten.tolist(), strict=True) if count]
        if elsewhere:
            raise RecalibrationError(_not_written(*elsewhere))
        return replace(self._population, errors=self._errors())


def _not_written(*names: str) -> str:
    return (
        f"statistics of BatchNorm layer {quoted(names)} could not be collected: its forward did not write them where "
        f"the recalibration reads them, because its running statistics were exchanged inside the forward. "
        f"Nothing was changed; pass a forward= that leaves them in place, or leave the layer out "
        f"with exclude."
    )
