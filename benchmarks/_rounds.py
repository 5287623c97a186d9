"""What is said of the times of two that took turns. One thread, processor time."""

import time
from dataclasses import dataclass
from statistics import median, quantiles

import torch

# With one thread, processor time is the time on an idle machine: what others took of it does not count.
torch.set_num_threads(1)
now = time.thread_time


@dataclass(frozen=True)
class Comparison:
    """One against another, turn by turn.

    Attributes:
        seconds: Its fastest turn.
        base: The other's fastest turn.
        ratio: Of the two.
        median: Of the ratios of neighbouring turns.
        low: Their 10th percentile.
        high: Their 90th percentile.
    """

    seconds: float
    base: float
    ratio: float
    median: float
    low: float
    high: float

    @property
    def spread(self) -> str:
        """How far the ratios of neighbouring turns are apart."""
        return f"{self.low:.3f} to {self.high:.3f}"


def compare(times: list[float], base: list[float]) -> Comparison:
    """Compares turns, of which those with the same index were neighbours."""
    ratios = [mine / other for mine, other in zip(times, base, strict=True)]
    deciles = quantiles(ratios, n=10)
    return Comparison(min(times), min(base), min(times) / min(base), median(ratios), deciles[0], deciles[-1])
