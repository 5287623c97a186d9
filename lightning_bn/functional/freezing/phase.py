"""Where a freeze stands."""

from __future__ import annotations

from enum import Enum


class FreezePhase(Enum):
    """Where a freeze stands.

    Attributes:
        OFF: Nothing is frozen.
        PINNED: The layers are frozen; what their values must be is taken at the next batch.
        VERIFIED: The layers are frozen and their values are compared with the baseline.
        SUSPENDED: Averages stand in the place of the weights: nothing is compared.
    """

    OFF = "off"
    PINNED = "pinned"
    VERIFIED = "verified"
    SUSPENDED = "suspended"
