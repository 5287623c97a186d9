"""What is written into the layers: population statistics, blended with what was there if that is wanted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.snapshots import snapshot_of


def blended(
    statistics: Tensor, targets: Mapping[str, _BatchNorm], prior: float, samples: int | None, *, distributed: bool
) -> Tensor:
    """Averages of what the layers hold and what was found, ``(2, C)``, weighted by the samples of each."""
    if samples is None:
        raise ValueError(
            f"prior={prior} needs the number of samples, which is counted by the first tensor of a batch, and a batch "
            "held none: nothing was changed. Leave prior out, or use batches that hold a tensor."
        )
    before = snapshot_of(targets)
    held = torch.stack((before.mean, before.var)).to(statistics)
    if distributed:
        # Moving averages may differ between processes; afterwards all hold the same.
        held = held.to(before.mean.device)
        dist.broadcast(held, 0)
    return torch.lerp(held.to(statistics), statistics, samples / (samples + prior))


def unheld_by(statistics: Tensor, targets: Mapping[str, _BatchNorm], layout: ChannelLayout) -> dict[str, str]:
    """By layer the statistic that its dtype cannot hold, in words."""
    dtypes = {name: layer.running_var.dtype for name, layer in targets.items() if layer.running_var is not None}
    largest_of = {dtype: torch.finfo(dtype).max for dtype in {*dtypes.values()}}
    limits = layout.constant(tuple(largest_of[dtype] for dtype in dtypes.values()), statistics.device)
    over = ~(statistics.abs() <= limits)
    if not over.any():
        return {}
    parts, found = layout.split(statistics), {}
    for name, *counts in zip(layout.names, *layout.sum(over.double()).tolist(), strict=True):
        for quantity, count, values in zip(("mean", "variance"), counts, parts[name], strict=True):
            if count:
                largest = float(values.abs().max())
                found[name] = f"{quantity} {largest:.3g} in {str(dtypes[name]).removeprefix('torch.')}"
    return found


def write(layers: Mapping[str, _BatchNorm], statistics: Tensor) -> None:
    """Write mean and variance of all layers, ``(2, C)`` in their order, into the tensors that the layers hold."""
    sizes = [layer.num_features for layer in layers.values()]
    buffers = [layer.running_mean for layer in layers.values()] + [layer.running_var for layer in layers.values()]
    with torch.no_grad():
        torch._foreach_copy_(buffers, [part for row in statistics for part in row.split(sizes)])  # type: ignore[arg-type]
