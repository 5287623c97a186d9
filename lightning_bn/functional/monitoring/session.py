"""One monitored fit, without Lightning: what to call around each batch, and what a sample finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._batches import num_samples
from lightning_bn.functional._checks import check_choice, check_whole
from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.sets_per_task import statistics_by_task
from lightning_bn.functional.layers.status import LayerStatus, layer_status
from lightning_bn.functional.monitoring.announcer import Announcer
from lightning_bn.functional.monitoring.batch_deviation import momenta
from lightning_bn.functional.monitoring.cadence import Cadence
from lightning_bn.functional.monitoring.diagnosis import most_of_one_batch
from lightning_bn.functional.monitoring.history import FROM_THE_START, DriftHistory
from lightning_bn.functional.monitoring.judgment import Judgment
from lightning_bn.functional.monitoring.measure import LayerTable, over_ranks, to_host
from lightning_bn.functional.monitoring.measured_set import Drift, MeasuredSet
from lightning_bn.functional.monitoring.monitor_state import MonitorState
from lightning_bn.functional.monitoring.sample import Sample
from lightning_bn.functional.monitoring.settings import REFERENCES, check_settings
from lightning_bn.functional.monitoring.uses import Uses
from lightning_bn.functional.statistics.drift_measures import Measure
from lightning_bn.functional.statistics.snapshots import Snapshot
from lightning_bn.functional.statistics.summary import DriftSummary

OverRanks = Callable[[Tensor], Tensor]


class MonitorSession:
    """The layers of one fit, measured again and again.

    Call :meth:`before_batch` and :meth:`after_batch` around every training batch, and :meth:`sample` where
    ``after_batch`` says that one is due. Layers that have statistics per task when the session is made
    (:func:`~lightning_bn.functional.task_statistics`) are measured for each task from a reference of its own; what is
    said of the layers' own statistics is said of the default task's there.

    Args:
        layers: By name; each with running statistics.
        every_n_steps: Optimizer steps between two samples.
        measure: Of drift.
        reference: What is measured from: ``"fit_start"``, ``"previous_epoch"``, ``"recalibrated"``, or the path that
            ``checkpoint`` is of.
        checkpoint: The statistics at that path.
        checkpoint_of_tasks: Those of tasks there; a task that is not named is measured from ``checkpoint``.
        warn_above: Drift that is warned of.
        act_above: Drift in two samples in a row that ``Sample.exceeded`` tells of.
        history: Gets samples and marks; None for a new one.
        step: Optimizer steps taken so far.
        mean_over_ranks: Gives the mean of a tensor over all processes; None in one process.
        max_over_ranks: Gives the largest over all processes; None in one process.
        processes: That train together.
        others: Names of the model's other BatchNorm layers, so that no remedy means them too.

    Attributes:
        own: The layers' own statistics, those of the default task where there are several.
        tasks: Those of each task.
        training: Whether each layer is in train mode in training, by name.
        statuses: What is known of each layer, by name.
        last: The last sample; None before the first.

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
        checkpoint_of_tasks: Mapping[str, Snapshot] | None = None,
        warn_above: float | None = None,
        act_above: float | None = None,
        history: DriftHistory | None = None,
        step: int = 0,
        mean_over_ranks: OverRanks | None = None,
        max_over_ranks: OverRanks | None = None,
        processes: int = 1,
        others: Collection[str] = (),
    ) -> None:
        check_settings(every_n_steps, measure, reference if checkpoint is None else "fit_start", warn_above, act_above)
        if checkpoint is None:
            check_choice("reference", reference, REFERENCES)
        check_whole("step", step, 0)
        self._layers = layers
        self._measured_from = reference
        self._announcer = Announcer(warn_above, act_above)
        self._cadence = Cadence(every_n_steps, step)
        self._mean_over_ranks = mean_over_ranks
        self._max_over_ranks = max_over_ranks
        drift = Drift(measure, reference, warn_above or act_above)
        own, of_tasks = statistics_by_task(layers)
        self.own = MeasuredSet(own, drift, checkpoint=checkpoint, history=history)
        self.tasks: dict[str, MeasuredSet] = {}
        for task, sets in of_tasks.items():
            read = None if checkpoint is None else (checkpoint_of_tasks or {}).get(task, checkpoint.only(sets))
            self.tasks[task] = MeasuredSet(
                sets, drift, checkpoint=read, history=DriftHistory(self.history.most), task=task
            )
        self._judgment = Judgment(layers, self.own, [*self.tasks.values()], processes, others)
        self._batches = 0
        self._replaced = False
        self._uses = Uses({}, ())
        self.training: dict[str, bool] = {}
        self.statuses = self._current_statuses()
        for name, status in self.statuses.items():
            if status.stats_frozen_by:
                self._mark(step, name, FROM_THE_START)
        self.last: Sample | None = None

    @property
    def history(self) -> DriftHistory:
        """The samples of the layers' own statistics."""
        return self.own.history

    @property
    def said(self) -> tuple[str, ...]:
        """What was said since the start, each sentence once; of drift the last one."""
        return tuple(self._announcer.said.values())

    @property
    def _sets(self) -> list[MeasuredSet]:
        return [self.own, *self.tasks.values()]

    def resume(self, state: MonitorState) -> str:
        """Go on from a checkpoint; return a warning where its drift is of others, else nothing."""
        self._announcer.told = state.told
        self._announcer.warning.load_state_dict(state.warning)
        self._announcer.action.load_state_dict(state.action)
        said = []
        if not self.own.resume(state):
            said.append(
                f"the checkpoint's drift is of other layers or another reference ({quoted(state.reference.names)}, "
                f"measured from {state.measured_from}): drift is measured from now on."
            )
        anew = [
            task for task, one in self.tasks.items() if task not in state.tasks or not one.resume(state.tasks[task])
        ]
        if anew and not said:
            said.append(f"the checkpoint has no drift of the layers of task {quoted(anew)}: measured from now on.")
        return " ".join(said)

    def state(self) -> MonitorState:
        """Return what :meth:`resume` goes on from."""
        return replace(
            self.own.state(),
            warning=self._announcer.warning.state_dict(),
            action=self._announcer.action.state_dict(),
            told=self._announcer.told,
            tasks={task: one.state() for task, one in self.tasks.items()},
        )

    def close(self) -> None:
        """Forget the layers, so that they can be freed; what was found stays."""
        self._uses.end()
        self._layers = {}
        self._judgment.close()

    def overall(self) -> str:
        """Return what the last sample found, in one sentence; empty before the first."""
        return "" if self.last is None else self.own.sentences.overall(self.last.summary)

    def start_epoch(self) -> None:
        """Begin an epoch of training: where the reference is the previous epoch, measure from now on."""
        if self._measured_from == "previous_epoch":
            self.refer_to_now()

    def refer_to_now(self) -> None:
        """Measure from the statistics of now from here on."""
        for one in self._sets:
            one.refer_to_now()

    def before_batch(self) -> None:
        """Look at the statistics right before a training batch, where it is judged."""
        # What a recalibration wrote may be taken back right before this batch, after the monitor's turn.
        judges = self._cadence.judges() and not self._replaced
        self.own.before_batch(judges)
        for one in self.tasks.values():
            one.before_batch(self._cadence.judges_tasks(len(self.tasks)) and not self._replaced)
        self._uses.end()
        if any(one.judges for one in self._sets):
            # All layers until it is known which are used several times.
            twice = {name for one in self._sets for name in one.used_twice}
            self._uses = Uses(self._layers, self._layers if self.last is None else twice)

    def after_batch(self, batch: Any, step: int) -> bool:
        """Look at a training batch; return whether a sample is due.

        Args:
            batch: The batch.
            step: Optimizer steps taken.
        """
        self._batches += 1
        self._replaced = False
        if not self.training or self.own.judges:
            # In validation, before which a sample is taken, every layer is in eval.
            self.training = {name: layer.training for name, layer in self._layers.items()}
        self._uses.end()
        wanted = any(one.judges or one.samples is None for one in self._sets)
        samples = num_samples(batch) if wanted else None
        after = self.own.after_batch(samples, self._uses)
        for one in self.tasks.values():
            one.after_batch(samples, self._uses)
        if after is not None and self._mean_over_ranks is not None:
            # Of the statistics after the step, not of what this rank saw: where DDP broadcasts rank 0's buffers
            # before each forward, all ranks began at the same place. Synchronized layers have no gap. Not of tasks:
            # ranks may have different ones in a step, and what is collective has to be the same on all.
            everywhere = self._mean_over_ranks(after.mean.to(torch.float64))
            self.own.window.add_gap(after, everywhere, self._momenta(), most_of_one_batch(self.own.samples))
        return self._cadence.samples(step)

    def recalibrated(self, step: int) -> bool:
        """Return whether layers were recalibrated since this was last asked; mark that, and freezes, in the history."""
        then, self.statuses = self.statuses, self._current_statuses()
        found = False
        for name, status in self.statuses.items():
            if status.recalibrated_at != then[name].recalibrated_at:
                found = True
                self._mark(step, name, "recalibrated")
            if bool(status.stats_frozen_by) != bool(then[name].stats_frozen_by):
                self._mark(step, name, "frozen" if status.stats_frozen_by else "unfrozen")
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
        current, tables = self._measured(right_after)
        for one, table in zip(self._sets, tables, strict=True):
            one.warm_up.update(table, step, one.history)
        frozen_by = {name: now.stats_frozen_by for name, now in self.statuses.items() if name in was_frozen}
        findings = self._judgment.findings(
            tables, self._batches, self.training, frozen_by, replaced, self._announcer.told
        )
        for one, now, table in zip(self._sets, current, tables, strict=True):
            one.take(now, table, step, epoch)
        self._batches, own = 0, tables[0]
        summaries = [one.summary for one in self._sets if one.summary is not None]
        sample = Sample(
            step=step,
            summary=summaries[0],
            largest=tuple(own.largest.tolist()),
            updates=tuple(own.updates.tolist()),
            collapsed=int(sum(own.collapsed.tolist())),
            findings=tuple(findings),
            tasks=dict(zip(self.tasks, summaries[1:], strict=True)),
        )
        largest = max(value for table in tables for value in table.largest_anywhere.tolist())
        # Where the layers' own is the largest, the default task's is as large, and says of which task it is.
        worst = max([*self.tasks.values(), self.own], key=lambda one: _size(one.summary))
        assert worst.summary is not None
        self.last = self._announcer.announced(sample, worst.summary, largest, worst.sentences)
        return self.last

    def _measured(self, right_after: bool) -> tuple[list[Snapshot], list[LayerTable]]:
        current, tables = zip(*(one.measured(right_after) for one in self._sets), strict=True)
        # Once, whatever is found: every process has to take part.
        return list(current), to_host(over_ranks(tables, self._max_over_ranks) if self._max_over_ranks else tables)

    def _mark(self, step: int, layer: str, event: str) -> None:
        for one in self._sets:
            if layer in one.layers:
                one.history.mark(step, layer, event)

    def _momenta(self) -> Tensor:
        return momenta(self._layers.values(), self.own.sampled.mean.device)

    def _current_statuses(self) -> dict[str, LayerStatus]:
        return {name: layer_status(layer) for name, layer in self._layers.items()}


def _size(summary: DriftSummary | None) -> float:
    """The largest drift; what is not a number is the largest there is."""
    return math.inf if summary is None or math.isnan(summary.max) else summary.max
