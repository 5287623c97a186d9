"""What one recalibration did, as data and as one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.statistics.snapshots import Snapshot
from lightning_bn.functional.statistics.summary import compared_in_words, summarize


class RecalibrationError(ValueError):
    """Nothing could be recalibrated; nothing was changed. Its subclasses say why, where a caller may want to know."""


class AllFrozenError(RecalibrationError):
    """Every selected layer is frozen, or in eval inside a model in training."""


class NoUsableBatchError(RecalibrationError):
    """There was no batch, or none that any layer could be recalibrated from."""


class FailedAloneError(RecalibrationError):
    """This process could not recalibrate where others could; none of them did. They have an error too."""


class WeightsMovedError(RecalibrationError):
    """A forward wrote to trained weights; they have been put back."""


_MOST_NAMED = 3
_ITSELF = "(the model itself)"
_GOOD = 0.05
"""A standard error that changes nobody's results."""
_DREW = (
    "the forward drew random numbers although dropout layers were in eval. If a module calls dropout or stochastic "
    "depth as a function, the statistics include it and evaluation does not: containers_in_eval=True turns it off; "
    "if it augments or samples on purpose, containers_in_eval=False ends this message"
)
_WORTH_SAYING = 0.01
"""Jeffreys divergence, a variance ratio of about 1.15: below it nobody's validation changes."""


