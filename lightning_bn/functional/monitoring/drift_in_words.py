"""What is said of drift: how far the worst layer moved, since when, and which layers are not measured yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_bn.functional._text import counted
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.warm_up import WarmUp
from lightning_bn.functional.statistics.summary import DriftSummary


@dataclass(frozen=True)
class DriftSentences:
    """Sentences on the samples of one session.

    Attributes:
        measure: Of drift.
        reference: What it is measured from.
        history: The samples.
        warm_up: Of the layers.
    """

    measure: str
    reference: str
    history: DriftHistory
    warm_up: WarmUp

    def overall(self, summary: DriftSummary) -> str:
        """Return how far all layers moved, at the end of a fit."""
        cold = len(self.warm_up.layers)
        warming = f"{counted(cold, 'layer')} {'is' if cold == 1 else 'are'} still warming up and not measured yet"
        if cold == len(self.history.names):
            return f"running statistics: {warming}: their first values still count for more than 1 %"
        measured = f"running statistics of {counted(len(self.history.names) - cold, 'layer')}"
        since, rest = self._since(summary.worst_layer), f"; {warming}" if cold else ""
        if not summary.max:
            return f"{measured} did not move since {since}{rest}"
        return (
            f"{measured} moved most at {summary.in_words()} since {since}; {self.measure} mean {summary.mean:.2g}, "
            f"max {summary.max:.2g}{rest}"
        )

    def moved(self, summary: DriftSummary) -> str:
        """Return how far the worst channel moved, since when, and when it jumped."""
        worst = summary.worst_layer
        # Where the reference moves along, drift jumps by itself.
        moves = self.reference in ("previous_epoch", "recalibrated")
        step = None if moves else self.history.jumped_at(worst)
        jump = "" if step is None else f"; its inputs changed at about step {step:,}"
        return f"{summary.in_words()} since {self._since(worst)}{jump}"

    def _since(self, layer: str) -> str:
        step = self.warm_up.measured_since.get(layer)
        if step is not None and self.reference == "fit_start":
            return f"step {step:,}, warming up before"
        recalibrated = any(event == "recalibrated" for _, _, event in self.history.marks)
        words = {
            "fit_start": "fit start",
            "previous_epoch": "the start of the epoch",
            "recalibrated": "the last recalibration" if recalibrated else "fit start, with no recalibration yet",
        }
        return words.get(self.reference, Path(self.reference).name)
