"""What one sample of a monitored fit found."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_bn.functional.monitoring.finding import Finding
from lightning_bn.functional.statistics.drift_measures import DriftSummary


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
