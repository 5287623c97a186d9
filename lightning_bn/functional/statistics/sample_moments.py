"""Count, mean and summed squared deviations of a sample: of a batch, merged with another sample's, finalized."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """What a sample of values per channel is summarized to; merging loses nothing but rounding.

    Attributes:
        count: Values per channel, shape ``()`` or ``(C,)``. Zero is the empty sample.
        mean: Shape ``(C,)``, in units of x.
        m2: Sum of squared deviations from the mean, shape ``(C,)``, in units of x**2.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody counts tensors with
    mean: Tensor
    m2: Tensor


def moments(x: Tensor, channel_dim: int = 1) -> Moments:
    """Moments of one batch for each channel, in float64 by two passes.

    Args:
        x: Any real tensor, for instance ``(N, C)`` or ``(N, C, H, W)``.
        channel_dim: Which dimension is C.

    Raises:
        ValueError: If ``x`` has no such dimension or is complex.

    Example:
        >>> moments(torch.tensor([[1.0], [3.0]]))
        Moments(count=tensor(2., dtype=torch.float64), mean=tensor([2.], dtype=torch.float64), m2=tensor([2.], \
dtype=torch.float64))
    """
    if x.is_complex() or not -x.dim() <= channel_dim < x.dim():
        raise ValueError(
            f"moments need a real tensor with a dimension {channel_dim}, found {tuple(x.shape)} of {x.dtype}"
        )
    values = x.detach().movedim(channel_dim, 0).flatten(1).to(torch.float64)
    count = torch.tensor(float(values.shape[1]), dtype=torch.float64, device=x.device)
    if values.shape[1] == 0:
        return Moments(count, values.new_zeros(values.shape[0]), values.new_zeros(values.shape[0]))
    mean = values.mean(1)
    return Moments(count, mean, (values - mean[:, None]).square().sum(1))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint samples.

    Args:
        a: Of one sample: ``count`` values per channel, ``mean`` and ``m2`` of shape ``(C,)`` in units of x and x**2. An
            empty sample (count 0) changes nothing, whatever finite numbers it carries.
        b: Of the other, with the same ``C``.

    Raises:
        ValueError: If the channel counts differ.

    Source: Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of {tuple(a.mean.shape)} and {tuple(b.mean.shape)} channels cannot be merged")
    count = a.count + b.count
    share = torch.where(count > 0, b.count / count.clamp(min=1), torch.zeros_like(count))
    delta = b.mean - a.mean
    # With an empty `a` the mean is exactly b's, not what rounding leaves of a.mean + (b.mean - a.mean).
    mean = torch.where(share < 1, a.mean + delta * share, b.mean)
    return Moments(count, mean, a.m2 + b.m2 + delta.square() * (a.count * share))


def variance(sample: Moments, unbiased: bool = True) -> Tensor:
    """The variance of a sample, shape ``(C,)``: unbiased, ``m2 / (count - 1)``, or biased, ``m2 / count``.

    torch's BatchNorm stores the unbiased one and normalizes a batch with the biased one. NaN where it is undefined:
    fewer than two values, or none.

    Args:
        sample: What :func:`moments` or :func:`merge` gave.
        unbiased: Whether to divide by ``count - 1``.
    """
    divisor = (sample.count - 1 if unbiased else sample.count).expand_as(sample.m2)
    return torch.where(divisor > 0, sample.m2 / divisor, torch.full_like(sample.m2, torch.nan))
