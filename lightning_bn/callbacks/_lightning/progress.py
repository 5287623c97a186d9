"""A bar of one's own beside the Trainer's, TQDM's or rich's, for what happens inside a hook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from rich.progress import Progress, TaskID

from lightning_bn.callbacks._lightning.namespaces import Trainer
from lightning_bn.callbacks._lightning.state import fits

Update = Callable[[int], None]


@contextmanager
def bar_beside(trainer: Trainer, description: str, total: float, done: int) -> Iterator[Update | None]:
    """Yield what moves the bar to a number of batches; None where the Trainer shows no bar on a terminal.

    Afterwards the bar is gone from the screen.

    Args:
        trainer: Of the run.
        description: What stands before the bar.
        total: Batches there will be at most; infinite if nobody knows.
        done: Batches so far.
    """
    theirs: Any = trainer.progress_bar_callback
    # By name: each of the two namespaces has classes of its own.
    kinds = {kind.__name__ for kind in type(theirs).__mro__}
    if theirs is None or getattr(theirs, "is_disabled", True):
        yield None
    elif "RichProgressBar" in kinds and theirs.progress is not None and theirs.progress.console.is_terminal:
        task = _task(theirs.progress, description, total)

        def update(number: int) -> None:
            theirs.progress.update(task, completed=number)
            theirs.refresh()

        try:
            update(done)
            yield update
        finally:
            # Not removed: RichProgressBar finds its own tasks by their positions, and hides them too.
            theirs.progress.update(task, visible=False)
            theirs.progress.refresh()
    elif "TQDMProgressBar" in kinds and sys.stdout.isatty():
        bar = Tqdm(
            desc=description,
            total=None if total == float("inf") else int(total),
            initial=done,
            # Below the Trainer's, which has two lines in a fit.
            position=2 * theirs.process_position + 1 + fits(trainer),
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=theirs.BAR_FORMAT,
        )
        try:
            yield lambda number: _advance(bar, number)
        finally:
            bar.close()
    else:
        yield None


def _advance(bar: Any, number: int) -> None:
    bar.update(number - bar.n)


def _task(progress: Progress, description: str, total: float) -> TaskID:
    """The task of an earlier bar of this run, or a new one."""
    mark = f"{description}, {'endless' if total == float('inf') else 'finite'}"
    for task in progress.tasks:
        if task.fields.get("lightning_bn") == mark:
            progress.reset(task.id, total=total, visible=True, description=description)
            return task.id
    return progress.add_task(description, total=total, lightning_bn=mark)
