"""One monitored fit, without Lightning: what to call around each batch, and what a sample finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._batches import num_samples
from lightning_bn.functional._checks import check_choice, check_whole
from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.layers.status import LayerStatus, layer_status
from lightning_bn.functional.monitoring.announcer import Announcer, DriftSentences
from lightning_bn.functional.monitoring.batch_deviation import BatchWindow, momenta
from lightning_bn.functional.monitoring.cadence import Cadence
from lightning_bn.functional.monitoring.diagnosis import (
    FEWEST_BATCHES,
    JUDGED_BY_BATCHES,
    TWICE,
    diagnose,
    most_of_one_batch,
)
from lightning_bn.functional.monitoring.finding_in_words import Finding
from lightning_bn.functional.monitoring.health import health
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.measure import Evidence, LayerTable, measure
from lightning_bn.functional.monitoring.monitor_state import MonitorState
from lightning_bn.functional.monitoring.sample import Sample
from lightning_bn.functional.monitoring.settings import REFERENCES, check_settings
from lightning_bn.functional.monitoring.uses import Uses
from lightning_bn.functional.monitoring.warm_up import WarmUp, following
from lightning_bn.functional.statistics.drift_measures import Measure
from lightning_bn.functional.statistics.snapshots import Snapshot, snapshot_of
from lightning_bn.functional.statistics.summary import read_summary

OverRanks = Callable[[Tensor], Tensor]


class MonitorSession:
    """The layers of one fit, measured again and again.

    Call :meth:`before_batch` and :meth:`after_batch` around every training batch, and :meth:`sample` where
    ``after_batch`` says that one is due.

    Args:
        layers: By name; each with running statistics.
        every_n_steps: Optimizer steps between two samples.
        measure: Of drift.
        reference: What is measured from: ``"fit_start"``, ``"previous_epoch"``, ``"recalibrated"``, or the path that
            ``checkpoint`` is of.
        checkpoint: The statistics at that path.
        warn_above: Drift that is warned of.
        act_above: Drift in two samples in a row that ``Sample.exceeded`` tells of.
        history: Gets samples and marks; None for a new one.
        step: Optimizer steps taken so far.
        mean_over_ranks: Gives the mean of a tensor over all processes; None in one process.
        max_over_ranks: Gives the largest over all processes; None in one process.
        processes: That train together.

    Raises:
        ValueError: If ``reference`` is unknown and there is no ``checkpoint``.
    """

    def __init__(
        self,
        layers: Mapping[str, _BatchNorm],
        every_n_steps: int = 50,
        *,
        measure: Measure = "jeffreys",
        reference: str = "fit_start",
        checkpoint: Snapshot | None = None,
        warn_above: float | None = None,
        act_above: float | None = None,
        history: DriftHistory | None = None,
        step: int = 0,
        mean_over_ranks: OverRanks | None = None,
        max_over_ranks: OverRanks | None = None,
        processes: int = 1,
    ) -> None:
        check_settings(every_n_steps, measure, reference if checkpoint is None else "fit_start", warn_above, act_above)
        if checkpoint is None:
            check_choice("reference", reference, REFERENCES)
        check_whole("step", step, 0)
        self._layers = layers
        self._measure: Measure = measure
        self._measured_from = reference
        self._fixed = checkpoint is not None
        self._threshold = warn_above or act_above
        self._announcer = Announcer(warn_above, act_above)
        self.history = DriftHistory() if history is None else history
        self._cadence = Cadence(every_n_steps, step)
        self._mean_over_ranks = mean_over_ranks
        self._max_over_ranks = max_over_ranks
        self._processes = processes
        self.sampled = snapshot_of(layers).where_doubles_are()
        self.reference = self.sampled if checkpoint is None else checkpoint.to(self.sampled.mean.device)
        self.warm_up = WarmUp(layers)
        self.warm_up.start(self._layers)
        self._window = BatchWindow(self.sampled.mean)
        self._before: Snapshot | None = None
        self._after: Snapshot | None = None
        self._batches = 0
        self._idle = torch.zeros(len(layers), dtype=torch.int64, device="cpu")
        self._replaced = False
        self._samples: int | None = None
        self._uses, self._used_twice = Uses({}, ()), tuple[str, ...]()
        self.training: dict[str, bool] = {}
        self.statuses = self._current_statuses()
        self.last: Sample | None = None

    def resume(self, state: MonitorState) -> str:
        """Go on from a checkpoint; return a warning where its drift is of others, else nothing."""
        self.history, self._announcer.told = state.history, state.told
        self._announcer.warning.load_state_dict(state.warning)
        self._announcer.action.load_state_dict(state.action)
        if (state.reference.layout, state.measured_from) != (self.reference.layout, self._measured_from):
            return (
                f"the checkpoint is of a monitor of other layers or of another reference "
                f"({quoted(state.reference.names)} since {state.measured_from}): drift is measured anew from here on."
            )
        if not self._fixed:
            self.reference = state.reference.to(self.sampled.mean.device)
        self.warm_up = WarmUp(self._layers, state.warming_up, state.measured_since)
        return ""

    def state(self) -> MonitorState:
        """Return what :meth:`resume` goes on from."""
        return MonitorState(
            self.reference,
            self._measured_from,
            self.history,
            self.warm_up.layers,
            dict(self.warm_up.measured_since),
            self._announcer.warning.state_dict(),
            self._announcer.action.state_dict(),
            self._announcer.told,
        )

    def close(self) -> None:
        """Forget the layers, so that they can be freed; what was found stays."""
        self._uses.end()
        self._layers = {}

    def overall(self) -> str:
        """Return what the last sample found, in one sentence; empty before the first."""
        return "" if self.last is None else self._sentences.overall(self.last.summary)

    def start_epoch(self) -> None:
        """Begin an epoch of training: where the reference is the previous epoch, measure from now on."""
        if self._measured_from == "previous_epoch":
            self.refer_to_now()

    def refer_to_now(self) -> None:
        """Measure from the statistics of now from here on."""
        self.reference = self._now()
        self.warm_up.start(self._layers)

    def before_batch(self) -> None:
        """Look at the statistics right before a training batch, where it is judged."""
        # What a recalibration wrote may be taken back right before this batch, after the monitor's turn.
        self._before = self._now() if self._cadence.judges() and not self._replaced else None
        self._uses.end()
        if self._before is not None:
            # All layers until it is known which are used several times.
            self._uses = Uses(self._layers, self._layers if self.last is None else self._used_twice)

    def after_batch(self, batch: Any, step: int) -> bool:
        """Look at a training batch; return whether a sample is due.

        Args:
            batch: The batch.
            step: Optimizer steps taken.
        """
        self._batches += 1
        self._after = None
        self._replaced = False
        if not self.training or self._before is not None:
            # In validation, before which a sample is taken, every layer is in eval.
            self.training = {name: layer.training for name, layer in self._layers.items()}
            self._samples = num_samples(batch)
        if self._before is not None:
            before, self._before, self._after = self._before, None, self._now()
            self._uses.end()
            self._window.add_uses(self._uses.apart(before, self._layers))
            # Of the statistics after the step, not of what this rank saw: where DDP broadcasts rank 0's buffers
            # before each forward, all ranks began at the same place. Synchronized layers have no gap.
            everywhere = self._mean_over_ranks(self._after.mean.to(torch.float64)) if self._mean_over_ranks else None
            self._window.add(before, self._after, self._momenta(), most_of_one_batch(self._samples), everywhere)
        return self._cadence.samples(step)

    def recalibrated(self, step: int) -> bool:
        """Return whether layers were recalibrated since this was last asked; mark that, and freezes, in the history."""
        then, self.statuses = self.statuses, self._current_statuses()
        found = False
        for name, status in self.statuses.items():
            if status.recalibrated_at != then[name].recalibrated_at:
                found = True
                self.history.mark(step, name, "recalibrated")
            if bool(status.stats_frozen_by) != bool(then[name].stats_frozen_by):
                self.history.mark(step, name, "frozen" if status.stats_frozen_by else "unfrozen")
        self._replaced |= found
        return found

    def after_recalibration(self, step: int) -> None:
        """Take note of a recalibration while what it wrote is still in place."""
        if self.recalibrated(step) and self._measured_from == "recalibrated":
            self.refer_to_now()

    def sample(self, step: int, epoch: int = 0, right_after: bool = False) -> Sample | None:
        """Measure all layers, waiting for the device once; None if no training batch came since the last sample.

        Args:
            step: Optimizer steps taken.
            epoch: The running epoch.
            right_after: Whether nothing came since :meth:`after_batch`, which then has read the statistics already.
        """
        if not self._batches and (self.last is not None or len(self.history)):
            return None
        was_frozen = {name for name, status in self.statuses.items() if status.stats_frozen_by}
        replaced = self.recalibrated(step)
        current = self._after if right_after and self._after is not None else self._now()
        table = self._measured(current)
        self.warm_up.update(table, step, self.history)
        rates = zip(self._layers, table.updates.tolist(), strict=True)
        self._used_twice = tuple(name for name, rate in rates if rate > TWICE)
        findings = self._findings(table, was_frozen, replaced)
        self.history.append(step, epoch, tuple(self._layers), table.largest)
        sample = Sample(
            step=step,
            summary=read_summary(current, table.summary.tolist(), self._threshold),
            largest=tuple(table.largest.tolist()),
            updates=tuple(table.updates.tolist()),
            collapsed=int(sum(table.collapsed.tolist())),
            findings=tuple(findings),
        )
        self.sampled, self._batches = current, 0
        if self._window.judged >= FEWEST_BATCHES:
            self._window = BatchWindow(current.mean)
        self.last = self._announcer.announced(sample, max(table.largest_anywhere.tolist()), self._sentences)
        return self.last

    def _measured(self, current: Snapshot) -> LayerTable:
        found = health(current, self.sampled, self._batches)
        # What starts untrained or is reset by another callback has no drift until it is warm.
        cold = self.warm_up.mask(current.mean.device) | found.reset
        if not self._fixed:
            self.reference = following(self.reference, current, cold)
        unmeasured = cold if self._fixed else None
        before, momentum, threshold = self.reference, self._momenta(), self._threshold
        table = measure(self._measure, before, current, momentum, found, self._window, threshold, unmeasured)
        # Once, whatever is found: every process has to take part.
        return (table if self._max_over_ranks is None else table.over_ranks(self._max_over_ranks)).to_host()

    def _findings(self, table: LayerTable, was_frozen: set[str], replaced: bool) -> list[Finding]:
        # What is not finite stays so.
        moved = (table.updates != 0) & ((table.changed > 0) | (table.nonfinite > 0))
        self._idle = torch.where(moved, 0, self._idle + self._batches)
        if replaced:
            table = replace(table, updates=table.updates * torch.nan, changed=table.changed * 0)
        evidence = Evidence(
            table=table,
            names=tuple(self._layers),
            frozen_by=tuple(now.stats_frozen_by if name in was_frozen else () for name, now in self.statuses.items()),
            training=torch.tensor([self.training.get(name, False) for name in self._layers], device="cpu"),
            dtypes=tuple(str(layer.running_mean.dtype) for layer in self._layers.values()),  # type: ignore[union-attr]
            synchronized=torch.tensor([processes_of(layer) > 1 for layer in self._layers.values()], device="cpu"),
            idle=self._idle,
            samples=self._samples,
            judged=self._window.judged,
            processes=self._processes,
        )
        found = diagnose(evidence, self._announcer.told)
        return [one for one in found if one.layer not in self.warm_up.layers or one.kind not in JUDGED_BY_BATCHES]

    @property
    def _sentences(self) -> DriftSentences:
        return DriftSentences(self._measure, self._measured_from, self.history, self.warm_up)

    def _now(self) -> Snapshot:
        # One measure alone asks for the affine weights.
        weight = None if self._measure == "output" else self.reference.weight
        return snapshot_of(self._layers, weight).where_doubles_are()

    def _momenta(self) -> Tensor:
        # Schedules change them.
        return momenta(self._layers.values(), self.sampled.mean.device)

    def _current_statuses(self) -> dict[str, LayerStatus]:
        return {name: layer_status(layer) for name, layer in self._layers.items()}
