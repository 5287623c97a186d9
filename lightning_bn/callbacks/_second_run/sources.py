"""Where a recalibration takes its batches from."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Literal, TypeAlias

from lightning_bn.callbacks._lightning.loaders import combined
from lightning_bn.callbacks._lightning.namespaces import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
)
from lightning_bn.callbacks._lightning.state import datamodule_of
from lightning_bn.callbacks._second_run.loaders import second_pass
from lightning_bn.functional.recalibration.isolation import preserved_rng

Source: TypeAlias = Literal["train", "recent"]
LONG = 3.0
"""Seconds after which a pass says that it is under way."""
MIXTURE = (
    "the training batches come from several loaders. Pooled statistics describe their mixture, which is not what each "
    "of them was normalized with: where they differ, recalibrate on each one's own data (source_method) before it is "
    "evaluated."
)


def batches_for(
    trainer: Trainer,
    module: LightningModule,
    source: Source,
    source_method: str | None,
    most: int | None,
    prepare: Callable[[Any], Any],
    recent: Iterable[Any],
) -> Generator[Any, None, None]:
    """Yield the batches to recalibrate from, ready for the step; nothing is loaded before the first is asked for.

    A loader that fails does so where other ranks hear of it.

    Args:
        trainer: Of the run.
        module: Of the run.
        source: Where batches come from; not used with ``source_method``.
        source_method: The method that returns another loader; None for none.
        most: How many batches of the training loaders are wanted at most.
        prepare: Makes a batch of a loader ready.
        recent: The last batches that training used.

    Raises:
        MisconfigurationException: If a loader cannot be iterated a second time, or there is no such method.
    """
    if source_method is not None:
        with preserved_rng(), combined(loader_method(trainer, module, source_method)(), "min_size") as batches:
            yield from map(prepare, batches)
    elif source == "recent":
        # Prepared when training used them.
        yield from tuple(recent)
    else:
        with second_pass(trainer, most) as batches:
            yield from map(prepare, batches)


def told_when_long(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches; say so if they take longer than somebody who watches a progress bar stand still expects.

    The Trainer's progress bar has no public place for what happens inside a hook.
    """
    began, told = time.monotonic(), False
    for number, batch in enumerate(batches):
        if not told and time.monotonic() - began > LONG:
            told = True
            rank_zero_info(f"PreciseBatchNorm: recalibrating, {number:,} batches in {LONG:.0f} s so far")
        yield batch


def loader_method(trainer: Trainer, module: LightningModule, method: str) -> Callable[[], Any]:
    """Return the method of the datamodule or of the module that returns a loader.

    Raises:
        MisconfigurationException: If there is no such method.
    """
    owner, _, name = method.partition(".")
    owners = {"datamodule": datamodule_of(trainer), "module": module}
    found = getattr(owners.get(owner), name, None) if name else None
    if not callable(found):
        if owner not in owners:
            why = "it begins with neither 'datamodule.' nor 'module.'"
        elif owners[owner] is None:
            why = "the Trainer has no datamodule"
        else:
            why = f"the {owner}, {type(owners[owner]).__name__}, has no method {name!r}"
        raise MisconfigurationException(
            f"PreciseBatchNorm(source_method={method!r}): {why}. Name 'datamodule.' or 'module.' and a method that "
            f"returns a loader."
        )
    return found  # type: ignore[no-any-return]
