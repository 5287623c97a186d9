"""When a recalibration has enough: what was asked for, and what is known of the error."""

from __future__ import annotations

import math
from collections.abc import Callable
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
        check_whole("num_batches", self.num_batches, 1, none="to use all batches")
        check_whole("num_samples", self.num_samples, 1, none="to use all batches")
        check_positive("max_standard_error", self.max_standard_error, none="for no limit")

    @property
    def bounded(self) -> bool:
        """Whether it ends data that never end."""
        return any(limit is not None for limit in (self.num_batches, self.num_samples, self.max_standard_error))

    def enough(self, batches: int, samples: int) -> bool:
        """Whether this process has taken as many batches as it may, or used its share of the samples."""
        taken = samples * self.processes
        return batches >= (self.num_batches or math.inf) or taken >= (self.num_samples or math.inf)

    def precise_enough(self, batches: int, standard_error: Callable[[], float]) -> bool:
        """Whether the error that this process estimates is small enough for all of them together.

        Each process sees its own sample; together they know more by the root of their number. The error falls slowly,
        and each look at it waits for the device: it is looked at after every eighth of what was used so far.
        """
        if self.max_standard_error is None or batches < FEWEST_BATCHES or batches % max(1, batches // 8):
            return False
        return standard_error() <= self.max_standard_error * math.sqrt(self.processes)
