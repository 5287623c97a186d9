"""Where a monitor is in the life of a Trainer."""

from __future__ import annotations

from enum import Enum


class MonitorPhase(Enum):
    """Where a monitor is."""

    IDLE = "before a fit"
    RUNNING = "in a fit"
    ENDED = "after a fit"