@dataclass(frozen=True)
class Recalibration:
    """What one recalibration did.

    Attributes:
        layers: Names of the layers whose statistics were rewritten.
        before: Their running statistics as they were.
        after: Their population statistics, as they are now.
        num_batches: Batches used, of all processes.
        num_samples: Samples in them; None if a batch has no tensor to count them by.
        requested_batches: Batches that each process was asked for; None for all there are.
        skipped_batches: Batches left out because a layer saw one value per channel.
        standard_error: Largest relative standard error of any channel: of its mean in standard deviations or of its
            variance in variances, estimated from how far batches lie apart; infinite for a single batch. Of the batches
            used: where others were left out as not finite, nobody knows how far off these are, and the sentence is
            silent.
        processes: How many took part.
        ended_early: Processes whose data ended before what was asked for.
        nonfinite: By layer, forwards left out because a batch statistic was not finite.
        unreached: Layers that no forward reached; left as they were.
        empty: Layers that were given only empty batches; left as they were.
        unheld: By layer, the statistic that its dtype cannot hold, in words; left as they were.
        drew_random_numbers: Whether a forward did, where ``containers_in_eval`` was not given.
        uses_apart: By layer that a forward uses several times, how many standard deviations of one use their means
            lie apart, in the furthest channel; where that is more than 1.
        frozen: Selected layers left alone because they are frozen, or in eval inside a model in training.
        seconds: How long it took; of all tasks together.
        tasks: Where layers have statistics per task, what was done to each task's, of its own batches: by name, one
            without any batch with no layers. All else is then of the layers without; if there are none, batches and
            samples are those that were used, and the standard error is the largest of a task.
        untold_batches: Batches in which layers with statistics per task ran outside of any task, which counts for the
            default one.
    """

    layers: tuple[str, ...]
    before: Snapshot
    after: Snapshot
    num_batches: int
    num_samples: int | None
    requested_batches: int | None
    skipped_batches: int
    standard_error: float
    processes: int
    ended_early: int
    nonfinite: dict[str, int]
    unreached: tuple[str, ...]
    empty: tuple[str, ...]
    unheld: dict[str, str]
    uses_apart: dict[str, float]
    drew_random_numbers: bool = False
    frozen: tuple[str, ...] = ()
    seconds: float = 0.0
    tasks: dict[str, Recalibration] = field(default_factory=dict)
    untold_batches: int = 0

    def metrics(self) -> dict[str, float]:
        """What a logger is given: amounts, seconds, the standard error, and how far off the replaced statistics were.

        ``drift_mean`` and ``drift_max`` are the Jeffreys divergence of what was replaced from what is there now, 0
        where nothing was. Those of a task follow under its name, the same keys each time.
        """
        drift = summarize(reference=self.after, current=self.before) if self.layers else None
        own = {
            "batches": self.num_batches,
            "samples": self.num_samples or 0,
            "seconds": self.seconds,
            "standard_error": self.standard_error,
            "skipped": self.skipped_batches,
            "unreached": len(self.unreached),
            "drift_mean": drift.mean if drift is not None else 0.0,
            "drift_max": drift.max if drift is not None else 0.0,
        }
        of_tasks = {
            f"{task}_{key}": value
            for task, one in self.tasks.items()
            for key, value in one.metrics().items()
            if key != "seconds"
        }
        return {**own, **of_tasks}

    def __str__(self) -> str:
        said = []
        if self.layers or not self.tasks:
            layers = counted(len(self.layers), "BatchNorm layer")
            said.append(f"{layers} recalibrated from {self._amount()} in {self.seconds:.2g} s{self._error()}")
            said += self._remarks()
        if self.tasks:
            layers = counted(len({name for one in self.tasks.values() for name in one.layers}), "BatchNorm layer")
            done = "" if said else f" recalibrated in {self.seconds:.2g} s"
            said.append(f"{layers} with statistics per task{done}: {', '.join(map(self._of_task, self.tasks))}")
        if self.untold_batches:
            said.append(
                f"{_batches(self.untold_batches)} ran partly outside of any task, which counted for the default task"
            )
        if self.frozen:
            said.append(f"{counted(len(self.frozen), 'frozen layer')} left unchanged")
        if self.drew_random_numbers:
            said.append(_DREW)
        return "; ".join(said)

    def _of_task(self, task: str) -> str:
        """What was done to a task's statistics, and whether that is less than was asked for."""
        one = self.tasks[task]
        if not one.num_batches:
            return f"{task!r} had no batch and was left unchanged"
        said = [f"{task!r} from {one._amount()}{one._error()}", *one._remarks()]
        if one.ended_early and one.requested_batches is None:
            said.insert(1, "the data ended before the task had the requested amount")
        return said[0] if len(said) == 1 else f"{said[0]} ({', '.join(said[1:])})"

    def _amount(self) -> str:
        amount = _batches(self.num_batches) if self.num_samples is None else counted(self.num_samples, "sample")
        return f"{amount} on {self.processes} ranks" if self.processes > 1 else amount

    def _error(self) -> str:
        said_error = math.isfinite(self.standard_error) and not self.nonfinite
        return f", standard error {self.standard_error:.2g}" if said_error else ""

    def _remarks(self) -> list[str]:
        said = []
        if self.ended_early and self.requested_batches is not None:
            asked = self.requested_batches * self.processes
            said.append(f"the data ended after {self.num_batches + self.skipped_batches:,} of {_batches(asked)}")
        worst = summarize(reference=self.after, current=self.before) if self.layers else None
        if worst is not None and not math.isfinite(worst.max):
            bad = int((~(self.before.mean + self.before.var).isfinite()).sum())
            said.append(
                f"the statistics it replaced were not finite in {counted(bad, 'channel')}, first in "
                f"{worst.worst_layer or _ITSELF}"
            )
        elif worst is not None and worst.max > _WORTH_SAYING:
            how = compared_in_words("old", "new", worst.variance_ratio, worst.mean_shift)
            said.append(f"the statistics it replaced were off most at {worst.worst_layer or _ITSELF}: {how}")
        if self.skipped_batches:
            said.append(f"{_batches(self.skipped_batches)} skipped that had only one value per channel")
        if self.nonfinite:
            said.append(f"batches that were not finite left out at {quoted(list(self.nonfinite))}")
        if self.unreached:
            said.append(f"not reached by the forward and left unchanged: {quoted(self.unreached)}")
        if self.empty:
            said.append(f"given only empty batches and left unchanged: {quoted(self.empty)}")
        if self.unheld:
            said.append(unheld_in_words(self.unheld))
        if self.uses_apart:
            worst_use = max(self.uses_apart, key=self.uses_apart.__getitem__)
            said.append(
                "used several times in a forward, with inputs whose means differ by up to "
                f"{self.uses_apart[worst_use]:.1f} sigma, too much for one set of statistics: "
                f"{quoted(list(self.uses_apart))}"
            )
        return said


def error_in_words(done: Recalibration) -> str:
    """Say what the standard error means, and whether that is good; empty where nobody knows it."""
    error = done.standard_error
    if not math.isfinite(error) or done.nonfinite:
        return ""
    said = f"Standard error {error:.2g}: by chance, the worst channel may be off by {error:.2g} standard deviations."
    return f"{said} That is good." if error <= _GOOD else f"{said} {_GOOD} is good; with more data it is smaller."


def _batches(count: int) -> str:
    return counted(count, "batch", "batches")


def unheld_in_words(unheld: Mapping[str, str]) -> str:
    """Say which statistics could not be written, and what to do."""
    which = ", ".join(f"{name!r} ({words})" for name, words in list(unheld.items())[:_MOST_NAMED])
    more = f" and {len(unheld) - _MOST_NAMED} more" if len(unheld) > _MOST_NAMED else ""
    return f"left unchanged, since their dtype cannot hold the new statistics: {which}{more}; keep BatchNorm in float32"
