"""What a monitor knows of its layers during one fit: the reference, the last sample, what their batches looked like."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._batches import num_samples
from lightning_bn.functional.layers.behavior import has_initial_statistics
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.layers.status import LayerStatus, layer_status
from lightning_bn.functional.monitoring.batch_deviation import Surprises, gap, momenta, surprise
from lightning_bn.functional.monitoring.diagnosis import (
    DIED_FROM,
    JUDGED_BY_BATCHES,
    Diagnosis,
    Symptoms,
    diagnose,
    most_of_one_batch,
)
from lightning_bn.functional.monitoring.health import Vitals, died, initial_shares, vitals
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.statistics.drift_measures import Measure, of_standardized, standardized
from lightning_bn.functional.statistics.snapshots import Snapshot, snapshot_of
from lightning_bn.functional.statistics.summary import DriftSummary, read_summary, summary_scalars

_SETTLED = 0.01
_WINDOW = 8
"""Sampled batches that are judged together."""

OverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sample:
    """What one sample found.

    Attributes:
        step: Optimizer steps taken.
        summary: Of the drift from the reference.
        largest: The largest drift of each layer.
        updates: Updates of each layer per training batch; NaN where it is not known.
        dead: Channels whose variance is below ``eps``, of all layers.
        diagnoses: What is wrong.
    """

    step: int
    summary: DriftSummary
    largest: tuple[float, ...]
    updates: tuple[float, ...]
    dead: int
    diagnoses: tuple[Diagnosis, ...]


@dataclass(frozen=True)
class Watched:
    """What is left to show and to save of layers that are or were watched.

    Attributes:
        reference: What is measured from.
        unsettled: Layers that are not measured yet.
        measured_since: The step from which on layers are measured that started untrained, or were reset.
        sampled: The statistics of the last sample.
        sample: What it found; None before the first.
        statuses: Who froze which layer then.
        training: Whether a layer was in train mode in the last training batch that was looked at.
    """

    reference: Snapshot
    unsettled: frozenset[str]
    measured_since: dict[str, int]
    sampled: Snapshot
    sample: Sample | None
    statuses: dict[str, LayerStatus]
    training: dict[str, bool]


class _Rows(NamedTuple):
    """A number for each layer in each of them; first as tensors, then as lists."""

    largest: Any
    nonfinite: Any
    nonfinite_here: Any
    died: Any
    explosion: Any
    dead: Any
    updates: Any
    reset: Any
    changed: Any
    initial_share: Any
    bias: Any
    spread: Any
    gap: Any


class Watch:
    """The layers of one fit under watch.

    Args:
        layers: By name; each with running statistics.
        measure: Of drift.
        history: Where samples and marks go.
        threshold: Of drift; the share of channels above it is counted.
        mean_over_ranks: Gives the mean of a tensor over all processes; None in one process.
        max_over_ranks: Gives the largest over all processes; None in one process.
        processes: That train together.
    """

    def __init__(
        self,
        layers: dict[str, _BatchNorm],
        measure: Measure,
        history: DriftHistory,
        threshold: float | None = None,
        mean_over_ranks: OverRanks | None = None,
        max_over_ranks: OverRanks | None = None,
        processes: int = 1,
    ) -> None:
        self._layers = layers
        self._measure = measure
        self._history = history
        self._threshold = threshold
        self._mean_over_ranks = mean_over_ranks
        self._max_over_ranks = max_over_ranks
        self._processes = processes
        self.reference = snapshot_of(layers).where_doubles_are()
        self.unsettled: set[str] = set()
        self._earlier = self.reference
        self._batches = 0
        self._momenta = momenta(list(layers.values()), self.reference.mean.device)
        self._before: Snapshot | None = None
        self._after: Snapshot | None = None
        self._surprises = Surprises.none(self.reference.mean)
        self._gaps = Surprises.none(self.reference.mean)
        self._judged = 0
        self._idle = [0] * len(layers)
        self._replaced = False
        self._fixed = False
        self._noted: set[str] = set()
        self.measured_since: dict[str, int] = {}
        self._training: list[bool] | None = None
        self._samples: int | None = None
        self._status = [layer_status(layer) for layer in layers.values()]
        self.last: Sample | None = None

    def _now(self) -> Snapshot:
        # One measure alone asks for the affine weights.
        weight = None if self._measure == "output" else self.reference.weight
        return snapshot_of(self._layers, weight).where_doubles_are()

    def refer_to(self, reference: Snapshot, fixed: bool = False) -> None:
        """Measures from ``reference`` from here on; untrained layers from when they are settled.

        Args:
            reference: Of the same layers.
            fixed: Whether untrained layers too are measured from it, or from what they are settled to.
        """
        self._fixed = fixed
        self.reference = reference.to(self.reference.mean.device)
        # Those that were on their way still are.
        self.unsettled |= {name for name, layer in self._layers.items() if has_initial_statistics(layer)}

    def resume(self, reference: Snapshot, unsettled: set[str], measured_since: dict[str, int]) -> None:
        """Goes on with a reference from a checkpoint; layers that are not settled are not measured yet."""
        if not self._fixed:
            self.reference = reference.to(self.reference.mean.device)
        self.unsettled, self._noted, self.measured_since = unsettled, set(unsettled), measured_since

    def refer_to_now(self) -> None:
        """Measures from the statistics of now from here on."""
        self.refer_to(self._now())

    def watched(self) -> Watched:
        """What is known now."""
        statuses = dict(zip(self._layers, self._status, strict=True))
        training = dict(zip(self._layers, self._training or [], strict=False))
        since = dict(self.measured_since)
        return Watched(self.reference, frozenset(self.unsettled), since, self._earlier, self.last, statuses, training)

    def before_batch(self) -> None:
        """To be called right before a batch that is to be judged."""
        # What a recalibration wrote may be taken back right before this batch, after the monitor's turn.
        self._before = None if self._replaced else self._now()
        # Schedules change it.
        self._momenta = momenta(list(self._layers.values()), self.reference.mean.device)

    @property
    def is_new(self) -> bool:
        """Whether a training batch came since the last sample."""
        return self._batches > 0 or self.last is None

    def after_batch(self, batch: Any) -> None:
        """To be called after every training batch."""
        self._batches += 1
        self._after = None
        if self._training is None or self._before is not None:
            # In validation, before which a sample is taken, every layer is in eval.
            self._training = [layer.training for layer in self._layers.values()]
            self._samples = num_samples(batch)
        self._replaced = False
        if self._before is not None:
            before, after = self._before, self._now()
            self._after = after
            seen = surprise(before, after, self._momenta)
            self._before = None
            most = most_of_one_batch(self._samples)
            self._surprises = self._surprises.with_batch(seen, most)
            self._judged += 1
            if self._mean_over_ranks is not None:
                # Of the statistics after the step, not of what this rank saw: where DDP broadcasts rank 0's buffers
                # before each forward, all ranks began at the same place. Synchronized layers have no gap.
                everywhere = replace(after, mean=self._mean_over_ranks(after.mean.to(torch.float64)))
                self._gaps = self._gaps.with_batch(gap(everywhere, after, self._momenta), most)

    def recalibrated(self, step: int) -> bool:
        """Whether layers were recalibrated, or frozen, since this was last asked; marks it in the history."""
        now = [layer_status(layer) for layer in self._layers.values()]
        found = False
        for name, then, status in zip(self._layers, self._status, now, strict=True):
            if status.recalibrated_at != then.recalibrated_at:
                found = True
                self._history.mark(step, name, "recalibrated")
            if bool(status.stats_frozen_by) != bool(then.stats_frozen_by):
                self._history.mark(step, name, "frozen" if status.stats_frozen_by else "unfrozen")
        self._status = now
        self._replaced |= found
        return found

    def sample(self, step: int, epoch: int, told: Container[tuple[str, str]] = (), right_after: bool = False) -> Sample:
        """Measures all layers; waits for the device once.

        Args:
            step: Optimizer steps taken.
            epoch: The running epoch.
            told: Layers and diseases that were said before.
            right_after: Whether nothing came since :meth:`after_batch`, which then has read the statistics already.
        """
        was_frozen = [bool(status.stats_frozen_by) for status in self._status]
        replaced = self.recalibrated(step)
        current = self._after if right_after and self._after is not None else self._now()
        found = vitals(current, self._earlier, self._batches)
        # Layers that started untrained have no drift yet: their reference follows them until they are settled.
        if not self._fixed:
            self._copy_to_reference(self.unsettled, current)
        # Once, whatever is found below: every process has to take part.
        over_ranks = torch.stack((self._gaps.bias(current.layout), found.nonfinite))
        if self._max_over_ranks is not None:
            over_ranks = self._max_over_ranks(over_ranks)
        flat, rows = self._measured(current, found, over_ranks)
        was_reset = {name for name, flag in zip(self._layers, rows.reset, strict=True) if flag}
        if was_reset:
            # What another callback reset starts anew instead of alarming.
            for name in was_reset:
                self._history.mark(step, name, "reset")
            if self._fixed:
                self.unsettled |= was_reset
            else:
                self._copy_to_reference(was_reset, current)
            self._momenta = momenta(list(self._layers.values()), current.mean.device)
            flat, rows = self._measured(current, found, over_ranks)
        shares = dict(zip(self._layers, rows.initial_share, strict=True))
        young = {name for name in self.unsettled | was_reset if shares[name] >= _SETTLED}
        self._follow(young, (self.unsettled | was_reset) - young, step)
        for index, count in enumerate(rows.updates):
            # What is not finite stays so.
            moved = count != 0 and (rows.changed[index] or rows.nonfinite_here[index])
            self._idle[index] = 0 if moved else self._idle[index] + self._batches
        frozen_by = [
            ", ".join(status.stats_frozen_by) if was else ""
            for status, was in zip(self._status, was_frozen, strict=True)
        ]
        symptoms = Symptoms(
            names=tuple(self._layers),
            training=self._training or [False] * len(self._layers),
            frozen_by=frozen_by,
            nonfinite=rows.nonfinite,
            nonfinite_here=rows.nonfinite_here,
            died=rows.died,
            explosion=rows.explosion,
            updates=[float("nan")] * len(self._layers) if replaced else rows.updates,
            changed=[False] * len(self._layers) if replaced else [bool(one) for one in rows.changed],
            idle=self._idle,
            samples=self._samples,
            judged=self._judged,
            bias=rows.bias,
            spread=rows.spread,
            gap=rows.gap,
            processes=self._processes,
            synchronized=[processes_of(layer) > 1 for layer in self._layers.values()],
        )
        diagnoses = [
            one
            for one in diagnose(symptoms, told)
            if one.layer not in self.unsettled or one.disease not in JUDGED_BY_BATCHES
        ]
        self._history.append(step, epoch, tuple(self._layers), torch.tensor(rows.largest, dtype=torch.float64))
        self.last = Sample(
            step=step,
            summary=read_summary(current, flat, self._threshold),
            largest=tuple(rows.largest),
            updates=tuple(rows.updates),
            dead=int(sum(rows.dead)),
            diagnoses=tuple(diagnoses),
        )
        self._earlier, self._batches = current, 0
        if self._judged >= _WINDOW:
            self._surprises, self._gaps = Surprises.none(current.mean), Surprises.none(current.mean)
            self._judged = 0
        return self.last

    def _follow(self, young: set[str], grown: set[str], step: int) -> None:
        """Notes which layers are not measured yet, and which are from now on."""
        for name in self._layers:
            if name in young and name not in self._noted:
                self._history.mark(step, name, "untrained")
            elif name in grown:
                self.measured_since[name] = step
                self._history.mark(step, name, "measured")
        self._noted, self.unsettled = set(young), young

    def _measured(self, current: Snapshot, found: Vitals, over_ranks: Tensor) -> tuple[list[float], _Rows]:
        """Scalars of the summary, and rows with a number for each layer; waits for the device once."""
        shift, ratio = standardized(self.reference, current)
        if self._fixed and self.unsettled:
            young = current.layout.expand(self._among(self.unsettled))
            shift, ratio = torch.where(young, 0, shift), torch.where(young, 1, ratio)
        values = of_standardized(self._measure, shift, ratio, current.weight).abs()
        scalars = torch.stack(summary_scalars(values, shift, ratio, self._threshold))
        by_layer = _Rows(
            largest=current.layout.max(values),
            nonfinite=over_ranks[1],
            nonfinite_here=found.nonfinite,
            died=died(current, self.reference, self._momenta, DIED_FROM),
            explosion=current.layout.mean(ratio.log()).exp(),
            dead=found.dead,
            updates=found.updates,
            reset=found.reset.to(torch.float64),
            changed=found.changed.to(torch.float64),
            initial_share=initial_shares(current, self._momenta),
            bias=self._surprises.bias(current.layout),
            spread=self._surprises.spread(current.layout),
            gap=over_ranks[0],
        )
        flat = torch.cat((scalars, *by_layer)).tolist()
        size = len(self._layers)
        rows = [flat[start : start + size] for start in range(len(scalars), len(flat), size)]
        return flat[: len(scalars)], _Rows(*rows)

    def _copy_to_reference(self, names: set[str], current: Snapshot) -> None:
        if not names:
            return
        then, chosen = self.reference, self._among(names)
        of_chosen = current.layout.expand(chosen)
        self.reference = replace(
            then,
            mean=torch.where(of_chosen, current.mean, then.mean),
            var=torch.where(of_chosen, current.var, then.var),
            num_batches_tracked=torch.where(chosen, current.num_batches_tracked, then.num_batches_tracked),
        )

    def _among(self, names: set[str]) -> Tensor:
        """Which layers are among ``names``, ``(L,)``."""
        return torch.tensor([name in names for name in self._layers]).to(self.reference.mean.device)
