"""Running statistics of many layers as one named, flat value: take, write back, compare."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._bits import same_bits
from lightning_bn.functional._text import counted, named, quoted
from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.properties import is_lazy
from lightning_bn.functional.layers.selection import LayerSelection, batch_norm_layers
from lightning_bn.functional.layers.sets_per_task import Statistics
from lightning_bn.functional.layers.status import is_frozen
from lightning_bn.functional.statistics.channels import ChannelLayout

_NO_COUNTER = -1
_DEFAULT_EPS = 1e-5
"""torch's own."""
_TENSORS = ("mean", "var", "num_batches_tracked", "weight")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Running statistics of L layers with C channels altogether, copied at one moment.

    Attributes:
        layout: Canonical names of the layers, L of them, in registration order, and where their channels lie.
        mean: ``running_mean`` of all layers, shape ``(C,)``, in units of each layer's input.
        var: ``running_var`` of all layers, shape ``(C,)``, unbiased, in squared units of the input.
        num_batches_tracked: Shape ``(L,)``, int64; -1 for a layer without the counter.
        weight: The affine ``weight`` of all layers, shape ``(C,)``, 1 where there is none. Only read, by measures of
            drift that ask what a change does to a layer's output; never written back.
        eps: Each layer's ``eps``.
    """

    layout: ChannelLayout
    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor
    weight: Tensor
    eps: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers, in registration order."""
        return self.layout.names

    def eps_of(self) -> Tensor:
        """Each channel's ``eps``, shape ``(C,)``, float64, on the statistics' device."""
        return self.layout.constant(self.eps, self.mean.device)

    def to(self, device: torch.device | str) -> Snapshot:
        """The same snapshot with its tensors on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def where_doubles_are(self) -> Snapshot:
        """The same snapshot, on the CPU if its device has no float64, as Apple's MPS has not."""
        return self.to("cpu") if self.mean.device.type == "mps" else self

    def only(self, names: Collection[str]) -> Snapshot:
        """Of some of the layers, in the order of this snapshot."""
        kept = [name for name in self.names if name in names]
        chosen = [self.names.index(name) for name in kept]
        per_channel = {name: self.layout.pick(getattr(self, name), kept) for name in ("mean", "var", "weight")}
        counters, eps = self.num_batches_tracked[chosen], tuple(self.eps[index] for index in chosen)
        return Snapshot(self.layout.restrict(kept), num_batches_tracked=counters, eps=eps, **per_channel)

    def same_bits(self, other: Snapshot) -> bool:
        """Whether layers, statistics and counters are the same, bit by bit; ``weight``, only read, is not compared."""
        return (
            self.layout == other.layout
            and same_bits(self.mean, other.mean)
            and same_bits(self.var, other.var)
            and torch.equal(self.num_batches_tracked, other.num_batches_tracked.to(self.num_batches_tracked.device))
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors, lists and strings only, for a checkpoint that is read with ``weights_only=True``."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        layout = {"names": list(self.names), "channels": list(self.layout.sizes)}
        return {"format": 1, **layout, **tensors, "eps": list(self.eps)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Snapshot:
        """The snapshot that :meth:`state_dict` described; what another version wrote beside it is not read."""
        layout = ChannelLayout(tuple(state["names"]), tuple(state["channels"]))
        unknown = torch.full((len(layout),), _NO_COUNTER)
        return cls(
            layout,
            mean=state["mean"],
            var=state["var"],
            num_batches_tracked=state.get("num_batches_tracked", unknown),
            weight=state.get("weight", torch.ones_like(state["mean"])),
            eps=tuple(state.get("eps", (_DEFAULT_EPS,) * len(layout))),
        )


def take_snapshot(model: nn.Module, modules: Patterns = None, *, exclude: Patterns = None, root: str = "") -> Snapshot:
    """Return copies of the running statistics of the selected layers; nothing in ``model`` changes.

    Args:
        model: Any module.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`; None takes every layer that keeps running
            statistics.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.

    Raises:
        SelectionError: As for ``batch_norm_layers``, or if a layer selected by ``modules`` has no running statistics.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> before = take_snapshot(layer)
        >>> _ = layer(torch.randn(8, 2))
        >>> restore_snapshot(layer, before)
        >>> take_snapshot(layer).same_bits(before)
        True
    """
    return snapshot_of(LayerSelection(modules, exclude, root).tracked_layers(model))


def snapshot_of(layers: Mapping[str, Statistics], weight: Tensor | None = None) -> Snapshot:
    """Return the snapshot of layers that are already resolved; each must have running statistics.

    Args:
        layers: By name.
        weight: What to take for their affine weights, ``(C,)``; None reads them.
    """
    listed = list(layers.values())
    with torch.no_grad():
        return Snapshot(
            layout=ChannelLayout.of(layers),
            mean=_flat([_tensor(layer.running_mean) for layer in listed]),
            var=_flat([_tensor(layer.running_var) for layer in listed]),
            num_batches_tracked=_counters(listed),
            weight=_flat([_weight(layer) for layer in listed]) if weight is None else weight,
            eps=tuple(layer.eps for layer in listed),
        )


def restore_snapshot(model: nn.Module, snapshot: Snapshot) -> None:
    """Write a snapshot's running statistics and counters back, in place and bit-exactly.

    The buffers stay the same tensor objects. Layers that the snapshot does not name, and all weights, are left alone.
    Where layers differ in dtype, a NaN stays a NaN but may lose its payload.
    Everything is checked before anything is written.

    Args:
        model: The module the snapshot was taken of, or one with BatchNorm layers of the same names and channels.
        snapshot: What to write.

    Raises:
        ValueError: If a layer of the snapshot is missing in ``model``, has no running statistics, another number of
            channels or buffers of a dtype that cannot hold the values.
    """
    layers = batch_norm_layers(model)
    missing = [name for name in snapshot.names if name not in layers]
    if missing:
        raise ValueError(
            f"the snapshot has statistics of {quoted(missing)}, but the model has no BatchNorm layer of that name; it "
            f"has {quoted(list(layers))}. Restore it into the model that it was taken of."
        )
    write_snapshot({name: layers[name] for name in snapshot.names}, snapshot)


def restore_where_unchanged(model: nn.Module, snapshot: Snapshot, written: Snapshot) -> tuple[str, ...]:
    """Write ``snapshot`` into those layers that still hold, bit for bit, what ``written`` holds; return their names.

    Layers that were frozen meanwhile keep what they were frozen with.

    Args:
        model: Where the layers are.
        snapshot: What to write.
        written: What the layers held when they were last written to; of the same layers.

    Raises:
        ValueError: As for :func:`restore_snapshot`.
    """
    layers = batch_norm_layers(model)
    names = [name for name in written.names if name in layers and not is_frozen(layers[name])]
    parts = written.layout.slices
    unchanged = {
        name: layers[name]
        for name in names
        if same_bits(_tensor(layers[name].running_mean).to(written.mean.dtype), written.mean[parts[name]])
        and same_bits(_tensor(layers[name].running_var).to(written.var.dtype), written.var[parts[name]])
    }
    if unchanged:
        write_snapshot(unchanged, snapshot.only(unchanged))
    return tuple(unchanged)


def write_snapshot(layers: Mapping[str, _BatchNorm], snapshot: Snapshot) -> None:
    """Write a snapshot into layers that are already resolved, all of its names and no other.

    Raises:
        ValueError: As for :func:`restore_snapshot`.
    """
    parts = snapshot.layout.slices
    for name, size in zip(snapshot.names, snapshot.layout.sizes, strict=True):
        running = layers[name].running_mean
        if running is None or layers[name].running_var is None:
            raise ValueError(f"BatchNorm layer {named(name)} has no running statistics to write a snapshot into.")
        if is_lazy(running) or running.shape != (size,):
            raise ValueError(
                f"BatchNorm layer {named(name)} has {counted(layers[name].num_features, 'channel')}, but {size} in "
                "the snapshot: it was taken of another model"
                + (". If the layer is lazy, run one forward first." if is_lazy(running) else ".")
            )
        for buffer, values in ((running, snapshot.mean), (layers[name].running_var, snapshot.var)):
            _check_dtype(name, buffer, values[parts[name]])
    counters = snapshot.num_batches_tracked.tolist()
    with torch.no_grad():
        for index, (name, part) in enumerate(parts.items()):
            layer = layers[name]
            _tensor(layer.running_mean).copy_(snapshot.mean[part])
            _tensor(layer.running_var).copy_(snapshot.var[part])
            if layer.num_batches_tracked is not None and counters[index] != _NO_COUNTER:
                layer.num_batches_tracked.copy_(snapshot.num_batches_tracked[index])


def _check_dtype(name: str, buffer: Tensor | None, values: Tensor) -> None:
    """Refuse what would round silently; narrowing is exact for what was widened, as in a model of several dtypes."""
    if buffer is None or torch.promote_types(buffer.dtype, values.dtype) == buffer.dtype:
        return
    if not torch.equal(values.to(buffer.dtype).to(values.dtype).nan_to_num(nan=0.0), values.nan_to_num(nan=0.0)):
        raise ValueError(
            f"BatchNorm layer {named(name)} has {buffer.dtype} running statistics that cannot hold the snapshot's "
            f"{values.dtype} values exactly: convert the model to {values.dtype} first."
        )


def _flat(tensors: list[Tensor]) -> Tensor:
    """One copy of all values, in the narrowest dtype that holds each of them exactly, where the first one lives."""
    if not tensors:
        return torch.zeros(0)
    dtype, device = tensors[0].dtype, tensors[0].device
    if all(tensor.dtype == dtype and tensor.device == device for tensor in tensors):
        return torch.cat(tensors)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.cat([tensor.detach().to(device=device, dtype=dtype) for tensor in tensors])


def _counters(layers: list[Statistics]) -> Tensor:
    if not layers:
        return torch.zeros(0, dtype=torch.int64)
    device = _tensor(layers[0].running_mean).device
    counters = [layer.num_batches_tracked for layer in layers]
    there = [counter for counter in counters if counter is not None and counter.device == device]
    if len(there) == len(counters):
        return torch.stack(there)
    missing = torch.tensor(_NO_COUNTER, device=device)
    return torch.stack([missing if counter is None else counter.to(device) for counter in counters])


def _weight(layer: Statistics) -> Tensor:
    weight: Tensor | None = layer.weight
    return torch.ones_like(_tensor(layer.running_mean)) if weight is None else weight


def _tensor(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("a BatchNorm layer has no running statistics here, where they are needed")
    return value
