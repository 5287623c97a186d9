"""Drift and ailments of running statistics, watched during a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_bn.callbacks._lightning.figures import log_figure
from lightning_bn.callbacks._lightning.namespaces import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_bn.callbacks._lightning.state import in_training_fit, refuse_sharded
from lightning_bn.callbacks._ranks import (
    agree_on_ranks,
    largest_over_ranks,
    max_over_ranks,
    mean_over_ranks,
)
from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.layers.behavior import describe_layers
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.monitoring.cadence import Cadence
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.session import Sample, Watch, Watched
from lightning_bn.functional.monitoring.threshold import Alarm
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.drift_measures import MEASURES, Measure
from lightning_bn.functional.statistics.files import snapshot_of_checkpoint
from lightning_bn.functional.statistics.snapshots import Snapshot, snapshot_of
from lightning_bn.functional.statistics.summary import DriftSummary
from lightning_bn.report import drift_table

_REFERENCES = ("fit_start", "previous_epoch", "recalibrated")


class BatchNormDriftError(RuntimeError):
    """Drift of running statistics went above ``act_above`` under ``action="raise"``."""


class BatchNormMonitor(Callback):
    """Measures how far BatchNorm's running statistics are from a reference while a fit runs, and says what is wrong.

    Every few steps all layers are measured at once. ``<prefix>/<measure>_mean`` and ``<prefix>/<measure>_max``, over
    all channels of all layers, go to the loggers as curves, and at the end of every validation run and training epoch
    to ``trainer.callback_metrics``, where ModelCheckpoint and EarlyStopping find them. What is measured are training's
    statistics, before a recalibration replaces them. Training is not disturbed.

    Beside drift it names, once for each layer: statistics that are not finite; a layer in train mode that is not
    updated, one that is updated twice per batch, a frozen one that moves; a moving average that lags behind its batches
    or is fed by sources that alternate; ranks that see different data while evaluation uses rank 0's statistics.

    Args:
        every_n_steps: Optimizer steps between two samples; validation is always preceded by one.
        measure: As for :func:`~lightning_bn.functional.drift`; of signed measures the absolute value counts.
        reference: What drift is measured from: the statistics at ``"fit_start"``, those at the start of the epoch
            (``"previous_epoch"``), those of the last recalibration (``"recalibrated"``), or the path of a checkpoint,
            in which nothing is executed. Layers that start untrained are measured from when 1 % of their initial values
            is left in the moving average; until then their drift is 0. Layers that another callback resets start anew.
            From a checkpoint all layers are measured from what is in it.
        warn_above: Warn once when the largest drift of a channel goes above this; again only after it has fallen below
            half of it.
        act_above: Take ``action`` when the largest drift of a channel goes above this in two samples in a row.
        action: ``"warn"``; ``"stop"`` ends training after the step, on all ranks, as soon as ``min_epochs`` allows;
            ``"raise"`` raises :class:`BatchNormDriftError`.
        modules: Which BatchNorm layers, as for :func:`~lightning_bn.functional.batch_norm_layers`; None for all.
        exclude: Which of them not.
        root: Put before every path, for instance ``"model"`` where the network is in ``self.model``.
        prefix: Of the logged keys.
        log_worst: How many of the worst layers get a curve of their own, ``<prefix>/<measure>_worst_1`` and so on: the
            largest drift of the layer that is worst at the moment, second worst, and so on.
        report: Whether to print a table at the end of the fit, and to draw a figure into the log directory and the
            loggers that take images, where matplotlib is installed.

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
        measure: Measure = "jeffreys",
        reference: str = "fit_start",
        warn_above: float | None = None,
        act_above: float | None = None,
        action: Literal["warn", "stop", "raise"] = "warn",
        modules: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        root: str = "",
        prefix: str = "bn",
        log_worst: int = 0,
        report: bool = True,
    ) -> None:
        super().__init__()
        _check_choice("measure", measure, MEASURES)
        _check_choice("action", action, ("warn", "stop", "raise"))
        if reference not in _REFERENCES and not _is_file(reference):
            raise MisconfigurationException(
                f"BatchNormMonitor(reference={reference!r}) must be one of {', '.join(_REFERENCES)} or the path of a "
                f"checkpoint, and there is no such file."
            )
        if not _is_whole(every_n_steps) or every_n_steps < 1:
            raise MisconfigurationException(
                f"BatchNormMonitor(every_n_steps={every_n_steps!r}) must be a whole number from 1 on; layers are given "
                f"as modules=."
            )
        if action != "warn" and act_above is None:
            raise MisconfigurationException(f"BatchNormMonitor(action={action!r}) needs act_above: above what?")
        if not _is_whole(log_worst) or log_worst < 0:
            raise MisconfigurationException(
                f"BatchNormMonitor(log_worst={log_worst!r}) must be a whole number from 0 on."
            )
        for name, value in (("warn_above", warn_above), ("act_above", act_above)):
            if value is not None and (not _is_number(value) or not value > 0):
                raise MisconfigurationException(
                    f"BatchNormMonitor({name}={value!r}) must be a positive number, or None."
                )
        if warn_above is not None and act_above is not None and warn_above > act_above:
            raise MisconfigurationException(
                f"BatchNormMonitor(warn_above={warn_above:g}) is above act_above={act_above:g}: it would act before it "
                f"warns. Give a smaller warn_above, or none."
            )
        self.every_n_steps = every_n_steps
        self.measure = measure
        self.reference = reference
        self.warn_above = warn_above
        self.act_above = act_above
        self.action = action
        self.modules = modules
        self.exclude = exclude
        self.root = root
        self._selection = LayerSelection(modules, exclude, root)
        self.prefix = prefix
        self.log_worst = log_worst
        self.report = report
        self.history = DriftHistory()
        self._watch: Watch | None = None
        self._cadence: Cadence | None = None
        self._resumed: tuple[Snapshot, set[str], dict[str, int], str] | None = None
        self._warning = Alarm(warn_above)
        # One noisy sample does not stop a run.
        self._action = Alarm(act_above, in_a_row=2)
        self._ended: Watched | None = None
        self._told: set[tuple[str, str]] = set()

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.prefix}/{self.measure}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_sharded(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Ranks that sample at other steps or other layers would wait for each other.
        names = ("every_n_steps", "measure", "reference", "act_above", "action")
        settings = {name: getattr(self, name) for name in names}
        agree_on_ranks(trainer, "monitor", lambda: self._layout(pl_module), settings)

    def _layout(self, module: LightningModule) -> ChannelLayout:
        layers = self._selection.tracked_layers(module)
        if self.reference not in _REFERENCES:
            snapshot_of_checkpoint(self.reference, snapshot_of(layers))
        return ChannelLayout.of(layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = self._selection.tracked_layers(pl_module)
        if self._resumed is None:
            self.history, self._told = DriftHistory(self.history.most), set()
            self._warning.reset()
            self._action.reset()
        self._watch = Watch(
            layers,
            self.measure,
            self.history,
            self._threshold,
            mean_over_ranks(trainer),
            max_over_ranks(trainer),
            trainer.world_size,
        )
        self._cadence = Cadence(self.every_n_steps, trainer.global_step)
        self._refer(self._watch)
        self._resumed = None

    def _refer(self, watch: Watch) -> None:
        """Sets what is measured from when a fit starts or goes on."""
        if self.reference in _REFERENCES:
            watch.refer_to_now()
        else:
            watch.refer_to(snapshot_of_checkpoint(self.reference, watch.reference), fixed=True)
        if self._resumed is None:
            return
        reference, unsettled, since, measured_from = self._resumed
        now = watch.reference
        if (reference.layout, measured_from) == (now.layout, self.reference):
            watch.resume(reference, unsettled, since)
        else:
            rank_zero_warn(
                f"BatchNormMonitor: the checkpoint is of a monitor of other layers or of another reference "
                f"({quoted(reference.names)} since {measured_from}): drift is measured anew from here on."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.reference == "previous_epoch":
            self._watching.refer_to_now()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._cadence is not None and self._cadence.judges():
            self._watching.before_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watching.after_batch(batch)
        if self._cadence is not None and self._cadence.samples(trainer.global_step):
            self._sample(trainer, right_after=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before averaged weights are swapped in and statistics are recalibrated.
        if in_training_fit(trainer) and self._watch is not None:
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
        # Right after a recalibration, while what it wrote is still in place.
        if (
            self._watch is not None
            and self._watch.recalibrated(trainer.global_step)
            and self.reference == "recalibrated"
        ):
            self._watch.refer_to_now()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if in_training_fit(trainer):
            self._log_monitorable(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.barebones:
            self._sample(trainer)
            self._log_monitorable(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = self._watching.last
        if last is not None and not trainer.barebones:
            rank_zero_info(f"BatchNormMonitor: step {last.step:,}: {self._in_words(self._watching, last.summary)}")
            if self.report and trainer.is_global_zero:
                self._show(trainer, pl_module)
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._watch is not None:
            # For a checkpoint that is saved afterwards.
            self._ended = self._watch.watched()
        self._watch = None

    def state_dict(self) -> dict[str, Any]:
        now = self._watched
        return {
            "reference": None if now is None else now.reference.state_dict(),
            "unsettled": [] if now is None else sorted(now.unsettled),
            "measured_since": {} if now is None else now.measured_since,
            "measured_from": str(self.reference),
            "warning": self._warning.state_dict(),
            "action": self._action.state_dict(),
            "told": [list(pair) for pair in sorted(self._told)],
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["reference"] is not None:
            reference = Snapshot.from_state_dict(state_dict["reference"])
            since = dict(state_dict["measured_since"])
            self._resumed = (reference, set(state_dict["unsettled"]), since, state_dict["measured_from"])
        self._warning.load_state_dict(state_dict["warning"])
        self._action.load_state_dict(state_dict["action"])
        self._told = {(layer, disease) for layer, disease in state_dict["told"]}
        self.history = DriftHistory.from_state_dict(state_dict["history"])

    def table(self, module: nn.Module, most: int = 10) -> Table:
        """Layer by layer what the last sample found, the worst first, during a fit and after it.

        Args:
            module: The LightningModule of the fit.
            most: How many layers to list.

        Raises:
            RuntimeError: If there is no sample yet.
        """
        watched = self._watched
        if watched is None or watched.sample is None:
            raise RuntimeError("BatchNormMonitor has no sample yet: there is a table from the first one of a fit on.")
        return drift_table(
            describe_layers(self._selection.layers(module)),
            watched.reference,
            watched.sampled,
            self.history,
            watched.sample.updates,
            self.measure,
            watched.statuses,
            watched.training,
            watched.unsettled,
            most=most,
        )

    def figure(self) -> Any:
        """The history as a ``matplotlib.figure.Figure``: layers by depth against steps, colored by drift.

        Raises:
            ValueError: If there is no sample yet.
            ImportError: If matplotlib is not installed.
        """
        from lightning_bn.plotting import drift_figure

        return drift_figure(self.history, self.measure, threshold=self._threshold)

    @property
    def _threshold(self) -> float | None:
        return self.warn_above or self.act_above

    @property
    def _watched(self) -> Watched | None:
        return self._ended if self._watch is None else self._watch.watched()

    @property
    def _watching(self) -> Watch:
        if self._watch is None:
            raise RuntimeError("BatchNormMonitor has seen no on_train_start: it works inside Trainer.fit only.")
        return self._watch

    def _sample(self, trainer: Trainer, right_after: bool = False) -> None:
        watch, step = self._watching, trainer.global_step
        if trainer.barebones or not watch.is_new:
            return
        sample = watch.sample(step, trainer.current_epoch, self._told, right_after)
        metrics = self._metrics(sample)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        for diagnosis in sample.diagnoses:
            if (diagnosis.layer, diagnosis.disease) not in self._told:
                self._told |= {(layer, diagnosis.disease) for layer in diagnosis.layers or (diagnosis.layer,)}
                rank_zero_warn(f"BatchNormMonitor: step {step:,}: {diagnosis.sentence}")
        self._judge(trainer, sample)

    def _judge(self, trainer: Trainer, sample: Sample) -> None:
        summary = sample.summary
        if self._warning.sounds(summary.max):
            rank_zero_warn(
                f"BatchNormMonitor: {self._moved(sample)}; {self.measure} {summary.max:.3g} is above "
                f"warn_above={self.warn_above:g}. If it should not move, freeze it or give it statistics of its own; "
                f"if it is meant to, leave it out with exclude."
            )
        if self.act_above is None:
            return
        # One rank's drift is every rank's: they have to stop together.
        largest = largest_over_ranks(trainer, summary.max)
        if not self._action.sounds(largest):
            return
        said = self._moved(sample)
        if not self._action.is_above(summary.max):
            said = f"step {sample.step:,}: statistics of another rank moved most"
        said = f"{said}; {self.measure} {largest:.3g} is above act_above={self.act_above:g} in two samples in a row"
        if self.action == "raise":
            if self.report and trainer.is_global_zero:
                self._show(trainer, trainer.lightning_module)
            raise BatchNormDriftError(f"BatchNormMonitor: {said}")
        if self.action == "stop":
            trainer.should_stop = True
            said = f"{said}: training stops"
        rank_zero_warn(f"BatchNormMonitor: {said}")

    def _log_monitorable(self, trainer: Trainer) -> None:
        last = None if self._watch is None else self._watch.last
        if last is None or trainer.barebones:
            return
        key = f"{self.prefix}/{self.measure}"
        for name, value in ((f"{key}_mean", last.summary.mean), (f"{key}_max", last.summary.max)):
            # The loggers have their curve already.
            self.log(  # type: ignore[attr-defined]
                name, value, on_step=False, on_epoch=True, logger=False, batch_size=1, sync_dist=trainer.world_size > 1
            )

    def _metrics(self, sample: Sample) -> dict[str, float]:
        key = f"{self.prefix}/{self.measure}"
        worst = sorted(sample.largest, reverse=True)[: self.log_worst]
        worst += [0.0] * (self.log_worst - len(worst))
        share = sample.summary.share_above
        return {
            f"{self.prefix}/dead_channels": float(sample.dead),
            f"{key}_mean": sample.summary.mean,
            f"{key}_p95": sample.summary.p95,
            f"{key}_max": sample.summary.max,
            **({} if share is None else {f"{key}_share_above": share}),
            **{f"{key}_worst_{rank}": value for rank, value in enumerate(worst, 1)},
        }

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        Console().print(self.table(module))
        log_figure(trainer, self.figure, f"{self.prefix}_{self.measure}_drift")

    def _in_words(self, watch: Watch, summary: DriftSummary) -> str:
        young = len(watch.unsettled)
        late = f"{counted(young, 'layer')} started untrained and {'is' if young == 1 else 'are'} not measured yet"
        if young == len(self.history.names):
            return f"running statistics: {late}: their first values still count for more than 1 %"
        measured = counted(len(self.history.names) - young, "layer")
        rest = f"; {late}" if young else ""
        if not summary.max:
            return f"running statistics of {measured} did not move since {self._since(summary.worst_layer)}{rest}"
        return (
            f"running statistics of {measured} moved most at {summary.in_words()} since "
            f"{self._since(summary.worst_layer)}; {self.measure} mean {summary.mean:.2g}, max {summary.max:.2g}{rest}"
        )

    def _moved(self, sample: Sample) -> str:
        worst = sample.summary.worst_layer
        return f"step {sample.step:,}: {sample.summary.in_words()} since {self._since(worst)}{self._jump(worst)}"

    def _jump(self, layer: str) -> str:
        # Where the reference moves along, drift jumps by itself.
        moves = self.reference in ("previous_epoch", "recalibrated")
        step = None if moves else self.history.jumped_at(layer)
        return "" if step is None else f"; its inputs changed at about step {step:,}"

    def _since(self, layer: str) -> str:
        watched = self._watched
        step = None if watched is None else watched.measured_since.get(layer)
        if step is not None and self.reference == "fit_start":
            return f"step {step:,}, untrained before"
        recalibrated = any(event == "recalibrated" for _, _, event in self.history.marks)
        words = {
            "fit_start": "fit start",
            "previous_epoch": "the start of the epoch",
            "recalibrated": "the last recalibration" if recalibrated else "fit start, for want of a recalibration",
        }
        return words.get(self.reference, Path(self.reference).name)


def _is_file(value: Any) -> bool:
    return isinstance(value, str | Path) and Path(value).is_file()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise MisconfigurationException(f"BatchNormMonitor({name}={value!r}) must be one of {', '.join(choices)}.")
