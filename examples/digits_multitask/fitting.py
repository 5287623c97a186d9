"""Fits that remember what validation said, epoch by epoch, and keep quiet otherwise."""

import logging
import warnings
from collections import defaultdict
from collections.abc import Sequence

from pytorch_lightning import Callback, LightningModule, Trainer

from data import DigitsData
from model import DigitsModule


class Curve(Callback):
    """Every validation metric by epoch: ``curve["digit_accuracy"]`` is a list with one value per epoch."""

    def __init__(self) -> None:
        self.epochs: dict[str, list[float]] = defaultdict(list)

    def __getitem__(self, metric: str) -> list[float]:
        return self.epochs[metric]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            for metric, value in trainer.callback_metrics.items():
                self.epochs[metric].append(float(value))


def fit(module: DigitsModule, data: DigitsData, epochs: int, callbacks: Sequence[Callback] = ()) -> Curve:
    """Trains ``module`` with no more ceremony than ``callbacks`` bring."""
    curve = Curve()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, curve],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return curve


def be_quiet() -> None:
    """Keeps what Lightning says about every fit off the terminal; what goes wrong is still said."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What the monitor says of a backbone that is not frozen is what the first table shows.
    warnings.filterwarnings("ignore", "BatchNormMonitor")
    # In its second phase the first table trains on one of two tasks alone.
    warnings.filterwarnings("ignore", "TaskBatchNorm: tasks names 'digit'")
    # In-memory batches are faster without worker processes, and Lightning reads its own pytree through an old name.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    # run.py has arguments of its own beside those it gives to the LightningCLI, and keeps checkpoints where logs are.
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
