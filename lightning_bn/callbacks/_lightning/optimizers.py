"""The optimizers of a fit, before it begins too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer


def optimizers_of(trainer: Trainer, module: LightningModule) -> list[Optimizer]:
    """The Trainer's optimizers; before a fit those that the module configures, which are made for this."""
    if trainer.optimizers:
        return list(trainer.optimizers)
    with attached(trainer, module):
        return [*_optimizers_in(module.configure_optimizers())]


@contextmanager
def attached(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside, the module knows its Trainer, as in a fit."""
    before = module._trainer
    module.trainer = trainer
    try:
        yield
    finally:
        module.trainer = before


def _optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """Those in what ``configure_optimizers`` may return: one, several, with schedulers or in dicts."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from _optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for one in configured:
            yield from _optimizers_in(one)
