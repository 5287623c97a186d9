"""Where a recalibration takes its batches from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from lightning_bn.callbacks._lightning.loaders import combined
from lightning_bn.callbacks._lightning.namespaces import LightningModule, MisconfigurationException, Trainer
from lightning_bn.callbacks._lightning.state import datamodule_of
from lightning_bn.functional.recalibration.isolation import preserved_rng

Source: TypeAlias = Literal["train", "recent"]
Prepare: TypeAlias = Callable[[Any], Any]


@contextmanager
def batches_of_method(
    trainer: Trainer, module: LightningModule, method: str, prepare: Prepare
) -> Iterator[Iterator[Any]]:
    """Yield batches of the loader that a method of the datamodule or of the module returns, prepared for the step.

    Raises:
        MisconfigurationException: If there is no such method.
    """
    with preserved_rng(), combined(loader_method(trainer, module, method)(), "min_size") as batches:
        yield (prepare(batch) for batch in batches)


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
