"""When a recalibration has enough: what was asked for, and what is known of the error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_bn.functional._checks import check_positive, check_whole

FEWEST_BATCHES = 8
"""Before an error estimated from how far batches lie apart is believed."""


@dataclass(frozen=True)
class StoppingRule:
    """What ends the data, whichever comes first; None does not limit.

    Attributes:
        num_batches: Batches in this process.
        num_samples: Samples over all processes.
        max_standard_error: Largest relative standard error of any channel's mean or variance.
        processes: How many share the samples and add to what is known.

    Raises:
        ValueError: If one of them is not positive.
    """

    num_batches: int | None = None
    num_samples: int | None = None
    max_standard_error: float | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        """Refuse what asks for nothing."""
        check_whole("num_batches", self.num_batches, 1, none="for all there are")
        check_whole("num_samples", self.num_samples, 1, none="for all there are")
        check_positive("max_standard_error", self.max_standard_error, none="for no limit")

    @property
    def limits_the_data(self) -> bool:
        """Whether data that end may have ended early."""
        return self.num_batches is not None or self.num_samples is not None

    def enough_batches(self, taken: int) -> bool:
        """Whether this process has taken as many batches as it may."""
        return self.num_batches is not None and taken >= self.num_batches

    def enough_samples(self, samples: int | None) -> bool:
        """Whether this process has used its share of the samples; no, if they cannot be counted."""
        if self.num_samples is None or samples is None:
            return False
        return samples >= math.ceil(self.num_samples / self.processes)

    def looks_after(self, batches: int) -> bool:
        """Whether it is time to look at the error: it falls slowly, and each look waits for the device.

        After every eighth of what was used so far.
        """
        enough = batches >= FEWEST_BATCHES and batches % max(1, batches // 8) == 0
        return self.max_standard_error is not None and enough

    def precise_enough(self, standard_error: float) -> bool:
        """Whether the error that this process estimates is small enough for all of them together.

        Each process sees its own sample; together they know more by the root of their number.
        """
        limit = self.max_standard_error
        return limit is not None and standard_error <= limit * math.sqrt(self.processes)
