"""A value of a layer that changed: which, by how much, and why as far as that can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.functional._bits import same_bits

_INITIAL = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}


@dataclass(frozen=True)
class Change:
    """One value that should not have changed.

    Attributes:
        layer: Name of the layer.
        value: ``running_mean``, ``running_var``, ``num_batches_tracked``, ``weight`` or ``bias``; where a
            layer has statistics per task, which task's.
        largest_change: Largest absolute difference over its elements; NaN where one is not finite or it was replaced by
            a tensor of another shape.
        cause: What did it, as far as that can be told; else empty.
    """

    layer: str = ""
    value: str = ""
    largest_change: float = math.nan
    cause: str = ""

    def __str__(self) -> str:
        return f"{self.layer or '(the model itself)'}.{self.without_layer()}"

    def without_layer(self) -> str:
        """Return what changed, by how much and why, for where the layer has been named."""
        how_far = "" if math.isnan(self.largest_change) else f" by up to {self.largest_change:.3g}"
        cause = f" ({self.cause})" if self.cause else ""
        return f"{self.value}{how_far}{cause}"


def changes_of(key: tuple[str, str], before: Tensor, now: Tensor | None) -> list[Change]:
    """Return the one change of a layer's value, nothing if it is bit for bit what it was before.

    Args:
        key: Names of the layer and of the value.
        before: What the value was.
        now: What it is; None if it was taken away.
    """
    before = before.reshape(-1)
    if now is None:
        return [Change(*key, math.nan, "it was removed")]
    now = now.detach().reshape(-1)
    if same_bits(now, before):
        return []
    largest = math.nan
    if now.numel() == before.numel():
        largest = float((now.to(before.device, torch.float64) - before.to(torch.float64)).abs().max())
    initial = _INITIAL.get(key[1].partition(" ")[0])
    reset = initial is not None and bool((now == initial).all())
    cause = "reset to its initial value, as StochasticWeightAveraging and update_bn do" if reset else ""
    return [Change(*key, largest, cause)]
