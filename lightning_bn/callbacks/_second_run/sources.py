"""Where a recalibration takes its batches from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Literal, TypeAlias

from torch.utils.data import DataLoader

from lightning_bn.callbacks._lightning.loaders import all_have_lengths, combined, train_loaders
from lightning_bn.callbacks._lightning.namespaces import (
    NOT_THE_DATASETS_OWN,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_warn,
)
from lightning_bn.callbacks._lightning.state import datamodule_of
from lightning_bn.callbacks._second_run.copies import copied
from lightning_bn.callbacks._second_run.drawn_once import CHOICES, below, refuse_shared
from lightning_bn.callbacks._second_run.loading import can_fork, loaded_apart
from lightning_bn.callbacks._second_run.long_pass import shown_when_long
from lightning_bn.functional._random import preserved_rng
from lightning_bn.functional.recalibration.stopping import StoppingRule

Source: TypeAlias = Literal["train", "recent"]
_ENDLESS = (
    "PreciseBatchNorm(num_batches=None): {} has no length, and over a loader without end the pass would not end. "
    "Set num_batches or num_samples."
)
NO_SOURCE = (
    "outside of a fit it has no batches to recalibrate from: the evaluation uses the statistics that the layers "
    "hold. To recalibrate here too, set source_method"
)
TRAINING = "train_dataloader"


def batches_for(
    trainer: Trainer,
    module: LightningModule,
    source: Source,
    source_method: str | None,
    rule: StoppingRule,
    prepare: Callable[[Any], Any],
    recent: Iterable[Any],
    *,
    per_task: bool = False,
) -> Generator[Any, None, None]:
    """Yield the batches to recalibrate from, ready for the step; nothing is loaded before the first is asked for.

    Loaders are iterated in a copy of this process, so that the running epoch goes on as if nothing had happened. Where
    it cannot be forked, copies of them are iterated here. A loader that fails does so where other ranks hear of it.

    Args:
        trainer: Of the run.
        module: Of the run.
        source: Where batches come from; not used with ``source_method``.
        source_method: The method that returns another loader; None for none.
        rule: What ends the pass.
        prepare: Makes a batch of a loader ready.
        recent: The last batches that training used.
        per_task: Whether the rule holds for each task, so that nobody knows before how many batches that takes.

    Raises:
        MisconfigurationException: If a loader cannot be iterated a second time, or there is no such method.
    """
    if source_method is None and source == "recent":
        # Prepared when training used them.
        kept = tuple(recent)
        yield from shown_when_long(trainer, kept, len(kept))
        return
    forked, path, epoch = can_fork(), source_method or TRAINING, float("inf")
    if source_method is not None:
        method, mode = loader_method(trainer, module, source_method), "min_size"
    else:
        loaders, mode = train_loaders(trainer)
        method, epoch = lambda: loaders, trainer.num_training_batches
    if not forked:
        rank_zero_warn(
            "PreciseBatchNorm: this process cannot be forked, so it iterates copies of the loaders and of their data "
            f"itself. This advances any random generator that was not copied with them. {CHOICES}"
        )

    def opened() -> AbstractContextManager[Iterator[Any]]:
        refuse_shared(found := method(), path)
        if source_method is not None and not rule.bounded and not all_have_lengths(found):
            raise MisconfigurationException(_ENDLESS.format(f"what {path} returns"))
        return combined(_begun_anew(found if forked else copied(found, NOT_THE_DATASETS_OWN)), mode)

    limit = min(float("inf") if rule.num_batches is None or per_task else rule.num_batches, epoch)
    with preserved_rng(), loaded_apart(opened) if forked else opened() as batches:
        wanted = islice(batches, None if limit == float("inf") else int(limit))
        # The Trainer skips batches that are None, and says so.
        yield from shown_when_long(trainer, (prepare(batch) for batch in wanted if batch is not None), limit)


def check_training_loaders(trainer: Trainer, rule: StoppingRule) -> None:
    """Raise where a second pass over the training loaders cannot be had.

    Raises:
        MisconfigurationException: If below a loader lies something that can be drawn from only once, or the pass would
            not end: it is not bounded, and nobody says how long an epoch is.
    """
    if trainer.num_training_batches == float("inf") and not rule.bounded:
        raise MisconfigurationException(_ENDLESS.format("the training loader"))
    refuse_shared(train_loaders(trainer)[0], TRAINING)


_others: list[Any] = []
"""Iterators of the process that this one is a copy of: never ended here, where they would end its workers."""


def _begun_anew(loaders: Any) -> Any:
    """Return loaders that start from the beginning; they are copies, or this process is."""
    for _, loader in below(loaders, TRAINING, NOT_THE_DATASETS_OWN):
        if isinstance(loader, DataLoader):
            _others.append(loader.__dict__.get("_iterator"))
            # Workers that live on and pinned memory are the other process's. A loader refuses such changes by name.
            loader.__dict__.update(_iterator=None, pin_memory=False)
    return loaders


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
            f"PreciseBatchNorm(source_method={method!r}): {why}. Give 'datamodule.' or 'module.' with the name of a "
            "method that returns a loader."
        )
    return found  # type: ignore[no-any-return]
