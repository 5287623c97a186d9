"""Standard errors of pooled statistics, from how far those of single batches are from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.functional.statistics.sample_moments import Moments, variance


@dataclass(frozen=True)
class ErrorSums:
    """Sums over batches from which standard errors of the pooled mean and variance follow.

    With n values in a batch, d the distance of its mean from that of the first batch and e its mean squared distance
    from there: the contribution of a batch to the pooled variance is linear in d and e, so that sums of their products
    with n^2 are enough, whatever the pooled mean turns out to be. The batch is the unit: positions within an image, and
    several uses of a layer in one forward, are not independent.

    Attributes:
        batches: How many, per channel, shape ``(C,)``.
        origin: Mean of the first batch, ``(C,)``.
        sums: Of n^2, n^2 d, n^2 d^2, n^2 e, n^2 d e and n^2 e^2, ``(6, C)``.

    Source: Cochran (1977), "Sampling Techniques", section 9A: the ratio estimator over clusters.
    """

    batches: Tensor
    origin: Tensor
    sums: Tensor

    @classmethod
    def none(cls, zeros: Tensor) -> ErrorSums:
        """Of no batch yet; ``zeros`` gives shape, dtype and device."""
        return cls(zeros, zeros, torch.stack([zeros] * 6))

    def with_batch(self, batch: Moments) -> ErrorSums:
        """With one batch more; channels with count 0 are not in it."""
        there = batch.count > 0
        origin = torch.where(self.batches > 0, self.origin, batch.mean)
        d = torch.where(there, batch.mean - origin, 0)
        e = torch.where(there, batch.m2 / batch.count.clamp(min=1), 0) + d.square()
        n2 = batch.count.square()
        n2d, n2e = n2 * d, n2 * e
        sums = torch.stack((n2, n2d, n2d * d, n2e, n2d * e, n2e * e))
        return ErrorSums(self.batches + there, origin, self.sums + sums)

    def squared(self, pooled: Moments) -> Tensor:
        """Return the summed squared n-fold distances of batches from the pooled mean and variance, ``(2, C)``.

        Corrected by b / (b - 1) for b batches; infinite for fewer than two. Divided by the squared count they are the
        squared standard errors, so that those of disjoint samples add up.
        """
        shift = pooled.mean - self.origin
        # Of the mean: d - shift. Of the variance: q - v with q = e - 2 shift d + shift^2.
        about = shift.square() - variance(pooled, unbiased=False)
        n2, n2d, n2dd, n2e, n2de, n2ee = self.sums
        mean = n2dd - 2 * shift * n2d + shift.square() * n2
        var = n2ee - 4 * shift * n2de + 4 * shift.square() * n2dd
        var = var + 2 * about * (n2e - 2 * shift * n2d) + about.square() * n2
        correction = self.batches / (self.batches - 1).clamp(min=1)
        # Rounding may leave a little below zero.
        return torch.where(self.batches > 1, torch.stack((mean, var)).clamp(min=0) * correction, torch.inf)


def relative_errors(pooled: Moments, squared: Tensor, eps: Tensor) -> Tensor:
    """Return the standard error of the mean in standard deviations, or of the variance in variances if that is larger.

    Args:
        pooled: The statistics that were estimated.
        squared: Squared deviations of both, as :meth:`ErrorSums.squared` gives them.
        eps: Added to the variance, so that a collapsed channel has no error.
    """
    count = pooled.count.clamp(min=1)
    scale = variance(pooled, unbiased=False) + eps
    return torch.maximum((squared[0] / scale).sqrt() / count, squared[1].sqrt() / scale / count)
