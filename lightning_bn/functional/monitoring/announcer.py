"""What is said of a sample: how far layers moved and since when, which have a fault; nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_bn.functional._text import counted
from lightning_bn.functional.monitoring.finding_in_words import told_of
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.sample import Sample
from lightning_bn.functional.monitoring.threshold import Threshold
from lightning_bn.functional.monitoring.warm_up import WarmUp
from lightning_bn.functional.statistics.summary import DriftSummary, compared_in_words


@dataclass(frozen=True)
class DriftSentences:
    """Sentences on the samples of one session.

    Attributes:
        measure: Of drift.
        reference: What it is measured from.
        history: The samples.
        warm_up: Of the layers.
        task: Whose statistics they are of; None for the layers' own.
    """

    measure: str
    reference: str
    history: DriftHistory
    warm_up: WarmUp
    task: str | None = None

    def overall(self, summary: DriftSummary) -> str:
        """Return how far all layers moved, at the end of a fit."""
        cold = len(self.warm_up.layers)
        warming = f"{counted(cold, 'layer')} {'is' if cold == 1 else 'are'} still warming up and not measured yet"
        if cold == len(self.history.names):
            return f"running statistics: {warming}: more than 1 % of their initial values is left"
        measured = f"running statistics of {counted(len(self.history.names) - cold, 'layer')}"
        since, rest = self._since(summary.worst_layer), f"; {warming}" if cold else ""
        if not summary.max:
            return f"{measured} did not move {since}{rest}"
        return (
            f"{measured} moved most at {_worst(summary)} {since}: {_how(summary)}; {self.measure} "
            f"mean {summary.mean:.2g}, max {summary.max:.2g}{rest}"
        )

    def moved(self, summary: DriftSummary) -> str:
        """Return how far the worst channel moved, since when, and when it jumped."""
        worst = summary.worst_layer
        # Where the reference moves along, drift jumps by itself.
        moves = self.reference in ("previous_epoch", "recalibrated")
        step = None if moves else self.history.jumped_at(worst)
        jump = "" if step is None else f"; its inputs changed at about step {step:,}"
        whose = "" if self.task is None else f"task {self.task!r}: "
        return f"{whose}{_worst(summary)} moved {self._since(worst)}: {_how(summary)}{jump}"

    def _since(self, layer: str) -> str:
        step = self.warm_up.measured_since.get(layer)
        if step is not None and self.reference == "fit_start":
            return f"since step {step:,}, warming up before"
        recalibrated = any(event == "recalibrated" for _, _, event in self.history.marks)
        words = {
            "fit_start": "since the start of the fit",
            "previous_epoch": "since the start of the epoch",
            "recalibrated": "since the last recalibration"
            if recalibrated
            else "since the start of the fit, without a recalibration so far",
        }
        return words.get(self.reference, f"from {Path(self.reference).name}")


def _worst(summary: DriftSummary) -> str:
    return summary.worst_layer or "(the model itself)"


def _how(summary: DriftSummary) -> str:
    return compared_in_words("new", "old", summary.variance_ratio, summary.mean_shift)


class Announcer:
    """Says each finding once, and drift where it triggers a threshold.

    Args:
        warn_above: Drift that is warned of.
        act_above: Drift in two samples in a row that asks for an action.

    Attributes:
        told: Layers and kinds of findings that were said, with the task where it was one's.
        said: What was said since the start, each sentence once; of drift the last one.
    """

    def __init__(self, warn_above: float | None, act_above: float | None) -> None:
        # One noisy sample does not stop a run.
        self.warning, self.action = Threshold(warn_above), Threshold(act_above, in_a_row=2)
        self.told: frozenset[tuple[str, ...]] = frozenset()
        self.said: dict[tuple[str, ...], str] = {}

    def announced(self, sample: Sample, worst: DriftSummary, largest: float, sentences: DriftSentences) -> Sample:
        """Return the sample with what is to be said of it.

        Args:
            sample: Of this process.
            worst: The drift of the statistics that moved most, of all tasks.
            largest: The largest drift of all processes.
            sentences: On these statistics.
        """
        messages = tuple(self._messages(sample, worst, sentences))
        return replace(sample, messages=messages, exceeded=self._exceeded(sample.step, worst, largest, sentences))

    def _messages(self, sample: Sample, worst: DriftSummary, sentences: DriftSentences) -> Iterator[str]:
        for one in sample.findings:
            if told_of(one.layer, one.kind, one.task) not in self.told:
                self.told |= one.told
                yield self._noted(told_of(one.layer, one.kind, one.task), f"step {sample.step:,}: {one.sentence}")
        if self.warning.triggers(worst.max):
            moved = f"{sentences.moved(worst)}; {sentences.measure} {worst.max:.3g}"
            yield self._noted(
                ("drift",),
                f"step {sample.step:,}: {moved} is above warn_above={self.warning.limit:g}. If the layer should not "
                "move, freeze it or give each task its own statistics; if it should, leave it out with exclude.",
            )

    def _noted(self, key: tuple[str, ...], sentence: str) -> str:
        self.said.pop(key, None)
        self.said[key] = sentence
        return sentence

    def _exceeded(self, step: int, worst: DriftSummary, largest: float, sentences: DriftSentences) -> str:
        # One rank's drift is every rank's: they have to stop together.
        if not self.action.triggers(largest):
            return ""
        moved = sentences.moved(worst) if self.action.is_above(worst.max) else "statistics of another rank moved most"
        above = f"above act_above={self.action.limit:g} in two samples in a row"
        return self._noted(("action",), f"step {step:,}: {moved}; {sentences.measure} {largest:.3g} is {above}")
