"""One run over the data: batches fed to the model until the stopping rule or the data ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_bn.functional._batches import batches_in, describe_batch, num_samples, to_device
from lightning_bn.functional._text import named
from lightning_bn.functional.distributed.lockstep import Lockstep
from lightning_bn.functional.recalibration.collector import Collector
from lightning_bn.functional.recalibration.one_value_per_channel import OneValuePerChannelError
from lightning_bn.functional.recalibration.stopping import StoppingRule

_END = object()


@dataclass(frozen=True)
class Counts:
    """How much of the data came and was used, in one process or over all.

    Attributes:
        batches: Used.
        skipped: Left out because a layer saw one value per channel.
        samples: In the batches used; None if they cannot be counted.
        ended_early: Processes whose data ended before the stopping rule did.
    """

    batches: int = 0
    skipped: int = 0
    samples: int | None = 0
    ended_early: int = 0


class CollectionRun:
    """A run over the data in one process.

    Args:
        rule: What ends it.
        device: Where batches are moved.
        lockstep: Keeps processes together whose forwards wait for each other; None where they do not.

    Attributes:
        counts: Of this process so far.
    """

    def __init__(self, rule: StoppingRule, device: torch.device, lockstep: Lockstep | None = None) -> None:
        self.counts = Counts()
        self._rule = rule
        self._device = device
        self._lockstep = lockstep
        self._skipped_at = ""
        self._at_the_end = False

    def feed(self, batches: Iterable[Any], forward: Callable[[Any], Any], collector: Collector) -> None:
        """Feed batches until the rule or the data ends.

        Args:
            batches: Not iterated further than needed.
            forward: Runs the model on one batch.
            collector: Gathers what comes of it.

        Raises:
            RuntimeError: If another process in the lockstep failed.
        """
        iterator, lockstep, rule = batches_in(batches), self._lockstep, self._rule
        while True:
            precise = rule.precise_enough(self.counts.batches, collector.largest_standard_error)
            batch = _END if precise and lockstep is None else self._next(iterator)
            # Before the others are told that this process goes on: whatever fails from there on leaves them waiting.
            moved = _END if batch is _END else to_device(batch, self._device)
            if lockstep is None:
                if batch is _END:
                    return
            elif not lockstep.go_on(batch is _END, precise, self.counts.samples or 0, rule.num_samples):
                return
            try:
                with lockstep.forward() if lockstep is not None else nullcontext(), collector.batch():
                    forward(moved)
            except StopIteration as error:
                # It would end the loop of whoever called, and so an epoch.
                raise RuntimeError("an iterator inside the forward of a recalibration ran out of batches") from error
            except OneValuePerChannelError as error:
                if lockstep is not None:
                    raise
                self.counts = replace(self.counts, skipped=self.counts.skipped + 1)
                self._skipped_at = error.layer
            else:
                self._count(batch)

    def why_nothing(self) -> str:
        """Return why no batch could be used, and the way out."""
        if self.counts.skipped:
            return (
                f"no batch could be used: in all {self.counts.skipped} of them BatchNorm layer "
                f"{named(self._skipped_at)} "
                f"saw one value per channel. Use batches of at least 2 samples, or leave the layer out with exclude."
            )
        if self._lockstep is not None and not self._at_the_end:
            return (
                "another process had no batch, and with SyncBatchNorm layers all run as many as the one that has the "
                "fewest: nothing was changed. Give every process a share of the data."
            )
        many = f" ({self._rule.num_batches} were asked for)" if self._rule.num_batches else ""
        return f"the loader gave no batch{many}: nothing was changed. Is the dataset or iterator empty?"

    def _next(self, iterator: Iterator[Any]) -> Any:
        """The next batch, or that there is none or none is wanted."""
        counts, rule = self.counts, self._rule
        # In lockstep the samples of all processes are known, and counted there.
        if rule.enough(counts.batches + counts.skipped, 0 if self._lockstep else counts.samples or 0):
            return _END
        batch = next(iterator, _END)
        if batch is _END:
            self._at_the_end = True
            # Nothing ends early of which no amount was asked for.
            self.counts = replace(counts, ended_early=int(bool(rule.num_batches or rule.num_samples)))
        return batch

    def _count(self, batch: Any) -> None:
        counts, here = self.counts, num_samples(batch)
        if here is None and self._rule.num_samples is not None:
            raise ValueError(
                f"num_samples={self._rule.num_samples} needs batches whose samples can be counted by the first tensor "
                f"in them, found a {describe_batch(batch)}: limit with num_batches instead."
            )
        samples = None if here is None or counts.samples is None else counts.samples + here
        self.counts = replace(counts, batches=counts.batches + 1, samples=samples)
