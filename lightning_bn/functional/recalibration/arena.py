"""Where the forwards of many layers write the statistics of the batch that runs: one flat tensor for all of them.

For the duration each layer's running statistics are views into it and its momentum is 1, so that after a forward it
holds the statistics of that batch, which the layer computes anyway: no second pass over the activations. Per layer and
call, Python only reads a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.properties import is_synchronized, processes_of
from lightning_bn.functional.layers.torch_private import attributes_of, buffers_of
from lightning_bn.functional.recalibration.one_value_per_channel import batch_in, values_per_channel
from lightning_bn.functional.recalibration.result import RecalibrationError
from lightning_bn.functional.statistics.channels import ChannelLayout

_NOT_CALLED = -1
UNWRITTEN = -1.0
"""What a cleared arena holds; no variance is. With momentum 1 it has no weight in what a forward writes."""
_ALIGNED = 8
"""Elements that a layer's part of the arena begins at a multiple of: kernels may load several of them at once."""


class Arena:
    """One flat tensor for each device and dtype of the layers' statistics.

    Args:
        layers: By name.

    Attributes:
        device: Of the first layer's statistics, where all of them are read.
        dtype: In which they are read.
        counts: Values per channel that each layer was given; -1 where it was not called.

    Raises:
        ValueError: If a layer has no running statistics.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._layers = layers
        self.counts = [_NOT_CALLED] * len(layers)
        grouped: dict[tuple[torch.device, torch.dtype], dict[str, int]] = {}
        for name, layer in layers.items():
            running = layer.running_mean
            if running is None:
                raise ValueError(f"BatchNorm layer {name!r} has no running statistics to collect into")
            # In SyncBatchNorm's kernels counts have the dtype of the statistics, which for float16 ends at 65,504.
            narrow = running.dtype in (torch.float16, torch.bfloat16)
            dtype = torch.float32 if narrow and is_synchronized(layer) else running.dtype
            sizes = grouped.setdefault((running.device, dtype), {})
            sizes[name] = -(-layer.num_features // _ALIGNED) * _ALIGNED
        layouts = [ChannelLayout(tuple(sizes), tuple(sizes.values())) for sizes in grouped.values()]
        self._flats: list[Tensor] = []
        self._views: dict[str, Tensor] = {}
        for layout, (device, dtype) in zip(layouts, grouped, strict=True):
            self._flats.append(torch.full((2, layout.channels), UNWRITTEN, device=device, dtype=dtype))
            self._views |= layout.split(self._flats[-1])
        self.device = self._flats[0].device
        # A bf16 model needs bf16 buffers: its statistics are read with bf16's precision, and summed in float64.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        joined = ChannelLayout.joined(layouts)
        places = joined.split(torch.arange(joined.channels))
        filled = torch.cat([places[name][: layer.num_features] for name, layer in layers.items()])
        self._filled = None if torch.equal(filled, torch.arange(joined.channels)) else filled.to(self.device)

    def entries(self, merge: Callable[[], Any]) -> list[Entries]:
        """What each layer is to hold while statistics are collected; ``merge`` empties the arena before it is full."""
        return [self._entries(index, name, layer, merge) for index, (name, layer) in enumerate(self._layers.items())]

    def _entries(self, index: int, name: str, layer: _BatchNorm, merge: Callable[[], Any]) -> Entries:
        """Views, and a forward between a look at how many values it is given and one at where it wrote."""
        counts, buffers, attributes, forward = self.counts, buffers_of(layer), attributes_of(layer), layer.forward
        own, alone = dict(buffers), processes_of(layer) == 1
        written = self._views[name][:, : layer.num_features]
        mean, var = written
        counter = own["num_batches_tracked"]
        counter = None if counter is None else counter.clone()
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
                merge()
            # A schedule may have set it inside the step.
            attributes["momentum"] = 1.0
            if buffers["running_mean"] is not mean or buffers["running_var"] is not var:
                raise not_written(name)
            if not layer.track_running_stats:
                # Switched off after construction: the layer would not write, so that its statistics are computed here.
                values = batch.detach().movedim(1, 0).flatten(1).to(self.dtype)
                written[1], written[0] = torch.var_mean(values, 1, correction=min(1, count - 1))
            counts[index] = count
            buffers["num_batches_tracked"] = uncounted
            try:
                output = forward(*args, **kwargs)
            finally:
                buffers["num_batches_tracked"] = counter
            if buffers["running_mean"] is not mean or buffers["running_var"] is not var:
                raise not_written(name)
            return output

        views = {"running_mean": mean, "running_var": var, "num_batches_tracked": counter}
        # On the instance, where compiled code run as written finds it: half of what a hook would cost.
        return Entries(name, layer, views, attributes={"momentum": 1.0, "forward": counted_forward})

    def read(self) -> Tensor:
        """Mean and variance of all layers, in their order, ``(2, C)``."""
        flats = [flat.to(self.device).to(self.dtype) for flat in self._flats]
        values = flats[0] if len(flats) == 1 else torch.cat(flats, -1)
        return values if self._filled is None else values[:, self._filled]

    def clear(self) -> None:
        """Before each forward too: with momentum 1 an old inf or NaN would come back as 0 * inf."""
        for flat in self._flats:
            flat.fill_(UNWRITTEN)
        self.counts[:] = [_NOT_CALLED] * len(self.counts)


def not_written(*names: str) -> RecalibrationError:
    """The error of layers whose statistics are not where they were to be written."""
    return RecalibrationError(
        f"statistics of BatchNorm layer {quoted(names)} could not be collected: its forward did not write them where "
        f"the recalibration reads them, because its running statistics were exchanged inside the forward. Nothing was "
        f"changed; pass a forward= that leaves them in place, or leave the layer out with exclude."
    )
