"""Statistics of several tasks together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from lightning_bn.functional.statistics.snapshots import Snapshot


def mixture_of(parts: Mapping[str, Snapshot], weights: Mapping[str, float]) -> Snapshot:
    """Return the mean of means, and the mean of variances plus the variance of means.

    Args:
        parts: By task, of the same layers.
        weights: Of the same tasks.

    Raises:
        ValueError: If a weight is negative, or all are 0.

    Source: the law of total variance.
    """
    total = sum(weights.values())
    if not all(weight >= 0 for weight in weights.values()) or not total > 0:
        raise ValueError(f"weights={weights!r}: no weight may be negative, and at least one must be above 0.")
    first = next(iter(parts.values()))
    shares = torch.tensor([weights[task] / total for task in parts], dtype=torch.float64)[:, None]
    means, variances = (
        torch.stack([getattr(part, key).double().cpu() for part in parts.values()]) for key in ("mean", "var")
    )
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return replace(first, mean=mean.to(first.mean), var=var.to(first.var))
