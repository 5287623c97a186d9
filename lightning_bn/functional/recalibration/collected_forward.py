"""The forward of a BatchNorm layer while its statistics are collected: it decides as the layer itself will."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_bn.functional._text import named, quoted
from lightning_bn.functional.layers.exchange import Entries
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.layers.torch_private import attributes_of, buffers_of
from lightning_bn.functional.recalibration.one_value_per_channel import batch_in, values_per_channel
from lightning_bn.functional.recalibration.result import RecalibrationError

NOT_CALLED = -1
NARROW = (torch.float16, torch.bfloat16)
"""float16 ends at 65,504, and bfloat16 has two digits: statistics in them are computed in float32 instead."""
_TORCHS_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_FUNCTIONS = (torch.nn.functional.batch_norm, torch.batch_norm)
_SAME = 1e-3
"""Relative to variances and standard deviations: what float32 leaves of the difference between two ways to compute."""


class CollectedForward:
    """What a layer runs instead of its own forward, which it calls.

    Where that would update the running statistics, these are for its duration views into the arena and the momentum is
    1, so that the layer leaves the statistics of the batch there. It updates none in eval, with ``track_running_stats``
    or ``momentum`` switched off by the step, or with other buffers put in place of its own.

    Args:
        name: Of the layer, for errors.
        layer: With running statistics.
        written: Where mean and variance of the batch are to be.
        merge: Empties the arena before a second use in a batch.

    Attributes:
        name: Of the layer.
        processes: How many share the layer's batches.
        count: Values per channel that the layer was given; -1 where it was not called.
        empty: How many batches without any value it was given.
    """

    def __init__(self, name: str, layer: _BatchNorm, written: tuple[Tensor, Tensor], merge: Callable[[], Any]) -> None:
        self.count, self.empty = NOT_CALLED, 0
        self.name, self._layer, self._written, self._merge = name, layer, written, merge
        self._forward, self._held, self._attributes = layer.forward, buffers_of(layer), attributes_of(layer)
        self._own = self._held.copy()
        running: Any = (self._own["running_mean"], self._own["running_var"])
        self._mean, self._var = running
        self.processes = processes_of(layer)
        self._alone = self.processes == 1
        function = getattr(self._forward, "__func__", None)
        self._torchs = function in _TORCHS_FORWARDS
        # What was so before the pass is to be mended by it; what a step sets for a forward is meant to update nothing.
        self._untracked, self._still = not layer.track_running_stats, layer.momentum == 0
        self._by_hand = self._untracked or (self._alone and self._mean.dtype in NARROW)
        self._inside: dict[str, Tensor | None] = dict.fromkeys(self._own)
        if self._by_hand or function is not _BatchNorm.forward:
            # torch's own forward does without the counter, and counting costs a kernel.
            self._inside = {key: None if value is None else value.clone() for key, value in self._own.items()}
        if not self._by_hand:
            self._inside["running_mean"], self._inside["running_var"] = written
        self._differs: Tensor | None = None
        self._used, self._elsewhere, self._versions = False, False, -1

    def entries(self) -> Entries:
        """What the layer is to hold meanwhile; on the instance, where compiled code run as written finds it."""
        kept = {key: getattr(self._layer, key) for key in ("momentum", "track_running_stats")}
        # Its own buffers too, so that what a step puts in their place and leaves there is found and taken out.
        return Entries(self.name, self._layer, self._own, attributes={**kept, "forward": self})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's forward on a batch."""
        layer, attributes = self._layer, self._attributes
        if not layer.training:
            return self._forward(*args, **kwargs)
        batch, momentum = args[0] if args else batch_in(args, kwargs), attributes["momentum"]
        count = values_per_channel(self.name, layer, batch, self._alone)
        if not (attributes["track_running_stats"] or self._untracked) or (momentum == 0 and not self._still):
            return self._forward(*args, **kwargs)
        if self._held.get("running_mean") is not self._mean or self._held.get("running_var") is not self._var:
            self._elsewhere = True
            return self._forward(*args, **kwargs)
        self._used = True
        if not count and (self._alone or self._untracked):
            self.empty += 1
            return self._forward(*args, **kwargs)
        if self._torchs:
            self._take(batch, count)
        self._held.update(self._inside)
        if not self._by_hand:
            attributes["momentum"] = 1.0
        try:
            output = self._forward(*args, **kwargs) if self._torchs else self._watched(batch, args, kwargs)
        finally:
            self._held.update(self._own)
            attributes["momentum"] = momentum
        return output

    def begin_batch(self) -> None:
        """Forget how the last batch was used."""
        self._used = self._elsewhere = False
        self._versions = self._mean._version + self._var._version

    def end_batch(self) -> None:
        """Look whether the batch left its statistics here.

        Raises:
            RecalibrationError: If other buffers lie in the layer, or have lain there whenever it was called; or if
                something wrote to its own ones, as to undo the update of a forward that is counted.
        """
        if not self._holds(self._own) or (self._elsewhere and not self._used):
            raise not_written(self.name)
        if self._used and self._mean._version + self._var._version != self._versions:
            raise RecalibrationError(
                f"code inside the forward writes to the running statistics of BatchNorm layer {named(self.name)}, so "
                "it is not known which of the layer's forwards count in training. Nothing was changed; run forwards "
                "that do not count inside without_updates, or pass a forward= without them."
            )

    def wrote_others(self) -> bool:
        """Whether a forward of the user's own ever wrote other statistics than those of its input; waits for them."""
        return self._differs is not None and bool(self._differs)

    def _holds(self, buffers: Mapping[str, Tensor | None]) -> bool:
        # In every forward of every layer: no loop.
        held = self._held
        return held.get("running_mean") is buffers["running_mean"] and held.get("running_var") is buffers["running_var"]

    def _given(self, batch: Tensor) -> None:
        self._take(batch, values_per_channel(self.name, self._layer, batch, self._alone))

    def _take(self, batch: Tensor, count: int) -> None:
        """Make room for the statistics of a batch that are computed next."""
        if self.count != NOT_CALLED:
            # A second use in this batch would overwrite the first.
            self._merge()
        self.count = count
        if self._by_hand:
            for written, values in zip(self._written, _statistics(batch), strict=True):
                written.copy_(values)

    def _watched(self, batch: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward of the user's own may normalize a part of its input, in several parts, or compute by itself."""
        if self.count != NOT_CALLED:
            self._merge()
        with _BatchNormCalls(self._inside["running_mean"], self._given):
            output = self._forward(*args, **kwargs)
        if not self._holds(self._inside):
            raise not_written(self.name)
        if self.count == NOT_CALLED:
            self._given(batch)
            if self._alone and not self._by_hand:
                differs = _differ(torch.stack(self._written).double(), _statistics(batch).double(), self.count)
                self._differs = differs if self._differs is None else self._differs | differs
        return output


class _BatchNormCalls(TorchFunctionMode):
    """Tells of calls of torch's functional batch norm that write to certain statistics, before they are run."""

    def __init__(self, running_mean: Tensor | None, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._running_mean, self._tell = running_mean, tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS and any(value is self._running_mean for value in (*args, *kwargs.values())):
            training = args[5] if len(args) > 5 else kwargs.get("training", False)
            if training:
                self._tell(args[0] if args else kwargs["input"])
                # Whatever weight the forward gives the batch: what is wanted are its statistics.
                if len(args) > 6:
                    args = (*args[:6], 1.0, *args[7:])
                else:
                    kwargs = {**kwargs, "momentum": 1.0}
        return func(*args, **kwargs)


def _statistics(batch: Tensor) -> Tensor:
    """Mean and unbiased variance of each channel, ``(2, C)``; of one value its biased one, which is 0."""
    values = batch.detach().movedim(1, 0).flatten(1)
    values = values.to(torch.float32 if values.dtype in NARROW else values.dtype)
    var, mean = torch.var_mean(values, 1, correction=min(1, values.shape[1] - 1))
    return torch.stack((mean, var))


def _differ(wrote: Tensor, right: Tensor, count: int) -> Tensor:
    """Whether statistics differ by more than rounding; the variance may be the biased one. One element."""
    mean, var = (wrote - right).abs() / torch.stack((right[1].sqrt(), right[1])).clamp(min=1e-12)
    biased = (wrote[1] * count / max(count - 1, 1) - right[1]).abs() / right[1].clamp(min=1e-12)
    return torch.maximum(mean, torch.minimum(var, biased)).max() > _SAME


def not_written(*names: str) -> RecalibrationError:
    """The error of layers whose statistics are not where they were to be written."""
    return RecalibrationError(
        f"statistics of BatchNorm layer {quoted(names)} could not be collected: the forward replaced its running "
        "statistics, or the layer normalizes with other statistics than those of its input. Nothing was changed; "
        "pass a forward= that does not replace them, or leave the layer out with exclude."
    )
