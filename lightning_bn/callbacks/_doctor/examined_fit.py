"""A model with the Trainer that fits it: what rules about a fit look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from lightning_bn.callbacks._lightning.callback_list import callbacks_named
from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer
from lightning_bn.callbacks._lightning.optimizers import optimizers_of
from lightning_bn.callbacks._lightning.state import synchronizes_batch_norm
from lightning_bn.functional._random import preserved_rng
from lightning_bn.functional._text import raised
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.forwards import Forward, examine
from lightning_bn.functional.layers.object_state import attributes_on_copies
from lightning_bn.functional.layers.properties import affine_parameters
from lightning_bn.functional.layers.selection import batch_norm_layers

_T = TypeVar("_T")
_PLAN = "what BatchNormFreezer freezes"


@dataclass(frozen=True)
class ExaminedFit:
    """What rules about a fit look at.

    Attributes:
        examination: Of the module.
        trainer: Which.
        module: Which.
        optimizers: Of the fit; None where it is not known.
        batches: What was run forward.
        forward: By which function.
        missing: What could not be looked at, and why; rules add to it.
        freezings: Of each BaseFinetuning, by identity, the layers in which it switches tracking off, and those of which
            it freezes weight and bias; rules add to it.
    """

    examination: Examination
    trainer: Trainer
    module: LightningModule
    optimizers: Sequence[Optimizer] | None = None
    batches: Sequence[Any] = ()
    forward: Forward | None = field(default=None, repr=False)
    missing: dict[str, str] = field(default_factory=dict)
    freezings: dict[int, tuple[list[str], list[str]]] = field(default_factory=dict)

    def callbacks(self, *names: str) -> list[Any]:
        """Return the callbacks of these classes, and of classes derived from them."""
        return callbacks_named(self.trainer, *names)

    def tried(self, what: str, find: Callable[[], _T]) -> _T | None:
        """Return what the user's own code makes; None where it raises, which is then among what is missing."""
        return _or_missing(self.missing, what, find)

    def plan(self, freezer: Any) -> Any:
        """Return what a BatchNormFreezer is going to freeze; None where that cannot be had."""
        return self.tried(_PLAN, lambda: freezer.plan(self.module))

    def optimized(self) -> set[int]:
        """Return which parameters the optimizers have, by identity."""
        groups = [group for optimizer in self.optimizers or () for group in optimizer.param_groups]
        return {id(parameter) for group in groups for parameter in group["params"]}

    def unseen(self, names: Iterable[str]) -> list[str]:
        """Return those of the layers of whose weight and bias the optimizers have none."""
        optimized = self.optimized()
        layers = {name: affine_parameters(self.examination.layers[name]) for name in names}
        return [
            name
            for name, affine in layers.items()
            if affine and not any(id(parameter) in optimized for parameter in affine)
        ]


def examine_fit(
    trainer: Trainer,
    module: LightningModule,
    batches: Sequence[Any],
    forward: Forward | None,
    known: Mapping[str, Any] | None = None,
) -> ExaminedFit:
    """Return what rules look at."""
    missing: dict[str, str] = {}
    facts = {
        "frozen_later": _frozen_later(trainer, module, missing),
        "by_task": _by_task(trainer, module, missing),
        "processes": trainer.world_size,
        "synchronized": synchronizes_batch_norm(trainer),
        **(known or {}),
    }
    with preserved_rng(), attributes_on_copies(module):
        optimizers = _or_missing(missing, "the optimizers", lambda: optimizers_of(trainer, module))
    examination = examine(module, batches, forward, **facts)
    return ExaminedFit(examination, trainer, module, optimizers, batches, forward, missing)


def _or_missing(missing: dict[str, str], what: str, find: Callable[[], _T]) -> _T | None:
    try:
        return find()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's own code raises
        missing[what] = raised(error)
        return None


def _frozen_later(trainer: Trainer, module: LightningModule, missing: dict[str, str]) -> frozenset[str]:
    """Layers whose statistics a freezer keeps from the first batch on, whatever its task."""
    found: set[str] = set()
    for freezer in callbacks_named(trainer, "BatchNormFreezer"):
        plan = _or_missing(missing, _PLAN, partial(freezer.plan, module))
        if plan is not None and plan.schedule.is_on(0, 0, trainer.max_epochs):
            found |= {layer.name for layer in plan.frozen if layer.stats and not layer.tasks}
    return frozenset(found)


def _by_task(trainer: Trainer, module: nn.Module, missing: dict[str, str]) -> frozenset[str]:
    found: set[str] = set()
    for one in callbacks_named(trainer, "TaskBatchNorm"):
        select = partial(batch_norm_layers, module, one.modules, exclude=one.exclude, root=one.root)
        found |= {*(_or_missing(missing, "what TaskBatchNorm gives statistics per task", select) or ())}
    return frozenset(found)
