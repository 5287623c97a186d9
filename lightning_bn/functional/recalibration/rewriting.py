"""What was gathered of the layers of one task, or of those without, on its way into them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.layers.sets_per_task import SetsPerTask
from lightning_bn.functional.recalibration.population import Estimator, Population
from lightning_bn.functional.recalibration.result import Recalibration, unheld_in_words
from lightning_bn.functional.recalibration.run import Counts
from lightning_bn.functional.recalibration.writing import blended, unheld_by, write
from lightning_bn.functional.statistics.snapshots import snapshot_of


class Rewriting:
    """Statistics that are to be written; nothing is before :meth:`write`.

    Args:
        layers: By name.
        gathered: Of them.
        counts: From how much.
        sets: Statistics per task; None if there are none.
        task: The one that they are of; None for layers without statistics per task.
        estimator: As for ``recalibrate``.
        prior: As for ``recalibrate``.
        distributed: Whether all processes take part.

    Attributes:
        written: The layers that can be.
        counts: From how much.

    Raises:
        ValueError: With ``prior``, if samples cannot be counted.
    """

    def __init__(
        self,
        layers: Mapping[str, _BatchNorm],
        gathered: Population,
        counts: Counts,
        sets: SetsPerTask | None,
        task: str | None,
        *,
        estimator: Estimator,
        prior: float | None,
        distributed: bool,
    ) -> None:
        self.counts, self._gathered, self._sets, self._task = counts, gathered, sets, task
        reached, self._statistics = gathered.reached(), gathered.statistics(estimator)
        if prior is not None and reached:
            with self._in_place():
                self._statistics = blended(self._statistics, layers, prior, counts.samples, distributed=distributed)
        unheld = unheld_by(self._statistics, layers, gathered.layout)
        self._unheld = {name: words for name, words in unheld.items() if name in reached}
        self.written = {name: layers[name] for name in reached if name not in self._unheld}

    def write(self, **shared: Any) -> Recalibration:
        """Write them; return what was done, with what all tasks share."""
        gathered, counts = self._gathered, self.counts
        uses, nonfinite, empty = (gathered.by_layer(one) for one in (gathered.uses, gathered.nonfinite, gathered.empty))
        names = gathered.layout.names
        with self._in_place() if self.written else nullcontext():
            before = snapshot_of(self.written)
            if self.written:
                write(self.written, gathered.layout.pick(self._statistics, self.written))
            after = snapshot_of(self.written, before.weight)
            if self._sets is not None and self._task is not None and self.written:
                self._sets.wrote(self._task)
        return Recalibration(
            layers=tuple(self.written),
            before=before,
            after=after,
            num_batches=counts.batches,
            num_samples=counts.samples,
            skipped_batches=counts.skipped,
            standard_error=gathered.standard_error(),
            ended_early=counts.ended_early,
            nonfinite={name: count for name, count in nonfinite.items() if count},
            unreached=tuple(name for name in names if not uses[name] and not nonfinite[name] and not empty[name]),
            empty=tuple(name for name in names if empty[name] and not uses[name] and not nonfinite[name]),
            unheld=self._unheld,
            uses_apart=gathered.uses_apart(),
            **shared,
        )

    def _in_place(self) -> AbstractContextManager[None]:
        """Inside, the statistics that are meant lie in the layers."""
        return nullcontext() if self._sets is None or self._task is None else self._sets.at_rest(self._task)

    def why_nothing(self) -> str:
        """Return why no layer is written, and the way out."""
        if self._unheld:
            return f"nothing was changed: {unheld_in_words(self._unheld)}"
        gathered, batches = self._gathered, self.counts.batches
        nothing = f"no statistics could be collected from {counted(batches, 'batch', 'batches')}"
        bad = [name for name, count in gathered.by_layer(gathered.nonfinite).items() if count]
        if bad:
            return (
                f"{nothing}: the input of {quoted(bad)} had no finite mean and variance in any batch. Nothing was "
                "changed; look for inf or NaN in the data or the weights."
            )
        empty = [name for name, count in gathered.by_layer(gathered.empty).items() if count]
        if empty:
            return (
                f"{nothing}: all inputs of {quoted(empty)} were empty. Nothing was changed; use batches that have "
                "samples."
            )
        return (
            f"the forward reached none of {counted(len(gathered.layout), 'selected BatchNorm layer')} in "
            f"{counted(batches, 'batch', 'batches')}: {quoted(gathered.layout.names)}. Nothing was changed; pass a "
            "forward= that runs them."
        )


def without_layers(counts: Counts, *, tasks: Mapping[str, Recalibration], **shared: Any) -> Recalibration:
    """Return what was done where all layers have statistics per task."""
    nothing = snapshot_of({})
    return Recalibration(
        layers=(),
        before=nothing,
        after=nothing,
        num_batches=counts.batches,
        num_samples=counts.samples,
        skipped_batches=counts.skipped,
        standard_error=max((one.standard_error for one in tasks.values() if one.layers), default=math.inf),
        ended_early=0,
        nonfinite={},
        unreached=(),
        empty=(),
        unheld={},
        uses_apart={},
        tasks=dict(tasks),
        **shared,
    )
