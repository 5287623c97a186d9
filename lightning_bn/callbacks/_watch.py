"""What a monitor knows of its layers during one fit: the reference, the last sample, what their batches looked like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.diagnosis import JUDGED_BY_BATCHES, Diagnosis, Symptoms, diagnose
from lightning_bn.functional.drift import (
    DriftSummary,
    Measure,
    layer_maxima,
    of_standardised,
    read_summary,
    standardised,
    summary_scalars,
)
from lightning_bn.functional.history import DriftHistory
from lightning_bn.functional.last_batch import Surprises, gap, momenta, surprise
from lightning_bn.functional.semantics import has_initial_statistics, initial_share
from lightning_bn.functional.snapshots import Snapshot, snapshot_of
from lightning_bn.functional.status import LayerStatus, layer_status
from lightning_bn.functional.vitals import Vitals, vitals

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
        dead: Dead channels of each layer.
        diagnoses: What is wrong.
    """

    step: int
    summary: DriftSummary
    largest: tuple[float, ...]
    updates: tuple[float, ...]
    dead: tuple[float, ...]
    diagnoses: tuple[Diagnosis, ...]


class Watch:
    """The layers of one fit under watch.

    Args:
        layers: By name; each with running statistics.
        measure: Of drift.
        history: Where samples and marks go.
        mean_over_ranks: Gives the mean of a tensor over all processes; None in one process.
        max_over_ranks: Gives the largest over all processes; None in one process.
    """

    def __init__(
        self,
        layers: dict[str, _BatchNorm],
        measure: Measure,
        history: DriftHistory,
        mean_over_ranks: OverRanks | None = None,
        max_over_ranks: OverRanks | None = None,
    ) -> None:
        self._layers = layers
        self._measure = measure
        self._history = history
        self._mean_over_ranks = mean_over_ranks
        self._max_over_ranks = max_over_ranks
        self.reference = snapshot_of(layers)
        self.unsettled: set[str] = set()
        self._earlier = self.reference
        self._batches = 0
        self._momenta = momenta(list(layers.values()), self.reference.mean.device)
        self._before: Snapshot | None = None
        self._surprises = Surprises.none(self.reference.mean)
        self._gaps = Surprises.none(self.reference.mean)
        self._judged = 0
        self._idle = [0] * len(layers)
        self._status = [layer_status(layer) for layer in layers.values()]
        self.last: Sample | None = None

    def refer_to(self, reference: Snapshot) -> None:
        """Measures from ``reference`` from here on; untrained layers from when they are settled."""
        self.reference = reference.to(self.reference.mean.device)
        self.unsettled = {name for name, layer in self._layers.items() if has_initial_statistics(layer)}

    def refer_to_now(self) -> None:
        """Measures from the statistics of now from here on."""
        self.refer_to(snapshot_of(self._layers))

    @property
    def sampled(self) -> Snapshot:
        """The statistics of the last sample."""
        return self._earlier

    @property
    def statuses(self) -> dict[str, LayerStatus]:
        """Who froze which layer at the last sample."""
        return dict(zip(self._layers, self._status, strict=True))

    def before_batch(self) -> None:
        """To be called right before a batch that is to be judged."""
        self._before = snapshot_of(self._layers)

    def after_batch(self) -> None:
        """To be called after every training batch."""
        self._batches += 1
        if self._before is not None:
            before, after = self._before, snapshot_of(self._layers)
            seen = surprise(before, after, self._momenta)
            self._before = None
            self._surprises = self._surprises.with_batch(seen)
            self._judged += 1
            if self._mean_over_ranks is not None:
                # Of the statistics after the step, not of what this rank saw: where DDP broadcasts rank 0's buffers
                # before each forward, all ranks began at the same place. Synchronised layers have no gap.
                everywhere = replace(after, mean=self._mean_over_ranks(after.mean.to(torch.float64)))
                self._gaps = self._gaps.with_batch(gap(everywhere, after, self._momenta))

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
        return found

    def sample(self, step: int, epoch: int, samples: int | None) -> Sample:
        """Measures all layers; waits for the device once.

        Args:
            step: Optimizer steps taken.
            epoch: The running epoch.
            samples: In a training batch; None if that is not known.
        """
        was_frozen = [bool(status.stats_frozen_by) for status in self._status]
        replaced = self.recalibrated(step)
        current = snapshot_of(self._layers)
        found = vitals(current, self._earlier, self._batches)
        self._follow_unsettled(current)
        flat, rows = self._measured(current, found)
        if any(rows[4]):
            # What another callback reset starts anew instead of alarming.
            self._forget_reset(current, rows[4], step)
            flat, rows = self._measured(current, found)
        largest, nonfinite, dead, updates, _, changed, bias, spread, apart = rows
        for index, count in enumerate(updates):
            self._idle[index] = self._idle[index] + self._batches if count == 0 else 0
        frozen_by = [
            ", ".join(status.stats_frozen_by) if was else ""
            for status, was in zip(self._status, was_frozen, strict=True)
        ]
        symptoms = Symptoms(
            names=tuple(self._layers),
            training=[layer.training for layer in self._layers.values()],
            frozen_by=frozen_by,
            nonfinite=nonfinite,
            updates=[float("nan")] * len(self._layers) if replaced else updates,
            changed=[False] * len(self._layers) if replaced else [bool(one) for one in changed],
            idle=self._idle,
            samples=samples,
            judged=self._judged,
            bias=bias,
            spread=spread,
            gap=apart,
        )
        diagnoses = [
            one for one in diagnose(symptoms) if one.layer not in self.unsettled or one.disease not in JUDGED_BY_BATCHES
        ]
        self._history.append(step, epoch, tuple(self._layers), torch.tensor(largest, dtype=torch.float64))
        self.last = Sample(
            step=step,
            summary=read_summary(current, flat),
            largest=tuple(largest),
            updates=tuple(updates),
            dead=tuple(dead),
            diagnoses=tuple(diagnoses),
        )
        self._earlier, self._batches = current, 0
        if self._judged >= _WINDOW:
            self._surprises, self._gaps = Surprises.none(current.mean), Surprises.none(current.mean)
            self._judged = 0
        return self.last

    def _measured(self, current: Snapshot, found: Vitals) -> tuple[list[float], list[list[float]]]:
        """Scalars of the summary, and rows with a number for each layer; waits for the device once."""
        shift, ratio = standardised(self.reference, current)
        values = of_standardised(self._measure, shift, ratio, current.weight).abs()
        scalars = torch.stack(summary_scalars(values, shift, ratio))
        apart = self._gaps.bias(current)
        by_layer = torch.stack(
            (
                layer_maxima(values, current),
                found.nonfinite,
                found.dead,
                found.updates,
                found.reset.to(torch.float64),
                found.changed.to(torch.float64),
                self._surprises.bias(current),
                self._surprises.spread(current),
                apart if self._max_over_ranks is None else self._max_over_ranks(apart),
            )
        )
        flat = torch.cat((scalars, by_layer.flatten())).tolist()
        size = len(self._layers)
        rows = [flat[start : start + size] for start in range(len(scalars), len(flat), size)]
        return flat[: len(scalars)], rows

    def _follow_unsettled(self, current: Snapshot) -> None:
        """Layers that started untrained have no drift yet: their reference follows them until they are settled."""
        self._copy_to_reference(self.unsettled, current)
        self.unsettled = {name for name in self.unsettled if initial_share(self._layers[name]) >= _SETTLED}

    def _forget_reset(self, current: Snapshot, reset: list[float], step: int) -> None:
        """Layers that were reset are measured from now on, or from when they are settled again."""
        names = {name for name, was_reset in zip(self._layers, reset, strict=True) if was_reset}
        for name in names:
            self._history.mark(step, name, "reset")
        self._copy_to_reference(names, current)
        self.unsettled |= {name for name in names if initial_share(self._layers[name]) >= _SETTLED}
        self._momenta = momenta(list(self._layers.values()), current.mean.device)

    def _copy_to_reference(self, names: set[str], current: Snapshot) -> None:
        parts = self.reference.slices() if names else {}
        for name in names:
            for then, now in ((self.reference.mean, current.mean), (self.reference.var, current.var)):
                then[parts[name]] = now[parts[name]]
