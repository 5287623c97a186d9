"""How the times of those that take turns are taken, and what is said of two. One thread of torch on the CPU."""

import argparse
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

# With one thread, processor time is the time on an idle machine: what others took of it does not count.
torch.set_num_threads(1)


def asked_device() -> torch.device:
    """The device that the command line asks for; the program ends if there is none."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    name = parser.parse_args().device
    if name == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "No CUDA device here: nothing was measured.\n")
    return torch.device(name)


class Clock:
    """Processor time of this thread on the CPU, time between events of the current stream on CUDA.

    Args:
        device: What does the work.

    Attributes:
        warm_up: Rounds on top of the CPU's that are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warm_up = 3 if device.type == "cuda" else 0

    def now(self) -> Any:
        """A mark; on CUDA it is enqueued, nothing waits for it."""
        if self.device.type == "cpu":
            return time.thread_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Iterable[tuple[Any, Any]]) -> list[float]:
        """How far the two marks of each pair are apart; on CUDA it waits, once, for all that was enqueued."""
        if self.device.type == "cpu":
            return [end - start for start, end in marks]
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1000 for start, end in marks]


@dataclass(frozen=True)
class Comparison:
    """One against another, turn by turn.

    Attributes:
        seconds: Its fastest turn.
        base: The other's fastest turn.
        ratio: Of the two.
        median: Of the ratios of neighboring turns.
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
        """How far the ratios of neighboring turns are apart."""
        return f"{self.low:.3f} to {self.high:.3f}"


def compare(times: list[float], base: list[float]) -> Comparison:
    """Compares turns, of which those with the same index were neighbors."""
    ratios = [mine / other for mine, other in zip(times, base, strict=True)]
    deciles = quantiles(ratios, n=10)
    return Comparison(min(times), min(base), min(times) / min(base), median(ratios), deciles[0], deciles[-1])


def step_rows(seconds: Mapping[str, list[float]], base: str, column: str) -> list[dict[str, object]]:
    """Rows of a table that compares the steps of fits with those of one of them.

    Args:
        seconds: Of steps, by the name of the fit, turn by turn.
        base: The fit to compare with.
        column: What the names are of.
    """
    compared = {name: compare(times, seconds[base]) for name, times in seconds.items()}
    return [
        {
            column: name,
            "ms per step": 1000 * found.seconds,
            "ratio": found.ratio,
            "median": found.median,
            "10 to 90 %": found.spread,
        }
        for name, found in compared.items()
    ]
