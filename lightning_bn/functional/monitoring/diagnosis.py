"""What is the matter with which layer, in one sentence with the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_bn.functional._text import counted

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
    "small batches",
]

JUDGED_BY_BATCHES: tuple[Disease, ...] = ("lagging", "alternating", "ranks differ", "small batches")
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
FEW_SAMPLES = 4
"""In the batch of one of several processes, up to which normalizing together is worth saying."""
SMALL_BATCHES = 0.3
"""Deviation of the means of such batches, in standard deviations."""
FEWEST_BATCHES = 8
"""That a judgment on batches rests on."""


@dataclass(frozen=True)
class Diagnosis:
    """One thing that is wrong with one layer.

    Attributes:
        layer: Its name.
        disease: Which.
        sentence: What a person is told.
        layers: All that the sentence speaks of.
    """

    layer: str
    disease: Disease
    sentence: str
    layers: tuple[str, ...] = ()


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
        processes: That train together.
        synchronized: Whether a layer normalizes the batches of several of them together.
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
    processes: int
    synchronized: Sequence[bool]


def diagnose(symptoms: Symptoms, told: Container[tuple[str, str]] = ()) -> list[Diagnosis]:
    """Everything that is wrong; empty for a healthy model.

    Args:
        symptoms: What was measured.
        told: Layers and diseases that were said before: those of the counters are not said again.
    """
    of_batches = _of_batches(symptoms) if symptoms.judged >= FEWEST_BATCHES else ()
    return [*_of_values(symptoms), *_of_counters(symptoms, told), *of_batches]


def chance(samples: int | None) -> float:
    """How far means of batches lie apart by chance, in standard deviations, generously; one sample if not known."""
    return 2 / math.sqrt(samples or 1)


def most_of_one_batch(samples: int | None) -> float:
    """How far off a single batch is counted, in standard deviations.

    One wild batch leaves a moving average that the next ones are far from too: half of eight batches at this distance
    are not yet taken for two sources, all of them are.
    """
    return 1.5 * (ALTERNATING + chance(samples))


def _of_values(s: Symptoms) -> Iterator[Diagnosis]:
    bad = [i for i, count in enumerate(s.nonfinite) if count]
    if bad:
        name = s.names[bad[0]]
        channels = counted(int(s.nonfinite[bad[0]]), "channel")
        where = "" if s.nonfinite_here[bad[0]] else " on another rank"
        whose = "its input" if len(bad) == 1 else "the input of whichever the forward reaches first"
        yield Diagnosis(
            name,
            "not finite",
            f"{name}{_and_more(bad)} has {channels} whose running statistics are not finite{where}, and a moving "
            f"average never recovers from that: find the inf or NaN in {whose}, then recalibrate.",
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


def _of_counters(s: Symptoms, told: Container[tuple[str, str]]) -> Iterator[Diagnosis]:
    found: dict[Disease, list[int]] = {"frozen but moves": [], "stalled": [], "updated twice": []}
    for index, name in enumerate(s.names):
        if s.frozen_by[index] and (s.updates[index] > 0 or s.changed[index]):
            disease: Disease = "frozen but moves"
        elif s.training[index] and not s.frozen_by[index] and s.idle[index] >= FEWEST_BATCHES:
            disease = "stalled"
        elif s.updates[index] > 1.5:
            disease = "updated twice"
        else:
            continue
        if (name, disease) not in told:
            found[disease].append(index)
    for disease, layers in found.items():
        if layers:
            who = f"{s.names[layers[0]]}{_and_more(layers)}"
            sentence = _SENTENCES[disease](s, layers[0], who)
            yield Diagnosis(s.names[layers[0]], disease, sentence, tuple(s.names[index] for index in layers))


def _moves(s: Symptoms, index: int, who: str) -> str:
    how = "updated: something put it into train mode" if s.updates[index] > 0 else "written to"
    return f"{who} is frozen by {s.frozen_by[index]} but its statistics were {how}."


def _stalled(s: Symptoms, index: int, who: str) -> str:
    return (
        f"{who} is in train mode but was not updated in {s.idle[index]} batches: no forward reaches it, its tracking "
        f"was switched off or its momentum is 0; evaluation uses statistics that no longer follow."
    )


def _twice(s: Symptoms, index: int, who: str) -> str:
    return (
        f"{who} is updated {s.updates[index]:.2g} times per batch: it is used more than once in a forward, or "
        f"activation checkpointing runs it again; its moving average forgets that much faster."
    )


_SENTENCES: dict[Disease, Callable[[Symptoms, int, str], str]] = {
    "frozen but moves": _moves,
    "stalled": _stalled,
    "updated twice": _twice,
}


def _of_batches(s: Symptoms) -> Iterator[Diagnosis]:
    noise = chance(s.samples)
    differ = [i for i, gap in enumerate(s.gap) if gap > RANKS_DIFFER + noise / s.judged**0.5]
    # Large updates scatter the means of batches as well, and leave the moving average behind all of them.
    alternate = [i for i, spread in enumerate(s.spread) if spread > max(ALTERNATING + noise, 2 * s.bias[i])]
    lag = [i for i, bias in enumerate(s.bias) if bias > LAGGING and i not in alternate]
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
    few = s.processes > 1 and s.samples is not None and s.samples <= FEW_SAMPLES
    noisy = [i for i, spread in enumerate(s.spread) if few and spread > SMALL_BATCHES and not s.synchronized[i]]
    if noisy and not alternate and not lag:
        name = s.names[noisy[0]]
        together = counted((s.samples or 0) * s.processes, "sample")
        yield Diagnosis(
            name,
            "small batches",
            f"{name}{_and_more(noisy)} normalizes the {counted(s.samples or 0, 'sample')} of each rank on their own, "
            f"and means of such batches scatter by {s.spread[noisy[0]]:.1f} sigma, which is noise in every activation: "
            f"Trainer(sync_batchnorm=True) normalizes {together} together; freezing the layer helps too.",
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
    """One cause shows in many layers, of which the first registered is named: not always the first in the forward."""
    return f" (and {counted(len(layers) - 1, 'more layer')})" if len(layers) > 1 else ""
