"""Faults that running statistics show by themselves, and how often each layer was updated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.functional.statistics.snapshots import Snapshot


@dataclass(frozen=True)
class Health:
    """State of L layers, each a tensor of shape ``(L,)`` on the snapshot's device.

    Attributes:
        nonfinite: Channels whose mean or variance is not finite.
        collapsed: Channels whose variance is below ``eps``: the layer puts out little but its bias there.
        updates: Updates of the running statistics per training batch since the earlier snapshot; NaN where there is no
            counter or it was reset.
        changed: Whether any value of the statistics differs.
        reset: Whether the counter went back, or the statistics to their initial values, since the earlier snapshot.
    """

    nonfinite: Tensor
    collapsed: Tensor
    updates: Tensor
    changed: Tensor
    reset: Tensor


def health(current: Snapshot, earlier: Snapshot, batches: int) -> Health:
    """Return the state of all layers, in a few vector operations and without waiting for the device.

    Args:
        current: The statistics now.
        earlier: Of the same layers, some training batches ago.
        batches: How many training batches lie between the two.

    Raises:
        ValueError: If the snapshots are of different layers.
    """
    if current.layout != earlier.layout:
        raise ValueError("health needs two snapshots of the same layers in the same order")
    earlier = earlier.to(current.mean.device)
    then, now = earlier.num_batches_tracked, current.num_batches_tracked
    mean, var = current.mean.to(torch.float64), current.var.to(torch.float64)
    moved = _differs(current.mean, earlier.mean) | _differs(current.var, earlier.var)
    reset = ((now >= 0) & (now < then)) | (_is_initial(current) & ~_is_initial(earlier))
    known = (then >= 0) & (now >= 0) & ~reset & (batches > 0)
    return Health(
        nonfinite=_count(current, ~(mean + var).isfinite()),
        collapsed=_count(current, var < current.eps_of()),
        updates=torch.where(known, (now - then).to(torch.float64) / max(batches, 1), torch.nan),
        changed=_count(current, moved) > 0,
        reset=reset,
    )


def newly_collapsed(current: Snapshot, reference: Snapshot, momentum: Tensor, below: float) -> Tensor:
    """Return how many channels of each layer are collapsed now and were not at a reference, ``(L,)``.

    What is left of the initial variance, 1, in a moving average that is warming up does not count.

    Args:
        current: The statistics now.
        reference: Of the same layers.
        momentum: Of the layers; NaN for a cumulative average.
        below: Variance over that of the reference, ``eps`` added to both, that a channel has to fall below.
    """
    eps = current.eps_of()
    left = current.layout.expand(initial_shares(reference, momentum))
    now, then = current.var.to(torch.float64), reference.var.to(torch.float64) - left
    return _count(current, (now < eps) & (now + eps < below * (then + eps)))


def initial_shares(current: Snapshot, momentum: Tensor) -> Tensor:
    """Return the share of initial values left in the layers' moving averages, ``(L,)``, in [0, 1]; 0 if unknown.

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


def _count(snapshot: Snapshot, channels: Tensor) -> Tensor:
    return snapshot.layout.sum(channels.to(torch.float64))


def _is_initial(snapshot: Snapshot) -> Tensor:
    return _count(snapshot, (snapshot.mean != 0) | (snapshot.var != 1)) == 0


def _differs(now: Tensor, then: Tensor) -> Tensor:
    """Return where two tensors differ; a NaN that stays one does not."""
    return (now != then) & ~(now.isnan() & then.isnan())
