"""A threshold that speaks once: not at every sample above it, and not for one noisy sample."""

from __future__ import annotations

_REARMED_BELOW = 0.5
"""Share of the threshold that a value has to fall below before it is spoken of again."""


class Alarm:
    """Whether a value that is sampled again and again has gone above a threshold, said once.

    Args:
        threshold: What is too much; None for never. NaN is above everything: it is the worst that can be measured.
        in_a_row: How many samples above it are believed.
    """

    def __init__(self, threshold: float | None, in_a_row: int = 1) -> None:
        self._threshold = threshold
        self._in_a_row = in_a_row
        self.reset()

    def reset(self) -> None:
        """Forgets what was sampled."""
        self._above, self._sounded = 0, False

    def sounds(self, value: float) -> bool:
        """Takes one sample; whether it is the one to speak at."""
        if self._threshold is None:
            return False
        self._above = self._above + 1 if self.is_above(value) else 0
        if value < self._threshold * _REARMED_BELOW:
            self._sounded = False
        if self._sounded or self._above < self._in_a_row:
            return False
        self._sounded = True
        return True

    def is_above(self, value: float) -> bool:
        """Whether a value is above the threshold."""
        return self._threshold is not None and not value <= self._threshold

    def state_dict(self) -> dict[str, int]:
        """Numbers only."""
        return {"above": self._above, "sounded": int(self._sounded)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from :meth:`state_dict`."""
        self._above, self._sounded = state["above"], bool(state["sounded"])
