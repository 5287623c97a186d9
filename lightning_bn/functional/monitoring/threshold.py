"""A threshold with hysteresis: it triggers once, not at every sample above it, and not for one noisy sample."""

from __future__ import annotations

from collections.abc import Mapping

_REARMED_BELOW = 0.5
"""Share of the threshold that a value has to fall below before it can trigger again."""


class BatchNormDriftError(RuntimeError):
    """Drift of running statistics went above a threshold at which a run is to end."""


class Threshold:
    """Whether a value that is sampled again and again has gone above a limit, said once.

    Args:
        limit: What is too much; None for never. NaN is above everything: it is the worst that can be measured.
        in_a_row: How many samples above it are believed.

    Attributes:
        limit: As above.
    """

    def __init__(self, limit: float | None, in_a_row: int = 1) -> None:
        self.limit = limit
        self._in_a_row = in_a_row
        self._above, self._triggered = 0, False

    def triggers(self, value: float) -> bool:
        """Take one sample; return whether it is the one to act on."""
        if self.limit is None:
            return False
        self._above = self._above + 1 if self.is_above(value) else 0
        if value < self.limit * _REARMED_BELOW:
            self._triggered = False
        if self._triggered or self._above < self._in_a_row:
            return False
        self._triggered = True
        return True

    def is_above(self, value: float) -> bool:
        """Return whether a value is above the limit."""
        return self.limit is not None and not value <= self.limit

    def state_dict(self) -> dict[str, int]:
        """Return numbers only."""
        return {"format": 1, "above": self._above, "triggered": int(self._triggered)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from :meth:`state_dict`; what is missing is as at the start."""
        self._above, self._triggered = state.get("above", 0), bool(state.get("triggered", 0))
