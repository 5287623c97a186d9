"""How much data a recalibration takes: what was asked for, what came, and when it is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lightning_bn.functional._batches import describe_batch, num_samples, to_device
from lightning_bn.functional.distributed.lockstep import Lockstep
from lightning_bn.functional.recalibration.collector import Collector, OneValuePerChannelError

_END = object()
_FEWEST_BATCHES = 8
"""Before an error estimated from the spread between batches is believed."""


@dataclass(frozen=True)
class Budget:
    """What ends the data, whichever comes first; None does not limit.

    Attributes:
        num_batches: Batches in this process.
        num_samples: Samples over all processes.
        max_standard_error: Largest relative standard error of any channel's mean or variance.
        processes: How many share the samples and add to what is known.

    Raises:
        ValueError: If one of them is not positive.
    """

    num_batches: int | None = None
    num_samples: int | None = None
    max_standard_error: float | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        """Refuses what asks for nothing."""
        for name in ("num_batches", "num_samples"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise ValueError(f"{name}={value!r} must be a whole number, or None for all there are.")
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None for all there are.")
        if self.max_standard_error is not None and not self.max_standard_error > 0:
            raise ValueError(f"max_standard_error={self.max_standard_error} must be positive, or None.")


class Usage:
    """How much of the data came and was used.

    Attributes:
        batches: Used.
        skipped: Left out because a layer saw one value per channel.
        samples: In the batches used; None if they cannot be counted.
        ended_early: Whether the data ended before the budget did.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.batches = 0
        self.skipped = 0
        self.samples: int | None = 0
        self.ended_early = False
        self._skipped_at = ""
        self._at_the_end = False

    def run(
        self,
        batches: Iterable[Any],
        forward: Callable[[Any], Any],
        collector: Collector,
        device: torch.device,
        lockstep: Lockstep | None = None,
    ) -> None:
        """Feeds batches until the budget or the data ends.

        Args:
            batches: Not iterated further than needed.
            forward: Runs the model on one batch.
            collector: Gathers what comes of it.
            device: Where batches are moved.
            lockstep: Keeps processes together whose forwards wait for each other; None where they do not.

        Raises:
            RuntimeError: If another process in the lockstep failed.
        """
        iterator = iter(batches)
        while True:
            precise = self._is_precise(collector)
            batch = _END if precise and lockstep is None else self._next(iterator, lockstep is not None)
            # Before the others are told that this process goes on: whatever fails from there on leaves them waiting.
            moved = _END if batch is _END else to_device(batch, device)
            if lockstep is None:
                if batch is _END:
                    return
            elif not lockstep.go_on(batch is _END, precise, self.samples or 0, self._budget.num_samples):
                return
            try:
                with lockstep.forward() if lockstep is not None else nullcontext(), collector.batch():
                    forward(moved)
            except OneValuePerChannelError as error:
                if lockstep is not None:
                    raise
                self.skipped += 1
                self._skipped_at = error.layer
            else:
                self.batches += 1
                count = num_samples(batch)
                if count is None and self._budget.num_samples is not None:
                    raise ValueError(
                        f"num_samples={self._budget.num_samples} needs batches whose samples can be counted by the "
                        f"first tensor in them, found a {describe_batch(batch)}: limit with num_batches instead."
                    )
                self.samples = None if count is None or self.samples is None else self.samples + count

    def why_nothing(self, in_lockstep: bool = False) -> str | None:
        """If no batch could be used, the reason and the way out."""
        if self.batches:
            return None
        if self.skipped:
            return (
                f"no batch could be used: in all {self.skipped} of them BatchNorm layer {self._skipped_at!r} saw one "
                f"value per channel. Use batches of at least 2 samples, or leave the layer out with exclude."
            )
        if in_lockstep and not self._at_the_end:
            return (
                "another process had no batch, and with SyncBatchNorm layers all run as many as the one that has the "
                "fewest: nothing was changed. Give every process a share of the data."
            )
        asked = self._budget.num_batches
        many = "" if asked is None else f" ({asked} were asked for)"
        return f"the loader gave no batch{many}: nothing was changed. Is the dataset or iterator empty?"

    @property
    def _limited(self) -> bool:
        return self._budget.num_batches is not None or self._budget.num_samples is not None

    def _next(self, iterator: Iterator[Any], in_lockstep: bool) -> Any:
        """The next batch, or that there is none or none is wanted."""
        budget, taken = self._budget, self.batches + self.skipped
        if budget.num_batches is not None and taken >= budget.num_batches:
            return _END
        # In lockstep the samples of all processes are known, and counted there.
        if budget.num_samples is not None and self.samples is not None and not in_lockstep:
            share = math.ceil(budget.num_samples / budget.processes)
            if self.samples >= share:
                return _END
        try:
            return next(iterator)
        except StopIteration:
            self._at_the_end, self.ended_early = True, self._limited
            return _END

    def _is_precise(self, collector: Collector) -> bool:
        budget = self._budget
        if budget.max_standard_error is None or not self._is_time_to_look():
            return False
        # Each process sees its own sample; together they know more by the root of their number.
        here = budget.max_standard_error * math.sqrt(budget.processes)
        return collector.largest_standard_error() <= here

    def _is_time_to_look(self) -> bool:
        """Every eighth of what was used so far: the error falls slowly, and each look waits for the device."""
        return self.batches >= _FEWEST_BATCHES and self.batches % max(1, self.batches // 8) == 0
