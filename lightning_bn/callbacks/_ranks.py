"""What the ranks of a run tell each other, through the Trainer's strategy. Every rank has to ask the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_bn.callbacks._lightning.namespaces import Callback, MisconfigurationException, Trainer
from lightning_bn.callbacks._lightning.state import has_validation_batches
from lightning_bn.functional.distributed.agreement import Facts, agree, layer_facts, tell_failure
from lightning_bn.functional.statistics.channels import ChannelLayout

_Task = TypeVar("_Task", bound=str | list[str] | None)


def agree_on_ranks(trainer: Trainer, doing: str, layers: Callable[[], ChannelLayout], settings: Facts) -> None:
    """Return where all ranks mean the same layers and have the same settings, and raise on all of them otherwise.

    Args:
        trainer: Of the run; every rank has to call this.
        doing: What is to be done to the layers, for the error.
        layers: Finds them; its own errors are raised, and told to the other ranks.
        settings: What else has to be the same.

    Raises:
        DisagreementError: On every rank, with what differs.
    """
    if trainer.world_size == 1:
        layers()
        return
    device = trainer.strategy.root_device
    try:
        facts = {**layer_facts(layers()), **settings}
    except BaseException:
        tell_failure(device, doing)
        raise
    agree(facts, device, doing=doing)


def agree_on_task(trainer: Trainer, doing: str, task: Callable[[], _Task], needed: str) -> _Task:
    """Return the task of a batch, where it is the same on all ranks, and raise on all of them otherwise.

    Of rows that have a task each only that they do has to be the same.

    Args:
        trainer: Of the run; every rank has to call this.
        doing: What is to be done, for the error.
        task: Finds it; its own errors are raised, and told to the other ranks.
        needed: What the ranks need, for the error.

    Raises:
        DisagreementError: On every rank, with the task that each has.
    """
    device = trainer.strategy.root_device
    try:
        found = task()
    except BaseException:
        tell_failure(device, doing)
        raise
    agree({"task": "one for each row" if isinstance(found, list) else found}, device, doing=doing, needed=needed)
    return found


def refuse_unequal_validation(trainer: Trainer, callback: Callback) -> None:
    """Raise on all ranks if some of them have validation batches and some have none; every rank has to call this.

    Raises:
        MisconfigurationException: With what this rank has.
    """
    if trainer.world_size == 1:
        return
    has = has_validation_batches(trainer)
    told = torch.tensor(float(has), device=trainer.strategy.root_device)
    if float(trainer.strategy.reduce(told, reduce_op="mean")) not in (0.0, 1.0):
        raise MisconfigurationException(
            f"{type(callback).__name__}: rank {trainer.global_rank} {'has' if has else 'has no'} validation batches, "
            "unlike other ranks. Ranks that validate would wait for those that do not: give every rank a validation "
            "batch, or none."
        )


def mean_over_ranks(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """A function that gives the mean of a tensor over all ranks; None in one process."""
    return _over_ranks(trainer, "mean")


def max_over_ranks(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """A function that gives the largest of all ranks, element by element; None in one process."""
    return _over_ranks(trainer, "max")


def _over_ranks(trainer: Trainer, operation: str) -> Callable[[Tensor], Tensor] | None:
    if trainer.world_size == 1:
        return None

    def reduced(values: Tensor) -> Tensor:
        # A copy: some strategies reduce in place.
        there = values.to(trainer.strategy.root_device, copy=True)
        result: Any = trainer.strategy.reduce(there, reduce_op=operation)
        return result.to(values.device)  # type: ignore[no-any-return]

    return reduced
