"""What is known of Lightning: both its namespaces, and its private or version-bound parts. Nothing else imports it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch import nn
from torch.optim.swa_utils import AveragedModel

Trainer: TypeAlias = pl.Trainer
LightningModule: TypeAlias = pl.LightningModule

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:

    def _callback_bases() -> tuple[type, ...]:
        # pytorch_lightning and lightning.pytorch are two copies of one code with unrelated classes; a callback of both
        # is accepted by either Trainer and either LightningCLI. `lightning` always brings `pytorch-lightning`.
        if find_spec("lightning") is None or find_spec("lightning.pytorch") is None:
            return (pl.Callback,)
        from lightning.pytorch import Callback as LightningCallback

        return (pl.Callback, LightningCallback)

    Callback = type(
        "Callback", _callback_bases(), {"__module__": __name__, "__doc__": "A callback of both namespaces."}
    )


def in_training_fit(trainer: Trainer) -> bool:
    """Whether this is a fit that counts: past the sanity check, and with hooks that may log (not barebones)."""
    return str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "fit" and not trainer.sanity_checking


def same_kind_before(trainer: Trainer, callback: Callback) -> list[Any]:
    """Other callbacks of the same class in the Trainer."""
    others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [other for other in others if type(other) is type(callback) and other is not callback]


def averaged_copies(trainer: Trainer) -> list[tuple[nn.Module, bool]]:
    """Averages of the module that WeightAveraging callbacks keep beside it, and whether each has been updated yet."""
    copies = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            copies.append((average.module, bool(average.n_averaged)))
    return copies


def train_loaders(trainer: Trainer) -> tuple[Any, str]:
    """The Trainer's own processed training loaders (with its distributed samplers) and how they are combined.

    Raises:
        MisconfigurationException: If there is no training loader.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        raise MisconfigurationException("the Trainer has no training loader: there is nothing to recalibrate from.")
    return combined.iterables, combined._mode


@contextmanager
def combined(loaders: Any, mode: str) -> Iterator[Iterator[Any]]:
    """Batches of loaders combined as the Trainer combines them; their workers end with the context."""
    loader = CombinedLoader(loaders, mode)  # type: ignore[arg-type]
    try:
        yield (batch for batch, _, _ in iter(loader))
    finally:
        loader.reset()


@contextmanager
def training_stage(trainer: Trainer) -> Iterator[None]:
    """The Trainer says that it is training, and what is logged goes nowhere."""
    stage, loggers = trainer.state.stage, trainer.loggers
    trainer.training = True
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.state.stage, trainer.loggers = stage, loggers


def prepare_batch(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """The batch as the training loop would hand it to the step: converted, transferred, with the transfer hooks run."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def in_step_context(trainer: Trainer, step: Callable[[Any], Any], batch: Any) -> Any:
    """Runs a step in the Trainer's precision."""
    with trainer.precision_plugin.train_step_context():
        return step(batch)


__all__ = [
    "Callback",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "averaged_copies",
    "combined",
    "in_step_context",
    "in_training_fit",
    "prepare_batch",
    "rank_zero_info",
    "rank_zero_warn",
    "same_kind_before",
    "train_loaders",
    "training_stage",
]
