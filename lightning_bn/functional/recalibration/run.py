"""One run over the data: batches fed to the model until the stopping rule or the data ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_bn.functional._batches import batches_in, describe_batch, num_samples, to_device
from lightning_bn.functional._text import counted, named
from lightning_bn.functional.distributed.lockstep import Lockstep
from lightning_bn.functional.layers.sets_per_task import SetsPerTask
from lightning_bn.functional.recalibration.collection import Collection as Collected
from lightning_bn.functional.recalibration.collection import TaskOf, known_task
from lightning_bn.functional.recalibration.one_value_per_channel import OneValuePerChannelError
from lightning_bn.functional.recalibration.stopping import StoppingRule

_END = object()
PATIENCE = 1000
"""Batches in a row of which no task that lacks some has any: then the pass ends, as a loader may never do."""


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
    """A run over the data in one process, in which each task has enough for itself, and what has no tasks as well.

    Args:
        rule: What ends it, for each of them.
        device: Where batches are moved.
        parts: The tasks, and None for layers without statistics per task.
        sets: The statistics per task; None if there are none.
        task_of: Tells the task of a batch; None where only contexts do.
        lockstep: Keeps processes together whose forwards wait for each other; None where they do not.

    Attributes:
        counts: Of this process so far, by task; under None of what was used for layers without tasks or, if there are
            none, for any task.
    """

    def __init__(
        self,
        rule: StoppingRule,
        device: torch.device,
        parts: Collection[str | None] = (None,),
        sets: SetsPerTask | None = None,
        task_of: TaskOf | None = None,
        lockstep: Lockstep | None = None,
    ) -> None:
        self.counts: dict[str | None, Counts] = dict.fromkeys((None, *parts), Counts())
        self._open = dict.fromkeys(parts, True)
        self._rule, self._device, self._lockstep = rule, device, lockstep
        self._sets, self._task_of = sets, task_of
        self._skipped_at = ""
        self._at_the_end = False
        self._in_vain = 0

    def feed(self, batches: Iterable[Any], forward: Callable[[Any], Any], collected: Collected) -> None:
        """Feed batches until the rule is met for every task, or the data ends.

        Args:
            batches: Not iterated further than needed. Those of a task that has enough are passed over.
            forward: Runs the model on one batch.
            collected: Gathers what comes of it.

        Raises:
            RuntimeError: If another process in the lockstep failed.
            ValueError: If a batch belongs to an unknown task.
        """
        iterator, lockstep = batches_in(batches), self._lockstep
        ran: Collection[str | None] = ()
        while True:
            precise = self._look(collected, ran)
            batch = self._next(iterator)
            # Before the others are told that this process goes on: whatever fails from there on leaves them waiting.
            own = None if batch is _END else self._own_task(batch)
            passed_over = self._passed_over(own)
            moved = _END if batch is _END or passed_over else to_device(batch, self._device)
            if lockstep is not None and not self._together(lockstep, collected, batch is _END, precise, own):
                return
            if batch is _END:
                return
            ran = ()
            if passed_over or self._passed_over(own):
                self._in_vain += 1
                continue
            try:
                with lockstep.forward() if lockstep is not None else nullcontext(), collected.batch(own):
                    forward(moved)
            except StopIteration as error:
                # It would end the loop of whoever called, and so an epoch.
                raise RuntimeError("an iterator inside the forward of a recalibration ran out of batches") from error
            except OneValuePerChannelError as error:
                if lockstep is not None:
                    raise
                self._skipped_at = error.layer
                for key in self._used(own, collected):
                    self.counts[key] = replace(self.counts[key], skipped=self.counts[key].skipped + 1)
            else:
                ran = self._used(own, collected)
                for key in ran:
                    self._count(batch, key)

    def why_nothing(self) -> str:
        """Return why no batch could be used, and the way out."""
        skipped = self.counts[None].skipped
        if skipped:
            return (
                f"none of {counted(skipped, 'batch', 'batches')} could be used: BatchNorm layer "
                f"{named(self._skipped_at)} got one value per channel in each. Use batches of at least 2 samples, or "
                "leave the layer out with exclude."
            )
        if self._lockstep is not None and not self._at_the_end:
            return (
                "another process had no batch, and with SyncBatchNorm layers all processes stop when the first has "
                "no more: nothing was changed. Give every process a share of the data."
            )
        many = f" (num_batches={self._rule.num_batches})" if self._rule.num_batches else ""
        return f"the loader gave no batch{many}: nothing was changed. Is the dataset or iterator empty?"

    def _own_task(self, batch: Any) -> str | None:
        """The task that a batch is said to belong to."""
        name = None if self._task_of is None else self._task_of(batch)
        return name if name is None or self._sets is None else known_task(name, self._sets, "task_of")

    def _look(self, collected: Collected, ran: Collection[str | None]) -> list[bool]:
        """Close what has enough; return of each part whether it is closed, or would be if others were as precise."""
        together, precise = self._lockstep is not None, []
        for key, is_open in self._open.items():
            counts, part = self.counts[key], collected.parts[key]
            # In lockstep the samples of all processes are known, and counted there.
            samples = 0 if together else counts.samples or 0
            small = key in ran and self._rule.precise_enough(counts.batches, part.largest_standard_error)
            if is_open and (self._rule.enough(counts.batches + counts.skipped, samples) or (small and not together)):
                self._close(collected, key)
            precise.append(small or not self._open[key])
        return precise

    def _together(
        self, lockstep: Lockstep, collected: Collected, ended: bool, precise: Sequence[bool], own: str | None
    ) -> bool:
        """Whether all processes run this batch, or pass it over."""
        samples = [self.counts[key].samples or 0 for key in self._open]
        ran = [task for task in collected.running if task is not None]
        wanted = lockstep.go_on(ended, precise, samples, self._rule.num_samples, task=own, ran=ran)
        for key, more in zip(tuple(self._open), wanted, strict=bool(wanted)):
            if not more:
                self._close(collected, key)
        return bool(wanted)

    def _close(self, collected: Collected, key: str | None) -> None:
        self._open[key], collected.parts[key].closed = False, True

    def _passed_over(self, own: str | None) -> bool:
        """Whether nothing lacks what a batch of this task would bring."""
        return own is not None and not self._open.get(own) and not self._open.get(None)

    def _used(self, own: str | None, collected: Collected) -> list[str | None]:
        """What a batch was of use to."""
        of: set[str | None] = {*collected.served} or {own}
        found: list[str | None] = [key for key, is_open in self._open.items() if is_open and (key is None or key in of)]
        self._in_vain = 0 if found else self._in_vain + 1
        return found if not found or None in self._open else [None, *found]

    def _next(self, iterator: Iterator[Any]) -> Any:
        """The next batch, or that there is none or none is wanted."""
        if not any(self._open.values()):
            return _END
        batch = next(iterator, _END) if self._in_vain < PATIENCE or not self._rule.bounded else _END
        if batch is _END:
            self._at_the_end = True
            for key, is_open in self._open.items():
                # Nothing ends early of which no amount was asked for.
                asked = self._rule.num_batches or self._rule.num_samples or (key is not None and self._rule.bounded)
                self.counts[key] = replace(self.counts[key], ended_early=int(is_open and bool(asked)))
        return batch

    def _count(self, batch: Any, key: str | None) -> None:
        # A batch with parts of several tasks has them under their names.
        part = batch[key] if isinstance(batch, Mapping) and key is not None and key in batch else batch
        counts, here = self.counts[key], num_samples(part)
        if here is None and self._rule.num_samples is not None:
            raise ValueError(
                f"num_samples={self._rule.num_samples} counts samples by the first tensor of a batch, and there is "
                f"none in {describe_batch(part)}: use num_batches instead."
            )
        samples = None if here is None or counts.samples is None else counts.samples + here
        self.counts[key] = replace(counts, batches=counts.batches + 1, samples=samples)
