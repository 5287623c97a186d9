"""One fault of one layer, and the sentence with the remedy that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_bn.functional._text import counted
from lightning_bn.functional.layers.patterns import shortest_paths
from lightning_bn.functional.monitoring.measure import Evidence

MonitorFindingKind: TypeAlias = Literal[
    "not finite",
    "collapsed",
    "exploding",
    "frozen but moves",
    "stalled",
    "updated twice",
    "shared",
    "ranks differ",
    "alternating",
    "small batches",
    "lagging",
]

OF_COUNTERS: tuple[MonitorFindingKind, ...] = ("frozen but moves", "stalled", "updated twice", "shared")
"""Of which every layer is said once, not only the first."""
_LIMITS = {"torch.float16": ", or a variance above 65,504, where float16 ends (keep BatchNorm in float32)"}
_SENTENCES: dict[MonitorFindingKind, str] = {
    "not finite": (
        "{who} has {bad} whose running statistics are not finite{where}, and a moving average never becomes "
        "finite again: find the inf or NaN in {whose}{limit}, then recalibrate."
    ),
    "collapsed": (
        "{who} has {dead} whose variance fell below eps since the reference: its input has become constant "
        "there. The cause may be dead ReLUs before it, or too strong a weight decay; a lower learning rate or a "
        "warm-up avoids it."
    ),
    "exploding": (
        "{who} has running variances {explosion:.3g} times those of the reference. Either the inputs have "
        "another scale (0 to 255 instead of 0 to 1?), or training diverges: then lower the learning rate or clip "
        "gradients."
    ),
    "frozen but moves": "{who} is frozen by {frozen_by}, but its statistics were {how}.",
    "stalled": (
        "{who} is in train mode but was not updated in {idle} batches: no forward reaches it (was it replaced or "
        "taken out of the model?), its track_running_stats was switched off, or its momentum is 0. Evaluation uses "
        "its old statistics."
    ),
    "updated twice": (
        "{who} is updated {updates:.2g} times per batch: it is used more than once in a forward, or activation "
        "checkpointing runs it again, and its moving average forgets faster by that factor. Put forwards that should "
        "not update it inside lightning_bn.functional.without_updates."
    ),
    "shared": (
        "{who} is used {updates:.2g} times per step with inputs whose means lie {apart:.1f} sigma apart: two "
        "tasks or views share it, and one set of statistics fits neither. Give each its own "
        "(lightning_bn.functional.task_statistics)."
    ),
    "ranks differ": (
        "{name} gets data on one rank whose mean is {gap:.1f} sigma from that of all ranks, and evaluation uses "
        "only the moving average of rank 0: shuffle the data over the ranks, use SyncBatchNorm, or recalibrate "
        "before validation."
    ),
    "alternating": (
        "{who} gets its batches from sources that alternate: means of batches differ by {scatter:.1f} sigma, and "
        "the moving average fits none of the sources. Give each source statistics of its own, as tasks of "
        "TaskBatchNorm(modules=[{paths}]), or mix them in every batch."
    ),
    "small batches": (
        "{who} normalizes the {samples} of each rank separately, and means of such small batches vary by "
        "{scatter:.1f} sigma, which adds noise to every activation. Trainer(sync_batchnorm=True) normalizes "
        "{together} together; freezing the layer helps too."
    ),
    "lagging": (
        "{who} has a moving average that lags {bias:.1f} sigma behind its batches, so that validation uses old "
        "statistics: recalibrate before validation (PreciseBatchNorm), or lower the learning rate."
    ),
}


@dataclass(frozen=True)
class MonitorFinding:
    """One fault of one layer.

    Attributes:
        layer: Its name.
        kind: Of the fault.
        sentence: What a person is told.
        layers: All for which that counts as said.
        task: Whose statistics have it; None for the layers' own.
    """

    layer: str
    kind: MonitorFindingKind
    sentence: str
    layers: tuple[str, ...]
    task: str | None = None

    @property
    def told(self) -> frozenset[tuple[str, ...]]:
        """What is said with it."""
        return frozenset(told_of(layer, self.kind, self.task) for layer in self.layers)

    @classmethod
    def of(cls, evidence: Evidence, kind: MonitorFindingKind, layers: Sequence[int]) -> MonitorFinding:
        """Return the finding that some layers, given by their positions, have a fault.

        One cause shows in many layers, of which the first registered is named: not always the first in the forward.
        """
        first, samples = layers[0], evidence.samples or 0
        name, measured = evidence.names[first], evidence.table.row(first)
        shown = name or "(the model itself)"
        more = f" (and {counted(len(layers) - 1, 'more layer')})" if len(layers) > 1 else ""
        paths = shortest_paths([evidence.names[index] for index in layers], {*evidence.names, *evidence.others})
        sentence = _SENTENCES[kind].format(
            **measured,
            name=shown,
            who=shown + more + ("" if evidence.task is None else f" with the statistics of task {evidence.task!r}"),
            paths=", ".join(map(repr, paths)),
            bad=counted(int(measured["nonfinite_anywhere"]), "channel"),
            limit=_LIMITS.get(evidence.dtypes[first], ""),
            where="" if measured["nonfinite"] else " on another rank",
            whose="its input" if len(layers) == 1 else "the input of the one that runs first in the forward",
            dead=counted(int(measured["newly_collapsed"]), "channel"),
            frozen_by=", ".join(evidence.frozen_by[first]),
            how="updated: something put it into train mode" if measured["updates"] > 0 else "written to",
            idle=int(evidence.idle[first]),
            samples=counted(samples, "sample"),
            together=counted(samples * evidence.processes, "sample"),
        )
        named = tuple(evidence.names[index] for index in layers) if kind in OF_COUNTERS else (name,)
        return cls(name, kind, sentence, named, evidence.task)


def told_of(layer: str, kind: str, task: str | None) -> tuple[str, ...]:
    """How it is written down that a fault was said."""
    return (layer, kind) if task is None else (layer, kind, task)
