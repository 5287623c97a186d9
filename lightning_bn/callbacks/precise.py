"""Recalibration of BatchNorm statistics right before validation sees them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any, get_args

from lightning_bn.callbacks._base import BatchNormCallback
from lightning_bn.callbacks._last_file import LastFile
from lightning_bn.callbacks._lightning.averages import averaged_copies
from lightning_bn.callbacks._lightning.callback_list import put_before_checkpoints
from lightning_bn.callbacks._lightning.namespaces import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
)
from lightning_bn.callbacks._lightning.state import in_training_fit
from lightning_bn.callbacks._ranks import agree_on_ranks, refuse_unequal_validation
from lightning_bn.callbacks._replaced import ReplacedAverage, rewritten
from lightning_bn.callbacks._second_run.drawn_once import refuse_drawn_once
from lightning_bn.callbacks._second_run.failures import failures_told
from lightning_bn.callbacks._second_run.modes import TrainingModes
from lightning_bn.callbacks._second_run.recent import RecentBatches
from lightning_bn.callbacks._second_run.sources import (
    NO_SOURCE,
    Source,
    batches_for,
    check_training_loaders,
    loader_method,
)
from lightning_bn.callbacks._second_run.step import check_step, isolated_step
from lightning_bn.functional._checks import check_choice, check_flag, check_text, check_whole
from lightning_bn.functional._tasks import nobody_listening
from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.sets_per_task import sets_for
from lightning_bn.functional.layers.status import update_status
from lightning_bn.functional.recalibration import result
from lightning_bn.functional.recalibration.population import Estimator
from lightning_bn.functional.recalibration.precise_bn import recalibrate
from lightning_bn.functional.recalibration.stopping import StoppingRule

_WAYS = ("source", "source_method", "step", "restore", "containers_in_eval", "estimator")
_PASSED_ON = ("modules", "exclude", "root", "num_batches", "num_samples", "max_standard_error", "estimator")
_TIMES = ("num_samples", "max_standard_error", "every_n_validations", "start_epoch")


class PreciseBatchNorm(BatchNormCallback):
    """Recompute BatchNorm's population statistics with the weights of the moment, right before each validation.

    The moving average that training keeps lags behind the weights, and describes weights that are not those evaluated
    where averages (EMA, SWA) are. This callback runs some training batches forward before the first validation batch
    and writes the pooled statistics into the layers, so that validation metrics and the checkpoints saved after it
    hold them. Frozen layers are left alone. Training is not disturbed: batch order, losses and weights are
    bit-identical to a run without it, because training in train mode does not read running statistics.

    Whatever ends the fit, it runs before the files that are saved then, and if none is, at the end of training. On
    several ranks each runs its own batches, and the statistics are merged. In ``trainer.validate`` and ``trainer.test``
    it runs only with a ``source_method``.

    Where layers have statistics per task, each task's come from its own batches, and the limits hold for each.

    What it logs under ``bn/precise_`` is what :meth:`Recalibration.metrics` says, and after validation ``share``, its
    share of that time.

    Args:
        num_batches: How many batches to use at most, on each rank; no more than an epoch has, None for an epoch.
        num_samples: How many samples to use at most, over all ranks.
        max_standard_error: Stop as soon as the standard error of every channel's mean (in standard deviations) and
            variance (relative) is below this; 0.05 is a good value.
        every_n_validations: Recalibrate before every n-th validation run.
        start_epoch: First epoch, from 0, in which to recalibrate.
        source: `"train"`: a second pass over the Trainer's own training loaders, which leaves the running epoch as
            it is. `"recent"`: the last `num_batches` batches that training used, which are kept on the device
            as they are (a step that changes its batch in place changes these).
        source_method: A method that returns another loader, for instance of the target domain:
            `"datamodule.target_dataloader"` or `"module.target_dataloader"`.
        step: The module's method that runs a batch: `training_step`, `predict_step`, `forward` or one of your
            own that takes a batch (and a batch index, if it has a second parameter). What it logs, counts or returns
            is dropped.
        estimator: As for `lightning_bn.functional.recalibrate`.
        restore: Whether to bring the moving average back at the next training batch, after the checkpoints that hold
            the precise statistics have been saved.
        containers_in_eval: As for `recalibrate`; with True a step that asks for `self.training` finds False.
        modules: Which BatchNorm layers, as for `lightning_bn.functional.batch_norm_layers`; None for all.
        exclude: Which of them not.
        root: Put before every path, for instance `"model"` where the network is in `self.model`.
        name: Tells this callback from another one in the same Trainer, which refuses two of one name.

    Attributes:
        last: What the last recalibration did, None before the first.

    Raises:
        MisconfigurationException: If an argument is out of range; when a run is set up, if the strategy shards the
            model; when a fit starts, if ``step`` cannot be run (no such method, or ``training_step`` under manual
            optimization), there is no ``source_method``, or only some of the ranks have validation batches; at a
            recalibration if the training loaders cannot be iterated a second time.
        SelectionError: When the fit starts, if the selection means no layer.

    Source: Wu & Johnson (2021), arXiv 2105.07576, section 3; AdaBN, Li et al. (2016), arXiv 1603.04779.
    """

    def __init__(
        self,
        num_batches: int | None = 200,
        *,
        num_samples: int | None = None,
        max_standard_error: float | None = None,
        every_n_validations: int = 1,
        start_epoch: int = 0,
        source: Source = "train",
        source_method: str | None = None,
        step: str = "training_step",
        estimator: Estimator = "pooled",
        restore: bool = False,
        containers_in_eval: bool | None = None,
        modules: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        root: str = "",
        name: str | None = None,
    ) -> None:
        super().__init__()
        with self._checked():
            self._rule = StoppingRule(num_batches, num_samples, max_standard_error)
            check_whole("every_n_validations", every_n_validations, 1)
            check_whole("start_epoch", start_epoch, 0)
            self._select(modules, exclude, root, name)
            check_text("step", step)
            check_text("source_method", source_method, none="to use the loaders of training")
            check_flag("restore", restore)
            check_flag("containers_in_eval", containers_in_eval, none="to be told where it matters")
            check_choice("source", source, get_args(Source))
            check_choice("estimator", estimator, get_args(Estimator))
        if source == "recent" and num_batches is None:
            raise MisconfigurationException(
                "PreciseBatchNorm(source='recent', num_batches=None) would keep every batch of training: set "
                "num_batches."
            )
        self.num_batches, self.num_samples, self.max_standard_error = num_batches, num_samples, max_standard_error
        self.every_n_validations, self.start_epoch = every_n_validations, start_epoch
        self.source, self.source_method, self.step, self.estimator = source, source_method, step, estimator
        self.restore, self.containers_in_eval = restore, containers_in_eval
        self.last: result.Recalibration | None = None
        self._validations, self._done_at_step, self._epoch = 0, -1, 0
        self._due = self._looked = self._precise = False
        self._recent, self._replaced = RecentBatches(num_batches or 0), ReplacedAverage()
        self._modes = TrainingModes()
        self._validation_began: float | None = None
        self._said: set[str] = set()
        self._last_file = LastFile(self._is_late, self._recalibrate)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        put_before_checkpoints(trainer, self)  # and so behind WeightAveraging, whose on_train_end swaps weights

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_step(pl_module, self.step)
        if self.source_method is not None:
            loader_method(trainer, pl_module, self.source_method)
        settings = {name: getattr(self, name) for name in (*_TIMES, *_WAYS)}
        agree_on_ranks(trainer, "recalibrate", lambda: self._layout(pl_module), settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_unequal_validation(trainer, self)
        self._modes.see(pl_module)
        self._last_file.begin(trainer)
        self._looked = False
        if in_training_fit(trainer) and self.source == "train" and self.source_method is None:
            check_training_loaders(trainer, self._rule)
        if not trainer.global_step:
            self._validations, self._done_at_step = 0, -1
            self._replaced.forget()
        self._precise, self._epoch = self._done_at_step == trainer.global_step, trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch = trainer.current_epoch
        self._modes.expect_changes()  # the module's own hook comes after this one and may replace layers

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if in_training_fit(trainer) and not self._looked:  # after the module's own hooks at the start
            refuse_drawn_once(pl_module, self.step)
            self._looked = True
        self._replaced.bring_back(pl_module)
        self._precise = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._modes.see(pl_module)
        if self.source == "recent" and self.source_method is None and batch is not None:
            self._recent.add(batch, batch_idx, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due, self._validation_began = False, time.monotonic()
        if not in_training_fit(trainer):
            self._due = self._on_demand(trainer, pl_module)
        elif trainer.current_epoch >= self.start_epoch:
            self._validations += 1
            self._due = self._validations % self.every_n_validations == 0 and self._is_late(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._due:  # only here are averaged weights swapped in, whatever the order of callbacks
            self._due = False
            self._recalibrate(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.last is not None and self._validation_began is not None and self._done_at_step == trainer.global_step:
            share = self.last.seconds / max(time.monotonic() - self._validation_began, self.last.seconds)
            self._log_curves(trainer, {"bn/precise_share": share})
        self._validation_began = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = self._on_demand(trainer, pl_module)

    on_test_batch_start = on_validation_batch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_late(trainer):
            self._recalibrate(trainer, pl_module)
        self._modes.forget()
        self._recent.clear()
        self._last_file.end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._modes.forget()
        self._recent.clear()

    def state_dict(self) -> dict[str, Any]:
        counts = {"format": 1, "validations": self._validations, "done_at_step": self._done_at_step}
        return {**counts, "replaced": self._replaced.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict.get("validations", 0)
        self._done_at_step = state_dict.get("done_at_step", -1)
        self._replaced.load_state_dict(state_dict.get("replaced"))

    def _is_late(self, trainer: Trainer) -> bool:
        """Whether the layers do not hold statistics of the weights of now, in an epoch in which they should."""
        precise = self._precise and self._done_at_step == trainer.global_step
        return in_training_fit(trainer) and self._epoch >= self.start_epoch and not precise

    def _on_demand(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether a run outside of training is to be preceded by a recalibration: only from a source of its own."""
        self._epoch = trainer.current_epoch
        if self.source_method is None and not trainer.sanity_checking:
            rank_zero_info(f"PreciseBatchNorm: {NO_SOURCE}")
        elif not trainer.sanity_checking:
            check_step(module, self.step)
        return self.source_method is not None and not trainer.sanity_checking

    def _recalibrate(self, trainer: Trainer, module: LightningModule) -> None:
        with failures_told(trainer, self.step, lambda: len(self._layout(module))):
            self._recalibrate_now(trainer, module)

    def _recalibrate_now(self, trainer: Trainer, module: LightningModule) -> None:
        with self._modes.in_place(module):
            layers = self._selection.tracked_layers(module)
            with ExitStack() as stack:
                stack.enter_context(nobody_listening())  # the pass is no part of the validation's batch
                sets, recent = sets_for(module, layers), self._recent.in_order()
                tells = None if sets is None else sets.task_of
                step = isolated_step(
                    trainer, module, self.step, self._said, task_of=tells, indices=[index for index, _ in recent]
                )
                forward, prepare, task_of = stack.enter_context(step)
                source = (self.source, self.source_method, self._rule, prepare, [batch for _, batch in recent])
                batches = batches_for(trainer, module, *source, per_task=sets is not None)
                self.last = recalibrate(
                    module,
                    stack.enter_context(closing(batches)),
                    forward=forward,
                    task_of=task_of,
                    distributed=trainer.world_size > 1,
                    containers_in_eval=False if "draws" in self._said else self.containers_in_eval,
                    **{name: getattr(self, name) for name in _PASSED_ON},
                )
        if again := rewritten(self.last, layers):
            raise RuntimeError(
                f"PreciseBatchNorm: the statistics of {quoted(again)} changed again after it wrote them."
            )
        self._done_at_step, self._precise = trainer.global_step, True
        for name in {name for part in (self.last, *self.last.tasks.values()) for name in part.layers}:
            update_status(layers[name], recalibrated_at=trainer.global_step)
        if self.restore:
            self._replaced.remember(self.last)
        self._report(trainer, self.last)

    def _report(self, trainer: Trainer, done: result.Recalibration) -> None:
        averaged = ", averaged weights" * any(updated for _, updated in averaged_copies(trainer))
        rank_zero_info(f"PreciseBatchNorm: epoch {self._epoch}{averaged}, {done}")
        self._said |= {"draws"} if done.drew_random_numbers else set()
        self._log_curves(trainer, {f"bn/precise_{name}": value for name, value in done.metrics().items()})
