"""Processes kept together whose forwards wait for each other, as those of SyncBatchNorm layers do.

A synchronized layer's forward in train mode is a collective: a process that runs one batch more than another, or fails
where the other does not, would leave it waiting. So before every batch the processes agree, with one small all_reduce,
that all of them go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lightning_bn.functional.distributed.waiting import waiting


class Lockstep:
    """Agreement before every batch.

    Args:
        device: Where the process group can communicate.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._together = True
        self._over = False

    def go_on(self, ended: bool, precise: bool, samples: int, enough_samples: int | None) -> bool:
        """Whether all processes run another batch; every one of them has to ask.

        Args:
            ended: Whether this process has no batch or wants none.
            precise: Whether this process has as small an error as was asked for.
            samples: Used so far in this process.
            enough_samples: Over all processes; None does not limit.

        Raises:
            RuntimeError: If another process failed.
        """
        failed, anybody_ended, all_precise, total = self._tell(0, int(ended), int(precise), samples)
        if failed:
            self._together = False
            raise RuntimeError(
                f"recalibration failed on {failed} of {dist.get_world_size()} processes, whose own error "
                f"says why. Nothing was changed on this one."
            )
        enough = enough_samples is not None and total >= enough_samples
        self._over = bool(anybody_ended) or enough or all_precise == dist.get_world_size()
        return not self._over

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward: a failure inside leaves the others waiting in a layer, and cannot be told to them.

        Raises:
            RuntimeError: If the others did not come, and the forward was ended for that.
        """
        self._together = False
        with waiting("a SyncBatchNorm layer"):
            yield
        self._together = True

    def settle(self) -> bool:
        """To be called at the end, also after a failure here: whether the processes are ready to merge.

        After a failure between two forwards the others are told, who are waiting for this process to go on.
        """
        if self._together and not self._over:
            self._together = False
            self._tell(1, 0, 0, 0)
        return self._together

    def _tell(self, *values: int) -> list[int]:
        told = torch.tensor(values, dtype=torch.int64, device=self._device)
        with waiting("this process"):
            dist.all_reduce(told)
            totals: list[int] = told.tolist()
        return totals
