"""What is wrong with running statistics themselves, and how often each layer was updated: no reference needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.functional.statistics.snapshots import Snapshot


@dataclass(frozen=True)
class Vitals:
    """Signs of life of L layers, each a tensor of shape ``(L,)`` on the snapshot's device.

    Attributes:
        nonfinite: Channels whose mean or variance is not finite.
        dead: Channels whose variance is below ``eps``: the layer puts out little but its bias there.
        updates: Updates of the running statistics per training batch since the earlier snapshot; NaN where there is no
            counter or it was reset.
        changed: Whether any value of the statistics differs.
        reset: Whether the counter went back, or the statistics to their initial values, since the earlier snapshot.
    """

    nonfinite: Tensor
    dead: Tensor
    updates: Tensor
    changed: Tensor
    reset: Tensor


def vitals(current: Snapshot, earlier: Snapshot, batches: int) -> Vitals:
    """Signs of life, in a few vector operations and without waiting for the device.

    Args:
        current: The statistics now.
        earlier: Of the same layers, some training batches ago.
        batches: How many training batches lie between the two.

    Raises:
        ValueError: If the snapshots are of different layers.
    """
    if current.layout != earlier.layout:
        raise ValueError("signs of life need two snapshots of the same layers in the same order")
    mean, var = current.mean.to(torch.float64), current.var.to(torch.float64)
    eps = current.eps_of()

    def per_layer(channels: Tensor) -> Tensor:
        return current.layout.sum(channels.to(torch.float64))

    then, now = earlier.num_batches_tracked.to(mean.device), current.num_batches_tracked
    moved = _differs(current.mean, earlier.mean) | _differs(current.var, earlier.var)
    initial = per_layer((mean != 0) | (var != 1)) == 0
    was_initial = per_layer((earlier.mean.to(mean.device) != 0) | (earlier.var.to(mean.device) != 1)) == 0
    reset = ((now >= 0) & (now < then)) | (initial & ~was_initial)
    counted = (then >= 0) & (now >= 0) & ~reset & (batches > 0)
    updates = torch.where(counted, (now - then).to(torch.float64) / max(batches, 1), torch.nan)
    return Vitals(
        nonfinite=per_layer(~(mean + var).isfinite()),
        dead=per_layer(var < eps),
        updates=updates,
        changed=per_layer(moved) > 0,
        reset=reset,
    )


def died(current: Snapshot, reference: Snapshot, momentum: Tensor, below: float) -> Tensor:
    """Channels of each layer that are dead now and were not at a reference, ``(L,)``.

    What is left of the initial variance, 1, in a young moving average is no sign of life.

    Args:
        current: The statistics now.
        reference: Of the same layers.
        momentum: Of the layers; NaN for a cumulative average.
        below: Variance over that of the reference, ``eps`` added to both, from which on a dead channel was alive then.
    """
    eps = current.eps_of()
    left = current.layout.expand(initial_shares(reference, momentum))
    now, then = current.var.to(torch.float64), reference.var.to(torch.float64) - left
    channels = (now < eps) & (now + eps < below * (then + eps))
    return current.layout.sum(channels.to(torch.float64))


def initial_shares(current: Snapshot, momentum: Tensor) -> Tensor:
    """Share of their initial values that is left in the layers' moving averages, ``(L,)``, in [0, 1]; 0 if unknown.

    (1 - momentum)^n after n updates, 44 of which leave 1 % at torch's default momentum of 0.1; none after the first
    update of a cumulative average.

    Args:
        current: The statistics now.
        momentum: Of the layers; NaN for a cumulative average.
    """
    updates = current.num_batches_tracked.to(momentum)
    exponential = (1 - momentum) ** updates
    share = torch.where(momentum.isnan(), (updates == 0).to(momentum), exponential)
    return torch.where(updates < 0, 0.0, share)


def _differs(now: Tensor, then: Tensor) -> Tensor:
    """Where two tensors differ; a NaN that stays one does not."""
    then = then.to(now.device)
    return (now != then) & ~(now.isnan() & then.isnan())
