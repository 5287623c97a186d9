"""The sampled batches that are judged together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_bn.functional.monitoring.batch_deviation import BatchDeviations, gap, innovation
from lightning_bn.functional.statistics.snapshots import Snapshot

_WINDOW = 8


class BatchWindow:
    """What several sampled batches looked like.

    Args:
        like: Of all channels, ``(C,)``, on the statistics' device.

    Attributes:
        innovations: How far each batch was from the moving average.
        gaps: How far those of this process were from those of all.
        judged: How many batches there are.
    """

    def __init__(self, like: Tensor) -> None:
        self.innovations = self.gaps = BatchDeviations.none(like)
        self.judged = 0

    def add(
        self,
        before: Snapshot,
        after: Snapshot,
        momentum: Tensor,
        most: float,
        mean_over_ranks: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Add the batch between two snapshots.

        Args:
            before: Right before it.
            after: Right after it.
            momentum: Of the layers.
            most: Standard deviations that it can add.
            mean_over_ranks: Gives the mean of a tensor over all processes; None in one process.
        """
        self.innovations = self.innovations.with_batch(innovation(before, after, momentum), most)
        self.judged += 1
        if mean_over_ranks is not None:
            # Of the statistics after the step, not of what this rank saw: where DDP broadcasts rank 0's buffers
            # before each forward, all ranks began at the same place. Synchronized layers have no gap.
            everywhere = mean_over_ranks(after.mean.to(torch.float64))
            self.gaps = self.gaps.with_batch(gap(everywhere, after, momentum), most)

    @property
    def is_full(self) -> bool:
        """Whether a new one is to begin."""
        return self.judged >= _WINDOW
