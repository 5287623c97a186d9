"""What one sample of a monitored fit found."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_bn.functional.monitoring.finding_in_words import Finding
from lightning_bn.functional.statistics.summary import DriftSummary


@dataclass(frozen=True)
class Sample:
    """What one sample found.

    Attributes:
        step: Optimizer steps taken.
        summary: Of the drift from the reference.
        largest: The largest drift of each layer.
        updates: Updates of each layer per training batch; NaN where it is not known.
        collapsed: Channels whose variance is below ``eps``, of all layers.
        findings: Every fault, also those that were said before.
        messages: What is to be said now.
        exceeded: Said when drift triggers ``act_above``; empty if it does not.
    """

    step: int
    summary: DriftSummary
    largest: tuple[float, ...]
    updates: tuple[float, ...]
    collapsed: int
    findings: tuple[Finding, ...]
    messages: tuple[str, ...] = ()
    exceeded: str = ""

    def metrics(self, prefix: str, measure: str, log_worst: int = 0) -> dict[str, float]:
        """Return curves by key, the same keys at every sample.

        Args:
            prefix: Of the keys.
            measure: Its name, for the keys.
            log_worst: How many of the worst layers get a curve.
        """
        key = f"{prefix}/{measure}"
        worst = sorted(self.largest, reverse=True)[:log_worst]
        worst += [0.0] * (log_worst - len(worst))
        share = self.summary.share_above
        return {
            f"{prefix}/collapsed_channels": float(self.collapsed),
            f"{key}_mean": self.summary.mean,
            f"{key}_p95": self.summary.p95,
            f"{key}_max": self.summary.max,
            **({} if share is None else {f"{key}_share_above": share}),
            **{f"{key}_worst_{rank}": value for rank, value in enumerate(worst, 1)},
        }
