"""Averages of the weights that WeightAveraging keeps beside the module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_bn.callbacks._lightning.callback_list import callbacks_of
from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer


def averaged_copies(trainer: Trainer) -> list[tuple[nn.Module, bool]]:
    """Averages of the module that WeightAveraging callbacks keep beside it, and whether each has been updated yet."""
    copies = []
    for callback in callbacks_of(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            copies.append((average.module, bool(average.n_averaged)))
    return copies


@contextmanager
def averages_in_place(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside, the average that WeightAveraging keeps and the module have changed places, as they do in validation."""
    copies = [copy for copy, updated in averaged_copies(trainer) if updated]
    for copy in copies[:1]:
        _swap(module, copy)
    try:
        yield
    finally:
        for copy in copies[:1]:
            _swap(module, copy)


def _swap(module: nn.Module, copy: nn.Module) -> None:
    pairs = zip(chain(module.parameters(), module.buffers()), chain(copy.parameters(), copy.buffers()), strict=True)
    for mine, other in pairs:
        kept = mine.data.clone()
        mine.data.copy_(other.data)
        other.data.copy_(kept)
