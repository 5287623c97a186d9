"""Drift and faults of running statistics, watched during a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_bn._drift_table import session_table
from lightning_bn._tables import LayerTable
from lightning_bn.callbacks._base import BatchNormCallback
from lightning_bn.callbacks._lightning.figures import log_figure, not_ending_the_fit, print_table
from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_bn.callbacks._lightning.state import in_training_fit
from lightning_bn.callbacks._ranks import agree_on_ranks, max_over_ranks, mean_over_ranks
from lightning_bn.functional._checks import check_choice, check_flag, check_text, check_whole
from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.layers.sets_per_task import statistics_by_task
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.monitor_state import MonitorState
from lightning_bn.functional.monitoring.saved_reference import read_reference
from lightning_bn.functional.monitoring.session import MonitorSession
from lightning_bn.functional.monitoring.settings import check_settings
from lightning_bn.functional.monitoring.threshold import BatchNormDriftError
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.drift_measures import Measure

__all__ = ["BatchNormDriftError", "BatchNormMonitor"]


class BatchNormMonitor(BatchNormCallback):
    """Measures how far BatchNorm's running statistics are from a reference while a fit runs, and names faults.

    Every few steps all layers are measured at once. ``<prefix>/<measure>_mean`` and ``<prefix>/<measure>_max``, over
    all channels of all layers, go to the loggers as curves, and at the end of every validation run and training epoch
    to ``trainer.callback_metrics``, where ModelCheckpoint and EarlyStopping find them. What is measured are training's
    statistics, before a recalibration replaces them. Training is not disturbed.
    Statistics per task are measured too, each task's from its own, as ``<prefix>/<task>/<measure>_mean`` and ``_max``.

    Beside drift it names, once for each layer: statistics that are not finite; a layer in train mode that is not
    updated, one that is updated twice per batch, a frozen one that moves; a moving average that lags behind its batches
    or is fed by sources that alternate; ranks that see different data while evaluation uses rank 0's statistics.

    Args:
        every_n_steps: Optimizer steps between two samples; validation is always preceded by one.
        measure: As for `lightning_bn.functional.drift`; of signed measures the absolute value counts.
        reference: What drift is measured from: the statistics at `"fit_start"`, those at the start of the epoch
            (`"previous_epoch"`), those of the last recalibration (`"recalibrated"`), or the path of a checkpoint,
            in which nothing is executed. Layers that start untrained warm up: they are measured from when 1 % of their
            initial values is left in the moving average; until then their drift is 0. Layers that another callback
            resets start anew. From a checkpoint all layers are measured from what is in it.
        warn_above: Warn once when the largest drift of a channel goes above this; again only after it has fallen below
            half of it.
        act_above: Take `action` when the largest drift of a channel goes above this in two samples in a row.
        action: `"warn"`; `"stop"` ends training after the step, on all ranks, as soon as `min_epochs` allows;
            `"raise"` raises `BatchNormDriftError`.
        modules: Which BatchNorm layers, as for `lightning_bn.functional.batch_norm_layers`; None for all.
        exclude: Which of them not.
        root: Put before every path, for instance `"model"` where the network is in `self.model`.
        name: Tells monitors of one Trainer apart, in checkpoints; give each a `prefix` of its own too.
        prefix: Of the logged keys.
        log_worst: How many of the worst layers get a curve of their own, `<prefix>/<measure>_worst_1` and so on: the
            largest drift of the layer that is worst at the moment, second worst, and so on.
        report: Whether to print a table at the end of the fit, and to draw a figure into the log directory and the
            loggers that take images, where matplotlib is installed.
        prog_bar: Whether the progress bar shows the largest drift, `<prefix>/<measure>_max`.

    Attributes:
        history: The samples so far, bounded in number and saved in checkpoints.

    Raises:
        MisconfigurationException: If an argument is not one of those above; when a fit is set up, if the strategy
            shards the model.
        SelectionError: When the fit starts, if the selection means no layer.
        ValueError: When the fit starts, if a checkpoint does not have the layers.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        measure: Measure = "jeffreys",
        reference: str = "fit_start",
        warn_above: float | None = None,
        act_above: float | None = None,
        action: Literal["warn", "stop", "raise"] = "warn",
        modules: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        root: str = "",
        name: str | None = None,
        prefix: str = "bn",
        log_worst: int = 0,
        report: bool = True,
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        with self._checked():
            self._select(modules, exclude, root, name)
            check_text("prefix", prefix)
            check_flag("report", report)
            check_flag("prog_bar", prog_bar)
            check_choice("action", action, ("warn", "stop", "raise"))
            check_whole("log_worst", log_worst, 0)
            check_settings(every_n_steps, measure, reference, warn_above, act_above)
            if action != "warn" and act_above is None:
                raise ValueError(f"action={action!r} needs act_above=, the drift above which it acts.")
        self.every_n_steps = every_n_steps
        self.measure: Measure = measure
        self.reference = reference
        self.warn_above = warn_above
        self.act_above = act_above
        self.action = action
        self.prefix = prefix
        self.log_worst = log_worst
        self.report = report
        self.prog_bar = prog_bar
        self.history = DriftHistory()
        self._session: MonitorSession | None = None
        self._running: MonitorSession | None = None
        self._restored: MonitorState | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Ranks that sample at other steps or other layers would wait for each other.
        names = ("every_n_steps", "measure", "reference", "act_above", "action")
        agree_on_ranks(
            trainer, "monitor", lambda: self._layout(pl_module), {name: getattr(self, name) for name in names}
        )

    def _layout(self, module: LightningModule) -> ChannelLayout:
        layers = self._selection.tracked_layers(module)
        read_reference(self.reference, layers)
        own, tasks = statistics_by_task(layers)
        of_tasks = {f"{name} of {task}": one for task, sets in tasks.items() for name, one in sets.items()}
        return ChannelLayout.of({**own, **of_tasks})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.barebones:
            return
        layers = self._selection.tracked_layers(pl_module)
        saved = read_reference(self.reference, layers)
        if saved is not None and str(saved.entry):
            rank_zero_info(f"BatchNormMonitor: reference {Path(self.reference).name}: {saved.entry}")
        session = MonitorSession(
            layers,
            self.every_n_steps,
            measure=self.measure,
            reference=str(self.reference),
            checkpoint=saved.own if saved else None,
            checkpoint_of_tasks=saved.tasks if saved else None,
            warn_above=self.warn_above,
            act_above=self.act_above,
            history=DriftHistory(self.history.most),
            step=trainer.global_step,
            mean_over_ranks=mean_over_ranks(trainer),
            max_over_ranks=max_over_ranks(trainer),
            processes=trainer.world_size,
            others=[name for name in batch_norm_layers(pl_module) if name not in layers],
        )
        warning = "" if self._restored is None else session.resume(self._restored)
        if warning:
            rank_zero_warn(f"BatchNormMonitor: {warning}")
        self._restored, self.history = None, session.history
        self._session = self._running = session

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._running is not None:
            self._running.start_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._running is not None:
            self._running.before_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._running is not None and self._running.after_batch(batch, trainer.global_step):
            self._sample(trainer, right_after=True)
            if self.prog_bar:
                self._log_monitorable(trainer, on_step=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before averaged weights and recalibrated statistics are put in.
        if in_training_fit(trainer):
            self._sample(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._running is not None:
            self._running.after_recalibration(trainer.global_step)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if in_training_fit(trainer):
            self._log_monitorable(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sample(trainer)
        self._log_monitorable(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = self._running
        if session is not None and session.last is not None and len(session.history):
            rank_zero_info(f"BatchNormMonitor: step {session.last.step:,}: {session.overall()}")
            self._show(trainer)
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None

    def state_dict(self) -> dict[str, Any]:
        state = self._restored if self._restored or self._session is None else self._session.state()
        return {"format": 1} if state is None else state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = MonitorState.from_state_dict(state_dict)
        if state is not None and self._running is not None:
            # In mid-fit, as tuners do that begin anew from where they were.
            self._running.resume(state)
        else:
            self._restored = state
        self.history = self.history if state is None else state.history

    def table(self, module: nn.Module, most: int = 10) -> LayerTable:
        """What to do by what the fit has shown, then each layer at the last sample, the worst first; also in mid-fit.

        Args:
            module: The LightningModule of the fit.
            most: How many layers to list.

        Raises:
            RuntimeError: If there is no sample yet.
        """
        session = self._session
        if session is None or session.last is None:
            raise RuntimeError("BatchNormMonitor has no sample yet: call table() after the first sample of a fit.")
        others = self._selection.lookalikes(module)
        return session_table(session, self._selection.layers(module), others, self.measure, most)

    def figure(self) -> Any:
        """The history as a ``matplotlib.figure.Figure``: layers by depth against steps, colored by drift.

        Raises:
            ValueError: If there is no sample yet.
            ImportError: If matplotlib is not installed.
        """
        from lightning_bn.plotting import drift_figure

        return drift_figure(self.history, self.measure, threshold=self.warn_above or self.act_above)

    def _sample(self, trainer: Trainer, right_after: bool = False) -> None:
        session = self._running
        sample = session.sample(trainer.global_step, trainer.current_epoch, right_after) if session else None
        if sample is None:
            return
        self._log_curves(trainer, sample.metrics(self.prefix, self.measure, self.log_worst))
        for message in sample.messages:
            rank_zero_warn(f"BatchNormMonitor: {message}")
        if not sample.exceeded:
            return
        if self.action == "raise":
            self._show(trainer)
            raise BatchNormDriftError(f"BatchNormMonitor: {sample.exceeded}")
        stops = self.action == "stop"
        trainer.should_stop |= stops
        rank_zero_warn(f"BatchNormMonitor: {sample.exceeded}{', so training stops' if stops else ''}")

    def _log_monitorable(self, trainer: Trainer, on_step: bool = False) -> None:
        if self._running is None or self._running.last is None:
            return
        values = self._running.last.monitorable(self.prefix, self.measure)
        log: Any = self.log  # type: ignore[attr-defined]
        for key, value in values.items():
            shown = self.prog_bar and key == f"{self.prefix}/{self.measure}_max"
            if shown or not on_step:
                # The loggers have their curve already. Between epochs the bar has what rank 0 has.
                how = {"on_step": on_step, "on_epoch": not on_step, "sync_dist": trainer.world_size > 1 and not on_step}
                log(key, value, prog_bar=shown, logger=False, batch_size=1, **how)

    def _show(self, trainer: Trainer) -> None:
        if not (self.report and trainer.is_global_zero):
            return
        with not_ending_the_fit(self, "the table"):
            print_table(self.table(trainer.lightning_module))
        with not_ending_the_fit(self, "the figure"):
            log_figure(trainer, self.figure, f"{self.prefix}_{self.measure}_drift")
