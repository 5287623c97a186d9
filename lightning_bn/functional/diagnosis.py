"""What is the matter with which layer, in one sentence with the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_bn.functional.wording import counted

Disease: TypeAlias = Literal[
    "not finite",
    "died",
    "exploding",
    "stalled",
    "updated twice",
    "frozen but moves",
    "lagging",
    "alternating",
    "ranks differ",
]

JUDGED_BY_BATCHES: tuple[Disease, ...] = ("lagging", "alternating", "ranks differ")
"""What cannot be told of a layer whose statistics are still mostly those of construction."""
LAGGING = 0.75
"""Mean distance of a batch's mean from the moving average, in standard deviations, that says it lags."""
ALTERNATING = 0.7
"""Deviation of batch means around that, in standard deviations, beyond what batches of their size have by chance."""
RANKS_DIFFER = 0.5
"""Mean distance of a rank's batches from those of all ranks, in standard deviations."""
EXPLODING = 100.0
"""Geometric mean over a layer's channels of variance over that of the reference."""
DIED_FROM = 0.02
"""Variance over that of the reference, ``eps`` added to both, below which a channel that is dead now was alive then."""
FEWEST_BATCHES = 8
"""That a judgement on batches rests on."""


@dataclass(frozen=True)
class Diagnosis:
    """One thing that is wrong with one layer.

    Attributes:
        layer: Its name.
        disease: Which.
        sentence: What a person is told.
    """

    layer: str
    disease: Disease
    sentence: str


@dataclass(frozen=True)
class Symptoms:
    """What was measured of L layers at one sample, L numbers each.

    Attributes:
        names: Of the layers.
        training: Whether a layer is in train mode.
        frozen_by: Who froze its statistics; empty if nobody.
        nonfinite: Channels with statistics that are not finite, on the process that has most of them.
        nonfinite_here: Those of this process.
        died: Channels whose variance is below ``eps`` and was not at the reference.
        explosion: Geometric mean over the channels of variance over that of the reference.
        updates: Updates per training batch; NaN where it is not known.
        changed: Whether any value differs from the last sample's.
        idle: Training batches since the last update.
        samples: In a training batch; None if that is not known.
        judged: How many batches the next three rest on.
        bias: Mean distance of batch means from the moving average, in standard deviations.
        spread: Deviation of batch means around that.
        gap: Mean distance of this rank's batches from those of all ranks; 0 in one process.
    """

    names: Sequence[str]
    training: Sequence[bool]
    frozen_by: Sequence[str]
    nonfinite: Sequence[float]
    nonfinite_here: Sequence[float]
    died: Sequence[float]
    explosion: Sequence[float]
    updates: Sequence[float]
    changed: Sequence[bool]
    idle: Sequence[int]
    samples: int | None
    judged: int
    bias: Sequence[float]
    spread: Sequence[float]
    gap: Sequence[float]


def diagnose(symptoms: Symptoms) -> list[Diagnosis]:
    """Everything that is wrong, layer by layer; empty for a healthy model."""
    of_batches = _of_batches(symptoms) if symptoms.judged >= FEWEST_BATCHES else ()
    return [*_of_values(symptoms), *_of_counters(symptoms), *of_batches]


