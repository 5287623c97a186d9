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
        "{who} has {bad} whose running statistics are not finite{where}, and a moving average never recovers "
        "from that: find the inf or NaN in {whose}{limit}, then recalibrate."
    ),
    "collapsed": (
        "{who} has {dead} whose variance fell below eps since the reference: its input has become constant "
        "there. Dead ReLUs before it or a weight decay that is too strong do that; a lower learning rate or a warm-up "
        "avoids it."
    ),
    "exploding": (
        "{who} has running variances x{explosion:.2g} those of the reference: either the inputs are on another scale "
        "(0 to 255 for 0 to 1?), or training diverges: lower the learning rate or clip gradients."
    ),
    "frozen but moves": "{who} is frozen by {frozen_by} but its statistics were {how}.",
    "stalled": (
        "{who} is in train mode but was not updated in {idle} batches: no forward reaches it (was it replaced or taken "
        "out of the model?), its tracking was switched off or its momentum is 0; evaluation uses statistics that no "
        "longer follow."
    ),
    "updated twice": (
        "{who} is updated {updates:.2g} times per batch: it is used more than once in a forward, or activation "
        "checkpointing runs it again; its moving average forgets that much faster. A forward that is not meant to "
        "count goes inside lightning_bn.functional.without_updates."
    ),
    "shared": (
        "{who} is used {updates:.2g} times per step by inputs whose means lie {apart:.1f} sigma apart: two tasks or "
        "views share it, and one set of statistics describes neither. Give each its own "
        "(lightning_bn.functional.task_statistics)."
    ),
    "ranks differ": (
        "{name} sees data on one rank that is {gap:.1f} sigma from that of all ranks, and evaluation uses rank 0's "
        "moving average alone: shuffle the data over the ranks, use SyncBatchNorm, or recalibrate before validation."
    ),
    "alternating": (
        "{who} is fed by sources that alternate: means of batches differ by {scatter:.1f} sigma, and the moving "
        "average describes none of them. Give each source statistics of its own, as tasks of "
        "TaskBatchNorm(modules=[{paths}]), or mix them in every batch."
    ),
    "small batches": (
        "{who} normalizes the {samples} of each rank on their own, and means of such batches scatter by {scatter:.1f} "
        "sigma, which is noise in every activation: Trainer(sync_batchnorm=True) normalizes {together} together; "
        "freezing the layer helps too."
    ),
    "lagging": (
        "{who} has a moving average that lags {bias:.1f} sigma behind its batches, so that validation uses stale "
        "statistics: recalibrate before it (PreciseBatchNorm), or lower the learning rate."
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
            whose="its input" if len(layers) == 1 else "the input of whichever the forward reaches first",
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
