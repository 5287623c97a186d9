"""One set of running statistics, the layers' own or those of a task, measured again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_bn.functional.layers.sets_per_task import Statistics, StatisticsOf, look_again
from lightning_bn.functional.monitoring.announcer import DriftSentences
from lightning_bn.functional.monitoring.batch_deviation import BatchWindow, momenta
from lightning_bn.functional.monitoring.diagnosis import FEWEST_BATCHES, most_of_one_batch
from lightning_bn.functional.monitoring.health import health
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.measure import LayerTable, measure
from lightning_bn.functional.monitoring.monitor_state import MonitorState
from lightning_bn.functional.monitoring.uses import Uses
from lightning_bn.functional.monitoring.warm_up import WarmUp, following
from lightning_bn.functional.statistics.drift_measures import Measure
from lightning_bn.functional.statistics.snapshots import Snapshot, snapshot_of
from lightning_bn.functional.statistics.summary import DriftSummary, read_summary


@dataclass(frozen=True)
class Drift:
    """What drift is.

    Attributes:
        measure: Of drift.
        since: What it is measured from, as it is called.
        threshold: Of drift; the share of channels above it is counted.
    """

    measure: Measure
    since: str
    threshold: float | None


class MeasuredSet:
    """The statistics of some layers for one task, or the layers' own, which every batch is taken to update.

    Args:
        layers: By name.
        drift: What is measured.
        checkpoint: What drift is measured from; None for the statistics of now.
        history: Gets samples and marks; None for a new one.
        task: Whose statistics they are; None for the layers' own.

    Attributes:
        layers: By name.
        task: Whose statistics they are.
        history: The samples so far.
        reference: What drift is measured from.
        sampled: The statistics at the last sample.
        warm_up: Which layers are warming up.
        window: The batches that are judged.
        batches: That updated these statistics since the last sample.
        samples: In such a batch; None if that is not known.
        used_twice: Layers that a batch updates more than once.
        summary: Of the last sample; None before the first.
    """

    def __init__(
        self,
        layers: Mapping[str, Statistics],
        drift: Drift,
        *,
        checkpoint: Snapshot | None = None,
        history: DriftHistory | None = None,
        task: str | None = None,
    ) -> None:
        self.layers, self.task, self._drift = layers, task, drift
        self._fixed = checkpoint is not None
        self.history = DriftHistory() if history is None else history
        look_again(layers.values())
        self.sampled = snapshot_of(layers).where_doubles_are()
        self.reference = self.sampled if checkpoint is None else checkpoint.to(self.sampled.mean.device)
        self.warm_up = WarmUp(layers)
        self.warm_up.start(layers)
        self.window = BatchWindow(self.sampled.mean)
        self.batches = 0
        self.samples: int | None = None
        self.used_twice: tuple[str, ...] = ()
        self.summary: DriftSummary | None = None
        self._before: Snapshot | None = None
        self._after: Snapshot | None = None
        self._updates = 0

    def resume(self, state: MonitorState) -> bool:
        """Go on from a checkpoint; return whether its drift is of the same layers and from the same reference."""
        self.history = state.history
        if (state.reference.layout, state.measured_from) != (self.reference.layout, self._drift.since):
            return False
        if not self._fixed:
            self.reference = state.reference.to(self.sampled.mean.device)
        self.warm_up = WarmUp(self.layers, state.warming_up, state.measured_since)
        return True

    def state(self) -> MonitorState:
        """Return what :meth:`resume` goes on from."""
        warming_up, since = self.warm_up.layers, dict(self.warm_up.measured_since)
        return MonitorState(self.reference, self._drift.since, self.history, warming_up, since)

    @property
    def judges(self) -> bool:
        """Whether the batch that runs is judged, should it update these statistics."""
        return self._before is not None

    @property
    def sentences(self) -> DriftSentences:
        """On the last sample."""
        return DriftSentences(self._drift.measure, self._drift.since, self.history, self.warm_up, self.task)

    def refer_to_now(self) -> None:
        """Measure from the statistics of now from here on."""
        self.reference = self.now()
        self.warm_up.start(self.layers)

    def before_batch(self, judged: bool) -> None:
        """Look at the statistics right before a training batch, where it is judged."""
        self._updates = self._counted()
        if not judged:
            self._before = None
        elif self._before is None or self.task is None:
            # What a batch of another task has left alone is as it was before that.
            self._before = self.now()

    def after_batch(self, samples: int | None, uses: Uses) -> Snapshot | None:
        """Look at a training batch; return the statistics right after it, where it is judged.

        Args:
            samples: In the batch; None if that is not known.
            uses: Of the layers in it.
        """
        self._after = None
        if self.task is not None and self._counted() == self._updates:
            return None
        self.batches += 1
        if self.samples is None or self._before is not None:
            self.samples = samples
        if self._before is not None:
            before, self._before, self._after = self._before, None, self.now()
            self.window.add_uses(uses.apart(before, self.layers))
            self.window.add(before, self._after, self._momenta(), most_of_one_batch(self.samples))
        return self._after

    def measured(self, right_after: bool) -> tuple[Snapshot, LayerTable]:
        """Return the statistics and what they show, without waiting for the device.

        Args:
            right_after: Whether nothing came since :meth:`after_batch`, which may have read them already.
        """
        current = self._after if right_after and self._after is not None else self.now()
        found = health(current, self.sampled, self.batches)
        # What starts untrained or is reset by another callback has no drift until it is warm.
        cold = self.warm_up.mask(current.mean.device) | found.reset
        if not self._fixed:
            self.reference = following(self.reference, current, cold)
        unmeasured = cold if self._fixed else None
        before, momentum, drift = self.reference, self._momenta(), self._drift
        return current, measure(
            drift.measure, before, current, momentum, found, self.window, drift.threshold, unmeasured
        )

    def take(self, current: Snapshot, table: LayerTable, step: int, epoch: int) -> None:
        """Take the result of a sample, which is on the host."""
        self.history.append(step, epoch, tuple(self.layers), table.largest)
        self.summary = read_summary(current, table.summary.tolist(), self._drift.threshold)
        self.sampled, self.batches = current, 0
        if self.window.judged >= FEWEST_BATCHES:
            self.window = BatchWindow(current.mean)

    def moved(self, table: LayerTable) -> Tensor:
        """Return which layers a sample shows to have been updated since the last one, ``(L,)``, on the host."""
        # What is not finite stays so.
        stays = (table.nonfinite > 0) & (self.batches > 0)
        return (table.updates != 0) & ((table.changed > 0) | stays)

    def now(self) -> Snapshot:
        """Return the statistics of now."""
        look_again(self.layers.values())
        # One measure alone asks for the affine weights.
        weight = None if self._drift.measure == "output" else self.reference.weight
        return snapshot_of(self.layers, weight).where_doubles_are()

    def _momenta(self) -> Tensor:
        # Schedules change them.
        return momenta(self.layers.values(), self.sampled.mean.device)

    def _counted(self) -> int:
        """How often a task's counters were written to: nothing is waited for."""
        if self.task is None:
            return 0
        return sum(layer.updates() for layer in self.layers.values() if isinstance(layer, StatisticsOf))
