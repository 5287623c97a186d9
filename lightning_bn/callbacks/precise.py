"""Recalibration of BatchNorm statistics right before validation sees them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any, get_args

from torch import nn

from lightning_bn.callbacks._lightning.averages import averaged_copies, averages_in_place
from lightning_bn.callbacks._lightning.callback_list import put_before_checkpoints
from lightning_bn.callbacks._lightning.namespaces import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_bn.callbacks._lightning.state import (
    has_validation_batches,
    in_training_fit,
    is_barebones,
    is_last_epoch,
    refuse_sharded,
    several_loaders,
)
from lightning_bn.callbacks._ranks import agree_on_ranks, same_on_all_ranks
from lightning_bn.callbacks._second_run.loaders import second_pass
from lightning_bn.callbacks._second_run.sources import Source, batches_of_method, loader_method
from lightning_bn.callbacks._second_run.step import Weights, check_step, isolated_step
from lightning_bn.functional.layers.selection import LayerSelection, batch_norm_layers
from lightning_bn.functional.layers.status import is_frozen, update_status
from lightning_bn.functional.recalibration.isolation import preserved_modes
from lightning_bn.functional.recalibration.population import Estimator
from lightning_bn.functional.recalibration.precise_bn import recalibrate
from lightning_bn.functional.recalibration.result import AllFrozenError, NoUsableBatchError, Recalibration
from lightning_bn.functional.recalibration.stopping import StoppingRule
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.snapshots import Snapshot, restore_where_unchanged
from lightning_bn.functional.statistics.summary import summarize

_LONG = 3.0
"""Seconds after which a pass says that it is under way."""


class PreciseBatchNorm(Callback):
    """Recomputes BatchNorm's population statistics with the weights of the moment, right before each validation.

    The moving average that training keeps lags behind the weights, and describes weights that are not those evaluated
    where averages (EMA, SWA) are. This callback runs some training batches forward before the first validation batch
    and writes the pooled statistics into the layers, so that validation metrics and the checkpoints saved after it
    hold them. Frozen layers are left alone. Training is not disturbed: batch order, losses and weights are
    bit-identical to a run without it, because training in train mode does not read running statistics.

    Without validation it runs at the end of the last epoch, and at the end of training if weights have changed since.
    On several ranks each runs its own batches, and the statistics are merged. In ``trainer.validate`` and
    ``trainer.test`` it runs only with a ``source_method``.

    Logged after each recalibration, to the loggers: ``bn/precise_batches``, ``bn/precise_samples``,
    ``bn/precise_seconds``, ``bn/precise_standard_error``, ``bn/precise_skipped`` (batches),
    ``bn/precise_unreached`` (layers), ``bn/precise_drift_mean`` and ``bn/precise_drift_max`` (Jeffreys divergence of
    what was replaced from what is there now), and after validation ``bn/precise_share``, the share of its time.

    Args:
        num_batches: How many batches to use at most, on each rank; no more than an epoch has, None for an epoch.
        num_samples: How many samples to use at most, over all ranks.
        max_standard_error: Stop as soon as the standard error of every channel's mean (in standard deviations) and
            variance (relative) is below this; 0.05 is a good value.
        every_n_validations: Recalibrate before every n-th validation run.
        start_epoch: First epoch, from 0, in which to recalibrate.
        source: ``"train"``: a second pass over the Trainer's own training loaders, which leaves the running epoch as
            it is. ``"recent"``: the last ``num_batches`` batches that training used, which are kept on the device
            as they are (a step that changes its batch in place changes these).
        source_method: A method that returns another loader, for instance of the target domain:
            ``"datamodule.target_dataloader"`` or ``"module.target_dataloader"``.
        step: The module's method that runs a batch: ``training_step``, ``predict_step``, ``forward`` or one of your
            own that takes a batch (and a batch index, if it has a second parameter). What it logs, counts or returns
            is dropped.
        estimator: As for :func:`~lightning_bn.functional.recalibrate`.
        restore: Whether to bring the moving average back at the next training batch, after the checkpoints that hold
            the precise statistics have been saved.
        modules: Which BatchNorm layers, as for :func:`~lightning_bn.functional.batch_norm_layers`; None for all.
        exclude: Which of them not.
        root: Put before every path, for instance ``"model"`` where the network is in ``self.model``.
        name: Tells this callback from another one in the same Trainer, which refuses two of one name.

    Attributes:
        last: What the last recalibration did, None before the first.

    Raises:
        MisconfigurationException: If an argument is out of range; when a run is set up, if the strategy shards the
            model; when a fit starts, if ``step`` cannot be run (no such method, or ``training_step`` under manual
            optimization), there is no ``source_method``, or only some of the ranks have validation batches; at a
            recalibration if the training loaders cannot be iterated a second time.
        SelectionError: When the fit starts, if the selection means no layer.

    Source: Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3; AdaBN, Li et al.
    (2016), arXiv 1603.04779, for the target domain.
    """

    def __init__(
        self,
        num_batches: int | None = 200,
        num_samples: int | None = None,
        max_standard_error: float | None = None,
        every_n_validations: int = 1,
        start_epoch: int = 0,
        source: Source = "train",
        source_method: str | None = None,
        step: str = "training_step",
        estimator: Estimator = "pooled",
        restore: bool = False,
        modules: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        root: str = "",
        name: str | None = None,
    ) -> None:
        super().__init__()
        try:
            StoppingRule(num_batches, num_samples, max_standard_error)
        except ValueError as error:
            raise MisconfigurationException(f"PreciseBatchNorm: {error}") from error
        least: int
        value: Any  # whatever a user gives
        for key, value, least in (("every_n_validations", every_n_validations, 1), ("start_epoch", start_epoch, 0)):
            if not isinstance(value, int) or value < least:
                raise MisconfigurationException(
                    f"PreciseBatchNorm({key}={value!r}) must be a whole number from {least} on."
                )
        if source not in ("train", "recent"):
            raise MisconfigurationException(f"PreciseBatchNorm(source={source!r}) must be 'train' or 'recent'.")
        if estimator not in get_args(Estimator):
            raise MisconfigurationException(
                f"PreciseBatchNorm(estimator={estimator!r}) must be one of {', '.join(get_args(Estimator))}."
            )
        if source == "recent" and num_batches is None:
            raise MisconfigurationException(
                "PreciseBatchNorm(source='recent', num_batches=None) would keep every batch of training on the device: "
                "say how many."
            )
        self.num_batches = num_batches
        self.num_samples = num_samples
        self.max_standard_error = max_standard_error
        self.every_n_validations = every_n_validations
        self.start_epoch = start_epoch
        self.source = source
        self.source_method = source_method
        self.step = step
        self.estimator = estimator
        self.restore = restore
        self.modules = modules
        self.exclude = exclude
        self.root = root
        self._selection = LayerSelection(modules, exclude, root)
        self.name = name
        self.last: Recalibration | None = None
        self._validations = 0
        self._due = False
        self._done_at_step = -1
        self._recent: deque[Any] = deque(maxlen=num_batches or 0)
        self._replaced: tuple[Snapshot, Snapshot] | None = None
        self._tree: list[nn.Module] = []
        self._tree_is_old = True
        self._modes: list[bool] = []
        self._validation_began: float | None = None
        self._said_mixture = False
        self._weights = Weights()

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.name}]" if self.name else type(self).__name__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_sharded(trainer, self)
        # Behind WeightAveraging, whose on_train_end puts the average in the place of the weights.
        put_before_checkpoints(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_step(pl_module, self.step)
        if self.source_method is not None:
            loader_method(trainer, pl_module, self.source_method)
        limits = ("num_samples", "max_standard_error", "every_n_validations", "start_epoch")
        ways = ("source", "source_method", "step", "estimator", "restore")
        settings = {name: getattr(self, name) for name in (*limits, *ways)}
        agree_on_ranks(trainer, "recalibrate", lambda: self._layout(pl_module), settings)

    def _layout(self, module: LightningModule) -> ChannelLayout:
        layers = self._selection.tracked_layers(module)
        return ChannelLayout.of(layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not same_on_all_ranks(trainer, has_validation_batches(trainer)):
            have = "has" if has_validation_batches(trainer) else "has no"
            raise MisconfigurationException(
                f"PreciseBatchNorm: rank {trainer.global_rank} {have} validation batches, and not all ranks are alike: "
                f"those that validate would wait for those that do not. Give every rank a batch, or none."
            )
        self._look_at(pl_module)
        if not trainer.global_step:
            self._validations, self._done_at_step, self._replaced = 0, -1, None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The module's own hook comes after this one and may replace layers: looked at after the first batch.
        self._tree_is_old = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._replaced is not None:
            # Only where the precise statistics still are: averages may have taken them along. And not where they have
            # just been frozen, which is to start from the precise ones.
            before, after = self._replaced
            free = [name for name, layer in batch_norm_layers(pl_module).items() if not is_frozen(layer)]
            kept = [name for name in after.names if name in free]
            if kept:
                restore_where_unchanged(pl_module, before.only(kept), after.only(kept))
            self._replaced = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # At validation everything is in eval: which layers train, and which containers branch on it, is known here.
        if self._tree_is_old:
            self._look_at(pl_module)
            self._tree_is_old = False
        else:
            self._remember_modes()
        if self.source == "recent" and self.source_method is None:
            self._recent.append(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due, self._validation_began = False, time.monotonic()
        if not in_training_fit(trainer):
            self._due = self._on_demand(trainer, pl_module)
        elif trainer.current_epoch >= self.start_epoch:
            self._validations += 1
            self._due = self._validations % self.every_n_validations == 0

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # Not on_validation_epoch_start: only here are averaged weights swapped in, whatever the order of callbacks.
        if self._due:
            self._due = False
            self._recalibrate(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.last is not None and self._validation_began is not None and self._is_fresh(trainer):
            share = self.last.seconds / max(time.monotonic() - self._validation_began, self.last.seconds)
            self._log(trainer, {"bn/precise_share": share})
        self._validation_began = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = self._on_demand(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Checkpoints are saved behind this hook; without validation nothing else comes before them. The weights that
        # a checkpoint holds are the averaged ones, where there are any.
        if not trainer.enable_validation and is_last_epoch(trainer) and trainer.current_epoch >= self.start_epoch:
            with averages_in_place(trainer, pl_module):
                self._recalibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_fresh(trainer) and trainer.current_epoch >= self.start_epoch:
            self._recalibrate(trainer, pl_module)
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        replaced = None if self._replaced is None else [snapshot.state_dict() for snapshot in self._replaced]
        return {"validations": self._validations, "done_at_step": self._done_at_step, "replaced": replaced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]
        self._done_at_step = state_dict["done_at_step"]
        if state_dict["replaced"] is not None:
            before, after = (Snapshot.from_state_dict(state) for state in state_dict["replaced"])
            self._replaced = (before, after)

    def _look_at(self, module: LightningModule) -> None:
        self._tree = list(module.modules())
        self._remember_modes()

    def _remember_modes(self) -> None:
        self._modes = [module.training for module in self._tree]

    def _forget(self) -> None:
        # Layers are named, never held: only for the duration of a fit.
        self._tree, self._modes, self._tree_is_old = [], [], True
        self._recent.clear()

    def _is_fresh(self, trainer: Trainer) -> bool:
        return self._done_at_step == trainer.global_step

    def _on_demand(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether a run outside of training is to be preceded by a recalibration: only from a source of its own."""
        if self.source_method is None or trainer.sanity_checking:
            return False
        check_step(module, self.step)
        return True

    @contextmanager
    def _modes_of_training(self, module: LightningModule) -> Iterator[None]:
        with preserved_modes(module):
            for submodule, training in zip(self._tree, self._modes, strict=True):
                submodule.training = training
            yield

    def _recalibrate(self, trainer: Trainer, module: LightningModule) -> None:
        try:
            self._recalibrate_now(trainer, module)
        except AllFrozenError:
            rank_zero_info(
                f"PreciseBatchNorm: all {len(self._layout(module))} layers are frozen, nothing to recalibrate"
            )
        except NoUsableBatchError as error:
            # A run that diverged goes on as it would have without this callback.
            rank_zero_warn(f"PreciseBatchNorm: {error}")

    def _recalibrate_now(self, trainer: Trainer, module: LightningModule) -> None:
        with self._modes_of_training(module) if self._tree else nullcontext():
            layers = self._selection.tracked_layers(module)
            with ExitStack() as stack:
                forward, prepare = stack.enter_context(isolated_step(trainer, module, self.step, self._weights))
                self.last = recalibrate(
                    module,
                    _told_when_long(stack.enter_context(closing(self._batches(trainer, module, prepare)))),
                    modules=self.modules,
                    exclude=self.exclude,
                    root=self.root,
                    forward=forward,
                    num_batches=self.num_batches,
                    num_samples=self.num_samples,
                    max_standard_error=self.max_standard_error,
                    estimator=self.estimator,
                    distributed=trainer.world_size > 1,
                )
        self._done_at_step = trainer.global_step
        for name in self.last.layers:
            update_status(layers[name], recalibrated_at=trainer.global_step)
        if self.restore:
            self._replaced = (self.last.before, self.last.after)
        self._report(trainer, self.last)

    def _batches(self, trainer: Trainer, module: LightningModule, prepare: Any) -> Generator[Any, None, None]:
        """Begins with the first batch, so that a loader that fails does so where other ranks hear of it."""
        if self.source_method is not None:
            with batches_of_method(trainer, module, self.source_method, prepare) as batches:
                yield from batches
        elif self.source == "recent":
            # Prepared when training used them.
            yield from tuple(self._recent)
        else:
            with second_pass(trainer, self.num_batches) as batches:
                yield from map(prepare, batches)

    def _report(self, trainer: Trainer, done: Recalibration) -> None:
        rank_zero_info(f"PreciseBatchNorm: epoch {trainer.current_epoch}{self._averaged(trainer)}, {done}")
        if not self._said_mixture and self.source_method is None and several_loaders(trainer):
            self._said_mixture = True
            rank_zero_info(
                "PreciseBatchNorm: the training batches come from several loaders. Pooled statistics describe their "
                "mixture, which is not what each of them was normalized with: where they differ, recalibrate on each "
                "one's own data (source_method) before it is evaluated."
            )
        drift = summarize(reference=done.after, current=done.before)
        self._log(
            trainer,
            {
                "bn/precise_batches": done.num_batches,
                "bn/precise_samples": done.num_samples or 0,
                "bn/precise_seconds": done.seconds,
                "bn/precise_standard_error": done.standard_error,
                "bn/precise_skipped": done.skipped_batches,
                "bn/precise_unreached": len(done.unreached),
                "bn/precise_drift_mean": drift.mean,
                "bn/precise_drift_max": drift.max,
            },
        )

    def _averaged(self, trainer: Trainer) -> str:
        return ", averaged weights" if any(updated for _, updated in averaged_copies(trainer)) else ""

    def _log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if not is_barebones(trainer):
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)


def _told_when_long(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, with a line if they take longer than somebody who watches a progress bar stand still expects.

    The Trainer's progress bar has no public place for what happens inside a hook.
    """
    began, told = time.monotonic(), False
    for number, batch in enumerate(batches):
        if not told and time.monotonic() - began > _LONG:
            told = True
            rank_zero_info(f"PreciseBatchNorm: recalibrating, {number:,} batches in {_LONG:.0f} s so far")
        yield batch
