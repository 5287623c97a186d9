"""Where a recalibration takes its batches from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from lightning_bn.callbacks._lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    combined,
    datamodule_of,
)
from lightning_bn.callbacks._second_pass import second_pass
from lightning_bn.functional.undisturbed import preserved_rng

Source: TypeAlias = Literal["train", "recent"]
Prepare: TypeAlias = Callable[[Any], Any]


class RecentBatches:
    """The last batches that training used, already on the device.

    Args:
        most: How many are kept; what they hold on the device is the price.
    """

    def __init__(self, most: int) -> None:
        self._batches: deque[Any] = deque(maxlen=most)

    def add(self, batch: Any) -> None:
        """Keeps one more and lets go of the oldest."""
        self._batches.append(batch)

    def clear(self) -> None:
        """Lets go of all of them."""
        self._batches.clear()

    def __iter__(self) -> Iterator[Any]:
        return iter(tuple(self._batches))

    def __len__(self) -> int:
        return len(self._batches)


@contextmanager
def batches_of_training(trainer: Trainer, most: int | None, prepare: Prepare) -> Iterator[Iterator[Any]]:
    """Batches of a second pass over the training loaders, prepared for the step.

    Raises:
        MisconfigurationException: If a loader cannot be iterated a second time.
    """
    with second_pass(trainer, most) as batches:
        yield (prepare(batch) for batch in batches)


@contextmanager
def batches_of_method(
    trainer: Trainer, module: LightningModule, method: str, prepare: Prepare
) -> Iterator[Iterator[Any]]:
    """Batches of the loader that a method of the datamodule or of the module returns, prepared for the step.

    Raises:
        MisconfigurationException: If there is no such method.
    """
    with preserved_rng(), combined(_method(trainer, module, method)(), "min_size") as batches:
        yield (prepare(batch) for batch in batches)


def check_method(trainer: Trainer, module: LightningModule, method: str) -> None:
    """Whether there is such a method.

    Raises:
        MisconfigurationException: If there is not.
    """
    _method(trainer, module, method)


def _method(trainer: Trainer, module: LightningModule, method: str) -> Callable[[], Any]:
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
