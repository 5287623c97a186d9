"""Fits that take turns of a few steps: each in a thread of its own, of which one runs at a time."""

import contextlib
import io
import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from _rounds import now
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


class TurnTaking:
    """Who runs next, and how long each step took.

    Args:
        names: Of the fits.
        steps: How many a turn has. The first one is not counted: it finds the processor's caches full of the others'.
    """

    def __init__(self, names: Sequence[str], steps: int) -> None:
        self._names = list(names)
        self._steps = steps
        self._turn = 0
        self._finished: set[str] = set()
        self._changed = threading.Condition()
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

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

        The first turn is not counted, the Trainer warms up in it.
        """
        started = now()
        for number in range((turns + 1) * self._steps + 1):
            turn, step = divmod(number - 1, self._steps)
            if turn > 0 and step > 0:
                self.seconds[name].append(now() - started)
            if number % self._steps == 0:
                self.pass_on(name)
                self.wait(name)
            started = now()
            yield batch


class _Loader(torch.utils.data.IterableDataset[Tensor]):
    def __init__(self, make: Callable[[], Iterator[Tensor]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Tensor]:
        return self._make()


def fit_in_turns(rivals: dict[str, Rival], batch: Tensor, turns: int, steps: int) -> dict[str, list[float]]:
    """Processor seconds of each step of each fit, everything between two batches included.

    Args:
        rivals: What makes the network and the callbacks of each fit.
        batch: Given to all of them again and again.
        turns: How many each fit has.
        steps: How many a turn has, the first of which is not counted.
    """
    order = TurnTaking(list(rivals), steps)
    failures: list[BaseException] = []

    def run(name: str, rival: Rival, folder: str) -> None:
        order.wait(name)
        try:
            torch.set_num_threads(1)
            network, callbacks = rival()
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="cpu",
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
            order.pass_on(name, finished=True)

    for logger in ("pytorch_lightning", "lightning.pytorch"):
        for part in ("", ".utilities.rank_zero"):
            logging.getLogger(logger + part).setLevel(logging.WARNING)
    # What the callbacks print at the end of a fit is not what is asked here.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), quiet, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        threads = [
            threading.Thread(target=run, args=(name, rival, f"{folder}/{index}"), daemon=True)
            for index, (name, rival) in enumerate(rivals.items())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return order.seconds


def timed(callback: pl.Callback, hooks: Sequence[str]) -> dict[str, list[float]]:
    """Has a callback write down, in microseconds, how long each call of its hooks takes."""
    taken: dict[str, list[float]] = {hook: [] for hook in hooks}

    def wrap(hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return call(*args, **kwargs)
            finally:
                taken[hook].append(1e6 * (now() - started))

        return timing

    for hook in hooks:
        setattr(callback, hook, wrap(hook, getattr(callback, hook)))
    return taken


def typical(values: list[float]) -> float:
    """The median, without the first calls."""
    return median(values[3:])
