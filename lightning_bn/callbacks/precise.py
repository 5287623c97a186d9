"""Recalibration of BatchNorm statistics right before validation sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_bn.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    in_training_fit,
    rank_zero_info,
)
from lightning_bn.callbacks._sandbox import check_step, sandbox
from lightning_bn.callbacks._second_pass import second_pass
from lightning_bn.functional.layers import tracked_layers
from lightning_bn.functional.recalibrated import Recalibration
from lightning_bn.functional.recalibration import recalibrate
from lightning_bn.functional.status import is_frozen, update_status
from lightning_bn.functional.undisturbed import preserved_modes


class PreciseBatchNorm(Callback):
    """Recomputes BatchNorm's population statistics with the weights of the moment, right before each validation.

    The moving average that training keeps lags behind the weights and describes weights that are not those evaluated
    where averages (EMA, SWA) are. This callback runs some training batches forward before the first validation batch
    and writes the pooled statistics into the layers, so that validation metrics and the checkpoints saved after it
    hold them. Frozen layers are left alone. Training is not disturbed: batch order, losses and weights are
    bit-identical to a run without it, because training in train mode does not read running statistics.

    Args:
        num_batches: How many training batches to use, on each rank; no more than an epoch has.
        every_n_validations: Recalibrate before every n-th validation run.
        step: The module's method that runs a batch: ``training_step``, ``predict_step``, ``forward`` or one of your
            own that takes a batch (and ``batch_idx``, if it has that parameter). What it logs, counts or returns is
            dropped.
        modules: Which BatchNorm layers, as for :func:`~lightning_bn.functional.batch_norm_layers`; None for all.
        exclude: Which of them not.
        root: Put before every path, for instance ``"model"`` where the network is in ``self.model``.

    Attributes:
        last: What the last recalibration did, None before the first.

    Raises:
        MisconfigurationException: If ``step`` cannot be run: no such method, or ``training_step`` under manual
            optimization; if ``num_batches`` or ``every_n_validations`` is below 1.
        SelectionError: When the fit starts, if the selection means no layer.

    Source: Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3.
    """

    def __init__(
        self,
        num_batches: int = 200,
        every_n_validations: int = 1,
        step: str = "training_step",
        modules: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        root: str = "",
    ) -> None:
        super().__init__()
        for name, value in (("num_batches", num_batches), ("every_n_validations", every_n_validations)):
            if value < 1:
                raise MisconfigurationException(f"PreciseBatchNorm({name}={value}) must be at least 1.")
        self.num_batches = num_batches
        self.every_n_validations = every_n_validations
        self.step = step
        self.modules = modules
        self.exclude = exclude
        self.root = root
        self.last: Recalibration | None = None
        self._validations = 0
        self._due = False
        self._tree: list[nn.Module] = []
        self._modes: list[bool] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_step(pl_module, self.step)
        tracked_layers(pl_module, self.modules, self.exclude, self.root)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tree = list(pl_module.modules())
        self._remember_modes()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tree = list(pl_module.modules())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # At validation everything is in eval: which layers train, and which containers branch on it, is known here.
        self._remember_modes()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = False
        if in_training_fit(trainer):
            self._validations += 1
            self._due = self._validations % self.every_n_validations == 0

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # Not on_validation_epoch_start: only here are averaged weights swapped in, whatever the order of callbacks.
        if self._due:
            self._due = False
            self._recalibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def _remember_modes(self) -> None:
        self._modes = [module.training for module in self._tree]

    def _forget(self) -> None:
        # Layers are named, never held: only for the duration of a fit.
        self._tree, self._modes = [], []

    @contextmanager
    def _modes_of_training(self, module: LightningModule) -> Iterator[None]:
        with preserved_modes(module):
            for submodule, training in zip(self._tree, self._modes, strict=True):
                submodule.training = training
            yield

    def _recalibrate(self, trainer: Trainer, module: LightningModule) -> None:
        with self._modes_of_training(module):
            layers = tracked_layers(module, self.modules, self.exclude, self.root)
            if all(is_frozen(layer) or not layer.training for layer in layers.values()):
                rank_zero_info(
                    f"PreciseBatchNorm: all {len(layers)} selected layers are frozen, nothing to recalibrate"
                )
                return
            with (
                second_pass(trainer, self.num_batches) as batches,
                sandbox(trainer, module, self.step) as (forward, prepare),
            ):
                self.last = recalibrate(
                    module,
                    (prepare(batch) for batch in batches),
                    modules=self.modules,
                    exclude=self.exclude,
                    root=self.root,
                    forward=forward,
                    num_batches=self.num_batches,
                )
        for name in self.last.layers:
            update_status(layers[name], recalibrated_at=trainer.global_step)
        rank_zero_info(f"PreciseBatchNorm: epoch {trainer.current_epoch}, {self.last}")
