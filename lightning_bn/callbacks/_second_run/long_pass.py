"""A pass that takes long says so: with a bar beside the Trainer's, or in a line where there is none."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from typing import Any

from lightning_bn.callbacks._lightning.namespaces import Trainer, rank_zero_info
from lightning_bn.callbacks._lightning.progress import Update, bar_beside
from lightning_bn.functional._text import counted

LONG = 3.0
"""Seconds after which a pass says that it is under way."""


def shown_when_long(trainer: Trainer, batches: Iterable[Any], total: float) -> Generator[Any, None, None]:
    """Yield the batches; show how many there were once they take longer than somebody who watches expects.

    Args:
        trainer: Of the run.
        batches: Of the pass.
        total: How many there are at most; infinite if nobody knows.
    """
    began, told = time.monotonic(), False
    update: Update | None = None
    with ExitStack() as stack:
        for number, batch in enumerate(batches):
            if not told and time.monotonic() - began > LONG:
                told = True
                update = stack.enter_context(bar_beside(trainer, "Recalibration", total, number))
                if update is None:
                    rank_zero_info(
                        f"PreciseBatchNorm: recalibrating, {counted(number, 'batch', 'batches')} in {LONG:.0f} s so far"
                    )
            if update is not None:
                update(number)
            yield batch