def _of_values(s: Symptoms) -> Iterator[Diagnosis]:
    bad = [i for i, count in enumerate(s.nonfinite) if count]
    if bad:
        name = s.names[bad[0]]
        channels = counted(int(s.nonfinite[bad[0]]), "channel")
        where = "" if s.nonfinite_here[bad[0]] else " on another rank"
        yield Diagnosis(
            name,
            "not finite",
            f"{name}{_and_more(bad)} has {channels} whose running statistics are not finite{where}, and a moving "
            f"average never recovers from that: find the inf or NaN in its input, then recalibrate.",
        )
    died = [i for i, count in enumerate(s.died) if count]
    if died:
        name = s.names[died[0]]
        yield Diagnosis(
            name,
            "died",
            f"{name}{_and_more(died)} has {counted(int(s.died[died[0]]), 'channel')} whose variance fell below eps "
            f"since the reference: its input has become constant there. Dead ReLUs before it or a weight decay that is "
            f"too strong do that; a lower learning rate or a warm-up avoids it.",
        )
    exploding = [i for i, factor in enumerate(s.explosion) if factor > EXPLODING and not s.nonfinite_here[i]]
    if exploding:
        name = s.names[exploding[0]]
        yield Diagnosis(
            name,
            "exploding",
            f"{name}{_and_more(exploding)} has running variances x{s.explosion[exploding[0]]:.2g} those of the "
            f"reference: either the inputs are on another scale (0 to 255 for 0 to 1?), or training diverges: lower "
            f"the learning rate or clip gradients.",
        )


def _of_counters(s: Symptoms) -> Iterator[Diagnosis]:
    for index, name in enumerate(s.names):
        updates = s.updates[index]
        if s.frozen_by[index] and (updates > 0 or s.changed[index]):
            how = "updated: something put it into train mode" if updates > 0 else "written to"
            yield Diagnosis(
                name,
                "frozen but moves",
                f"{name} is frozen by {s.frozen_by[index]} but its statistics were {how}.",
            )
        elif s.training[index] and not s.frozen_by[index] and s.idle[index] >= FEWEST_BATCHES:
            yield Diagnosis(
                name,
                "stalled",
                f"{name} is in train mode but was not updated in {s.idle[index]} batches: no forward reaches it, or "
                f"its tracking was switched off; evaluation uses statistics that no longer follow.",
            )
        elif updates > 1.5:
            yield Diagnosis(
                name,
                "updated twice",
                f"{name} is updated {updates:.2g} times per batch: it is used more than once in a forward, or "
                f"activation checkpointing runs it again; its moving average forgets that much faster.",
            )


def _of_batches(s: Symptoms) -> Iterator[Diagnosis]:
    chance = 2 / (s.samples or 1) ** 0.5
    differ = [i for i, gap in enumerate(s.gap) if gap > RANKS_DIFFER + chance / s.judged**0.5]
    # Large updates scatter the means of batches as well, and leave the moving average behind all of them.
    alternate = [i for i, spread in enumerate(s.spread) if spread > max(ALTERNATING + chance, 2 * s.bias[i])]
    lag = [i for i, bias in enumerate(s.bias) if bias > LAGGING and i not in alternate]
    # One cause shows in many layers: the first in the order of the forward is named.
    if differ:
        name = s.names[differ[0]]
        yield Diagnosis(
            name,
            "ranks differ",
            f"{name} sees data on one rank that is {s.gap[differ[0]]:.1f} sigma from that of all ranks, and "
            f"evaluation uses rank 0's moving average alone: shuffle the data over the ranks, use SyncBatchNorm, or "
            f"recalibrate before validation.",
        )
    if alternate:
        name = s.names[alternate[0]]
        more = _and_more(alternate)
        yield Diagnosis(
            name,
            "alternating",
            f"{name}{more} is fed by sources that alternate: means of batches differ by {s.spread[alternate[0]]:.1f} "
            f"sigma, and the moving average describes none of them. Give each source statistics of its own, or mix "
            f"them in every batch.",
        )
    if lag:
        name = s.names[lag[0]]
        more = _and_more(lag)
        yield Diagnosis(
            name,
            "lagging",
            f"{name}{more} has a moving average that lags {s.bias[lag[0]]:.1f} sigma behind its batches, so that "
            f"validation uses stale statistics: recalibrate before it (PreciseBatchNorm), or lower the learning rate.",
        )


def _and_more(layers: Sequence[int]) -> str:
    """One cause shows in many layers."""
    return f" (and {counted(len(layers) - 1, 'more layer')})" if len(layers) > 1 else ""
