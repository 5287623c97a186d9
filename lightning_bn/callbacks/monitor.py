"""Drift of running statistics, watched during a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    in_training_fit,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_bn.functional.drift import MEASURES, DriftSummary, Measure, summarize
from lightning_bn.functional.history import DriftHistory
from lightning_bn.functional.layers import tracked_layers
from lightning_bn.functional.semantics import initial_share
from lightning_bn.functional.snapshots import Snapshot, snapshot_of
from lightning_bn.functional.wording import counted

_SETTLED = 0.01
_REARMED_BELOW = 0.5


class BatchNormDriftError(RuntimeError):
    """Drift of running statistics went above ``act_above`` under ``action="raise"``."""


class BatchNormMonitor(Callback):
    """Measures how far BatchNorm's running statistics are from a reference while a fit runs, and says so.

    Every few steps all layers are measured at once. ``<prefix>/<measure>_mean`` and ``<prefix>/<measure>_max``, over
    all channels of all layers, go to the loggers as curves, and at the end of every validation run and training epoch
    to ``trainer.callback_metrics``, where ModelCheckpoint and EarlyStopping find them. What is measured are training's
    statistics, before a recalibration replaces them. Training is not disturbed.

    Args:
        every_n_steps: Optimizer steps between two samples; validation is always preceded by one.
        measure: As for :func:`~lightning_bn.functional.drift`; of signed measures the absolute value counts.
        reference: What drift is measured from: the statistics at ``"fit_start"``, or those at the start of the epoch
            (``"previous_epoch"``). Layers that start untrained are measured from when 1 % of their initial values is
            left in the moving average; until then their drift is 0.
        warn_above: Warn once when the largest drift of a channel goes above this; again only after it has fallen below
            half of it.
        act_above: Take ``action`` when the largest drift of a channel goes above this.
        action: ``"warn"``; ``"stop"`` ends training after the step, on all ranks; ``"raise"`` raises
            :class:`BatchNormDriftError`.
        modules: Which BatchNorm layers, as for :func:`~lightning_bn.functional.batch_norm_layers`; None for all.
        exclude: Which of them not.
        root: Put before every path, for instance ``"model"`` where the network is in ``self.model``.
        prefix: Of the logged keys.

    Attributes:
        history: The samples so far, bounded in number and saved in checkpoints.

    Raises:
        MisconfigurationException: If an argument is not one of those above.
        SelectionError: When the fit starts, if the selection means no layer.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        measure: Measure = "jeffreys",
        reference: Literal["fit_start", "previous_epoch"] = "fit_start",
        warn_above: float | None = None,
        act_above: float | None = None,
        action: Literal["warn", "stop", "raise"] = "warn",
        modules: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        root: str = "",
        prefix: str = "bn",
    ) -> None:
        super().__init__()
        _check_choice("measure", measure, MEASURES)
        _check_choice("reference", reference, ("fit_start", "previous_epoch"))
        _check_choice("action", action, ("warn", "stop", "raise"))
        if every_n_steps < 1:
            raise MisconfigurationException(f"BatchNormMonitor(every_n_steps={every_n_steps}) must be at least 1.")
        for name, value in (("warn_above", warn_above), ("act_above", act_above)):
            if value is not None and not value > 0:
                raise MisconfigurationException(f"BatchNormMonitor({name}={value}) must be positive, or None.")
        self.every_n_steps = every_n_steps
        self.measure = measure
        self.reference = reference
        self.warn_above = warn_above
        self.act_above = act_above
        self.action = action
        self.modules = modules
        self.exclude = exclude
        self.root = root
        self.prefix = prefix
        self.history = DriftHistory()
        self._layers: dict[str, _BatchNorm] = {}
        self._reference: Snapshot | None = None
        self._unsettled: set[str] = set()
        self._last: tuple[int, DriftSummary] | None = None
        self._warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tracked_layers(pl_module, self.modules, self.exclude, self.root)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = tracked_layers(pl_module, self.modules, self.exclude, self.root)
        if self._reference is None or self._reference.names != tuple(self._layers):
            self._set_reference()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.reference == "previous_epoch":
            self._set_reference()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before averaged weights are swapped in and statistics are recalibrated.
        if in_training_fit(trainer):
            self._sample(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if in_training_fit(trainer):
            self._log_monitorable(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is None or self._last[0] != trainer.global_step:
            self._sample(trainer)
        self._log_monitorable(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last is not None:
            step, summary = self._last
            layers = counted(len(self._layers), "layer")
            moved = (
                f"running statistics of {layers} moved most at {summary.in_words()} since {self._since()}; "
                f"{self.measure} mean {summary.mean:.2g}, max {summary.max:.2g}"
            )
            still = f"running statistics of {layers} did not move since {self._since()}"
            rank_zero_info(f"BatchNormMonitor: step {step:,}: {moved if summary.max else still}")
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        return {
            "reference": None if self._reference is None else self._reference.state_dict(),
            "unsettled": sorted(self._unsettled),
            "warned": self._warned,
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        reference = state_dict["reference"]
        self._reference = None if reference is None else Snapshot.from_state_dict(reference)
        self._unsettled = set(state_dict["unsettled"])
        self._warned = state_dict["warned"]
        self.history = DriftHistory.from_state_dict(state_dict["history"])

    def _set_reference(self) -> None:
        self._reference = snapshot_of(self._layers)
        self._unsettled = {name for name, layer in self._layers.items() if initial_share(layer) >= _SETTLED}

    def _follow_unsettled(self, reference: Snapshot, current: Snapshot) -> None:
        """Layers that started untrained have no drift yet: their reference follows them until they are settled."""
        parts = reference.slices()
        for name in self._unsettled:
            for then, now in ((reference.mean, current.mean), (reference.var, current.var)):
                then[parts[name]] = now[parts[name]]
        self._unsettled = {name for name in self._unsettled if initial_share(self._layers[name]) >= _SETTLED}

    def _sample(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self._reference is None or not self._layers or (self._last is not None and self._last[0] == step):
            return
        current = snapshot_of(self._layers)
        reference = self._reference = self._reference.to(current.mean.device)
        self._follow_unsettled(reference, current)
        summary = summarize(reference, current, self.measure)
        self._last = (step, summary)
        self.history.append(step, trainer.current_epoch, reference, current, self.measure)
        for logger in trainer.loggers:
            logger.log_metrics(self._metrics(summary), step=step)
        self._judge(trainer, step, summary)

    def _judge(self, trainer: Trainer, step: int, summary: DriftSummary) -> None:
        said = f"step {step:,}: {summary.in_words()} since {self._since()}"
        if self.warn_above is not None:
            if _above(summary.max, self.warn_above) and not self._warned:
                self._warned = True
                rank_zero_warn(f"BatchNormMonitor: {said}. Freeze it or give it statistics of its own.")
            elif summary.max < self.warn_above * _REARMED_BELOW:
                self._warned = False
        if self.act_above is None:
            return
        # One rank's drift is every rank's: they have to stop together.
        largest = self._largest(trainer, summary.max)
        if not _above(largest, self.act_above):
            return
        said = f"{said}; {self.measure} {largest:.3g} is above act_above={self.act_above:g}"
        if self.action == "raise":
            raise BatchNormDriftError(f"BatchNormMonitor: {said}")
        if self.action == "stop" and not trainer.should_stop:
            trainer.should_stop = True
            rank_zero_warn(f"BatchNormMonitor: {said}: training stops")
        elif self.action == "warn" and not self._warned:
            self._warned = True
            rank_zero_warn(f"BatchNormMonitor: {said}")

    def _largest(self, trainer: Trainer, value: float) -> float:
        if trainer.world_size == 1:
            return value
        # NaN would lose against numbers in a maximum.
        tensor = torch.tensor(value, device=trainer.strategy.root_device).nan_to_num(nan=torch.inf)
        return float(trainer.strategy.reduce(tensor, reduce_op="max"))

    def _log_monitorable(self, trainer: Trainer) -> None:
        if self._last is None or trainer.barebones:
            return
        for key, value in self._metrics(self._last[1]).items():
            # The loggers have their curve already.
            self.log(  # type: ignore[attr-defined]
                key, value, on_step=False, on_epoch=True, logger=False, batch_size=1, sync_dist=trainer.world_size > 1
            )

    def _metrics(self, summary: DriftSummary) -> dict[str, float]:
        key = f"{self.prefix}/{self.measure}"
        return {f"{key}_mean": summary.mean, f"{key}_max": summary.max}

    def _since(self) -> str:
        return "fit start" if self.reference == "fit_start" else "the start of the epoch"

    def _forget(self) -> None:
        self._layers, self._last, self._reference = {}, None, None


def _above(value: float, threshold: float) -> bool:
    """NaN is above everything: it is the worst that can be measured."""
    return not value <= threshold


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise MisconfigurationException(f"BatchNormMonitor({name}={value!r}) must be one of {', '.join(choices)}.")
