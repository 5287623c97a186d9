"""Processes kept together whose forwards wait for each other, as those of SyncBatchNorm layers do.

A synchronized layer's forward in train mode is a collective: a process that runs one batch more than another, or fails
where the other does not, would leave it waiting. So before every batch the processes agree, with one small all_reduce,
that all of them go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lightning_bn.functional.distributed.agreement import DisagreementError
from lightning_bn.functional.distributed.waiting import waiting


class Lockstep:
    """Agreement before every batch.

    Args:
        device: Where the process group can communicate.
        parts: How many things are estimated, each of which may have enough before the others.
        tasks: Which a batch may belong to.
    """

    def __init__(self, device: torch.device, parts: int = 1, tasks: Sequence[str] = ()) -> None:
        self._device, self._parts = device, parts
        self._tasks: tuple[str | None, ...] = (None, *tasks) if tasks else ()
        self._together = True
        self._over = False

    def go_on(
        self,
        ended: bool,
        precise: Sequence[bool],
        samples: Sequence[int],
        enough_samples: int | None,
        *,
        task: str | None = None,
        ran: Sequence[str] = (),
    ) -> list[bool]:
        """Return of what all processes want more, as they run another batch; nothing if they run none.

        Every one of them has to ask.

        Args:
            ended: Whether this process has no batch or wants none.
            precise: Of all that is estimated, whether this process has as small an error as was asked for.
            samples: Used so far in this process, of each.
            enough_samples: Over all processes, of each; None does not limit.
            task: Of the batch that comes; None if none is told.
            ran: Tasks that the last batch ran, in their order.

        Raises:
            RuntimeError: If another process failed.
            DisagreementError: On every process, if they ran different tasks, or are about to.
        """
        # By its square too: all are the same where the squared distances from the own one add up to nothing.
        own = int.from_bytes(hashlib.sha256(repr(list(ran)).encode()).digest()[:3], "big")
        coming = [int(not ended and one == task) for one in self._tasks]
        failed, anybody_ended, sums, squares, *others = self._tell(
            0, int(ended), own, own**2, *map(int, precise), *samples, *coming
        )
        world, parts = dist.get_world_size(), self._parts
        if failed:
            self._together = False
            raise RuntimeError(
                f"recalibration failed on {failed} of {world} processes: look for their errors. Nothing was changed "
                "on this process."
            )
        mixed = {str(one): count for one, count in zip(self._tasks, others[2 * parts :], strict=True) if count}
        if squares - 2 * own * sums + world * own**2 or (not anybody_ended and len(mixed) > 1):
            self._together = False
            found = ", ".join(f"{one!r} on {count}" for one, count in mixed.items())
            what = (
                f"the next batch is of task {found} of the processes"
                if len(mixed) > 1
                else f"this one ran the tasks {list(ran)}"
            )
            raise DisagreementError(
                f"the processes run batches of different tasks at the same time ({what}), but SyncBatchNorm "
                "normalizes the batches of all processes together: give all processes a batch of the same task. "
                "Nothing was changed."
            )
        wanted = [
            all_precise < world and (enough_samples is None or total < enough_samples)
            for all_precise, total in zip(others[:parts], others[parts : 2 * parts], strict=True)
        ]
        self._over = bool(anybody_ended) or not any(wanted)
        return [] if self._over else wanted

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
            self._tell(1)
        return self._together

    def _tell(self, *values: int) -> list[int]:
        told = torch.zeros(4 + 2 * self._parts + len(self._tasks), dtype=torch.int64)
        told[: len(values)] = torch.tensor(values)
        told = told.to(self._device)
        with waiting("this process"):
            dist.all_reduce(told)
            totals: list[int] = told.tolist()
        return totals
