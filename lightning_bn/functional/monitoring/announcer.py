"""What is to be said of a sample now, and what was said before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightning_bn.functional.monitoring.drift_in_words import DriftSentences
from lightning_bn.functional.monitoring.sample import Sample
from lightning_bn.functional.monitoring.threshold import Threshold


class Announcer:
    """Says each finding once, and drift where it triggers a threshold.

    Args:
        warn_above: Drift that is warned of.
        act_above: Drift in two samples in a row that asks for an action.

    Attributes:
        told: Layers and kinds of findings that were said.
    """

    def __init__(self, warn_above: float | None, act_above: float | None) -> None:
        # One noisy sample does not stop a run.
        self.warning, self.action = Threshold(warn_above), Threshold(act_above, in_a_row=2)
        self.told: frozenset[tuple[str, str]] = frozenset()

    def announced(self, sample: Sample, largest: float, sentences: DriftSentences) -> Sample:
        """Return the sample with what is to be said of it.

        Args:
            sample: Of this process.
            largest: The largest drift of all processes.
            sentences: On drift.
        """
        messages = tuple(self._messages(sample, sentences))
        return replace(sample, messages=messages, exceeded=self._exceeded(sample, largest, sentences))

    def _messages(self, sample: Sample, sentences: DriftSentences) -> Iterator[str]:
        for one in sample.findings:
            if (one.layer, one.kind) not in self.told:
                self.told |= {(layer, one.kind) for layer in one.layers}
                yield f"step {sample.step:,}: {one.sentence}"
        if self.warning.triggers(sample.summary.max):
            moved = f"{sentences.moved(sample.summary)}; {sentences.measure} {sample.summary.max:.3g}"
            yield (
                f"step {sample.step:,}: {moved} is above warn_above={self.warning.limit:g}. If it should not move, "
                f"freeze it or give it statistics of its own; if it is meant to, leave it out with exclude."
            )

    def _exceeded(self, sample: Sample, largest: float, sentences: DriftSentences) -> str:
        # One rank's drift is every rank's: they have to stop together.
        if not self.action.triggers(largest):
            return ""
        here = self.action.is_above(sample.summary.max)
        moved = sentences.moved(sample.summary) if here else "statistics of another rank moved most"
        above = f"above act_above={self.action.limit:g} in two samples in a row"
        return f"step {sample.step:,}: {moved}; {sentences.measure} {largest:.3g} is {above}"
