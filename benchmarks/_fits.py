"""Fits that take turns of a few steps: each in a thread of its own, of which one runs at a time."""

import contextlib
import io
import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from _launches import counting, profilers_own
from _rounds import Clock
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

Rival = Callable[[], tuple[nn.Module, Sequence[pl.Callback]]]


class Training(pl.LightningModule):
    """A network that learns to answer 0, with SGD."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)


@dataclass(frozen=True)
class Steps:
    """What the steps of fits took, by the fits' names.

    Attributes:
        seconds: Of each step.
        counts: Operators or launches of one more step.
    """

    seconds: dict[str, list[float]]
    counts: dict[str, dict[str, int]]


class TurnTaking:
    """Who runs next, and what each step took.

    Args:
        names: Of the fits.
        steps: How many a turn has. The first one is not counted: it finds the processor's caches full of the others'.
        clock: Of the device.
    """

    def __init__(self, names: Sequence[str], steps: int, clock: Clock) -> None:
        self._names = list(names)
        self._steps = steps
        self._clock = clock
        self._turn = 0
        self._finished: set[str] = set()
        self._changed = threading.Condition()
        self.timed, self.profiler_ready = threading.Event(), threading.Event()
        self.taken = Steps({name: [] for name in names}, {})

    def wait(self, name: str) -> None:
        """Returns when it is this fit's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._names[self._turn] == name)

    def pass_on(self, name: str, *, finished: bool = False) -> None:
        """Lets the next one run."""
        with self._changed:
            if finished:
                self._finished.add(name)
            for _ in self._names:
                self._turn = (self._turn + 1) % len(self._names)
                if self._names[self._turn] not in self._finished:
                    break
            self._changed.notify_all()

    def batches(self, name: str, batch: Tensor, turns: int) -> Iterator[Tensor]:
        """A loader that gives the turn away now and then: a step is what lies between two of its batches.

        The first turn is not counted, the Trainer warms up in it, nor are more of them that the device needs. Operators
        or launches are counted when all have had their turns, since the profiler may leave the process slower.
        """
        clock, marks = self._clock, []
        started = clock.now()
        for number in range((clock.warm_up + 1 + turns) * self._steps + 1):
            turn, step = divmod(number - 1, self._steps)
            if turn > clock.warm_up and step > 0:
                marks.append((started, clock.now()))
            if number % self._steps == 0:
                self.taken.seconds[name] += clock.seconds(marks)
                marks.clear()
                self.pass_on(name)
                self.wait(name)
            started = clock.now()
            yield batch
        self.timed.set()
        self.profiler_ready.wait()
        with counting(clock.device) as self.taken.counts[name]:
            yield batch


class _Loader(torch.utils.data.IterableDataset[Tensor]):
    def __init__(self, make: Callable[[], Iterator[Tensor]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Tensor]:
        return self._make()


def fit_in_turns(rivals: dict[str, Rival], batch: Tensor, turns: int, steps: int) -> Steps:
    """What each step of each fit takes, everything between two batches included.

    Args:
        rivals: What makes the network and the callbacks of each fit.
        batch: Given to all of them again and again, on its device.
        turns: How many each fit has.
        steps: How many a turn has, the first of which is not counted.
    """
    order = TurnTaking(list(rivals), steps, Clock(batch.device))
    failures: list[BaseException] = []

    def run(name: str, rival: Rival, folder: str) -> None:
        order.wait(name)
        try:
            torch.set_num_threads(1)
            network, callbacks = rival()
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator=batch.device.type,
                devices=1,
                callbacks=list(callbacks),
                logger=CSVLogger(folder),
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            trainer.fit(Training(network), _Loader(lambda: order.batches(name, batch, turns)))
        except BaseException as failure:
            failures.append(failure)
        finally:
            order.timed.set()
            order.pass_on(name, finished=True)

    with _quiet(), tempfile.TemporaryDirectory() as folder:
        threads = [
            threading.Thread(target=run, args=(name, rival, f"{folder}/{index}"), daemon=True)
            for index, (name, rival) in enumerate(rivals.items())
        ]
        for thread in threads:
            thread.start()
        order.timed.wait()
        profilers_own(batch.device)
        order.profiler_ready.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return order.taken


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What Lightning says, and what the callbacks print at the end of a fit, is not what is asked here."""
    names = [top + part for top in ("pytorch_lightning", "lightning.pytorch") for part in ("", ".utilities.rank_zero")]
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def timed(callback: pl.Callback, hooks: Sequence[str], clock: Clock) -> dict[str, list[tuple[Any, Any]]]:
    """Has a callback write down the clock's marks before and after each call of its hooks."""
    taken: dict[str, list[tuple[Any, Any]]] = {hook: [] for hook in hooks}

    def wrap(hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            started = clock.now()
            try:
                return call(*args, **kwargs)
            finally:
                taken[hook].append((started, clock.now()))

        return timing

    for hook in hooks:
        setattr(callback, hook, wrap(hook, getattr(callback, hook)))
    return taken


def typical(marks: list[tuple[Any, Any]], clock: Clock) -> float:
    """The median in microseconds, without the first calls."""
    return 1e6 * median(clock.seconds(marks[3:]))
