"""What one sample of a monitored fit found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_bn.functional.monitoring.finding_in_words import MonitorFinding
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
        tasks: Of the drift of each task's statistics from its own reference; empty where no layer has statistics per
            task. ``summary``, ``largest``, ``updates`` and ``collapsed`` are of the layers' own.
    """

    step: int
    summary: DriftSummary
    largest: tuple[float, ...]
    updates: tuple[float, ...]
    collapsed: int
    findings: tuple[MonitorFinding, ...]
    messages: tuple[str, ...] = ()
    exceeded: str = ""
    tasks: Mapping[str, DriftSummary] = field(default_factory=dict)

    def monitorable(self, prefix: str, measure: str) -> dict[str, float]:
        """Return mean and largest drift by key, of the layers' own statistics and of each task's.

        Args:
            prefix: Of the keys.
            measure: Its name, for the keys.
        """
        of = {f"{prefix}/{measure}": self.summary}
        of |= {f"{prefix}/{task}/{measure}": summary for task, summary in self.tasks.items()}
        return {
            key: value
            for name, one in of.items()
            for key, value in ((f"{name}_mean", one.mean), (f"{name}_max", one.max))
        }

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
            **self.monitorable(prefix, measure),
        }
