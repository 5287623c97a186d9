"""Rivals that take turns in one process, and what is said of their times."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

# With one thread the processor time of a round is its time on an idle machine; it does not count what others took.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Comparison:
    """One rival against the one it is measured by, round by round.

    Attributes:
        seconds: Its fastest round.
        ratio: Of the two fastest rounds.
        low: 10th percentile of the ratios within a round.
        high: 90th percentile of them.
    """

    seconds: float
    ratio: float
    low: float
    high: float

    @property
    def spread(self) -> str:
        """How far the ratios within a round are apart."""
        return f"{self.low:.3f} to {self.high:.3f}"


def compare(times: list[float], base: list[float]) -> Comparison:
    """Compares rounds in which both took their turn."""
    deciles = quantiles([mine / other for mine, other in zip(times, base, strict=True)], n=10)
    return Comparison(min(times), min(times) / min(base), deciles[0], deciles[-1])


def take_turns(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each rival in each round, after one round that does not count.

    Each round begins with another rival, so that nobody always comes after the same one.
    """
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    try:
        for number in range(-1, rounds):
            gc.collect()
            for index in range(len(names)):
                name = names[(index + number) % len(names)]
                started = time.process_time()
                rivals[name]()
                taken = time.process_time() - started
                if number >= 0:
                    times[name].append(taken)
    finally:
        gc.enable()
    return times


def microseconds(call: Callable[[], object], calls: int = 300) -> float:
    """The median of many calls."""
    taken = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return 1e6 * median(taken)
