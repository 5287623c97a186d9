"""Which layers have which fault, by thresholds on what was measured."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable

from lightning_bn.functional.monitoring.evidence import Evidence
from lightning_bn.functional.monitoring.finding_in_words import Finding, FindingKind

JUDGED_BY_BATCHES: tuple[FindingKind, ...] = ("lagging", "alternating", "ranks differ", "small batches")
"""What cannot be told of a layer that is warming up."""
LAGGING = 0.75
"""Mean distance of a batch's mean from the moving average, in standard deviations, that says it lags."""
ALTERNATING = 0.7
"""Deviation of batch means around that, in standard deviations, beyond what batches of their size have by chance."""
RANKS_DIFFER = 0.5
"""Mean distance of a rank's batches from those of all ranks, in standard deviations."""
EXPLODING = 100.0
"""Geometric mean over a layer's channels of variance over that of the reference."""
COLLAPSED_BELOW = 0.02
"""Variance over that of the reference, ``eps`` added to both, that a channel has to fall below to have collapsed."""
FEW_SAMPLES = 4
"""In the batch of one of several processes, up to which normalizing together is worth saying."""
SMALL_BATCHES = 0.3
"""Deviation of the means of such batches, in standard deviations."""
FEWEST_BATCHES = 8
"""That a judgment on batches rests on."""


def diagnose(evidence: Evidence, told: Container[tuple[str, str]] = ()) -> list[Finding]:
    """Return every fault; empty for a healthy model.

    Args:
        evidence: What was measured.
        told: Layers and kinds that were said before: those of the counters are not said again.
    """
    found = {**_of_values(evidence), **_of_counters(evidence, told)}
    if evidence.judged >= FEWEST_BATCHES:
        found |= _of_batches(evidence)
    return [Finding.of(evidence, kind, layers) for kind, layers in found.items() if layers]


def chance(samples: int | None) -> float:
    """Return how far means of batches lie apart by chance, in standard deviations, generously.

    Args:
        samples: In a batch; one if that is not known.
    """
    return 2 / math.sqrt(samples or 1)


def most_of_one_batch(samples: int | None) -> float:
    """Return how far off a single batch is counted, in standard deviations.

    One wild batch leaves a moving average that the next ones are far from too: half of eight batches at this distance
    are not yet taken for two sources, all of them are.
    """
    return 1.5 * (ALTERNATING + chance(samples))


def _of_values(e: Evidence) -> dict[FindingKind, list[int]]:
    explode = (factor > EXPLODING and not e.nonfinite_here[i] for i, factor in enumerate(e.explosion))
    return {"not finite": _where(e.nonfinite), "collapsed": _where(e.collapsed), "exploding": _where(explode)}


def _of_counters(e: Evidence, told: Container[tuple[str, str]]) -> dict[FindingKind, list[int]]:
    found: dict[FindingKind, list[int]] = {"frozen but moves": [], "stalled": [], "updated twice": []}
    for index, name in enumerate(e.names):
        if e.frozen_by[index] and (e.updates[index] > 0 or e.changed[index]):
            kind: FindingKind = "frozen but moves"
        elif e.training[index] and not e.frozen_by[index] and e.idle[index] >= FEWEST_BATCHES:
            kind = "stalled"
        elif e.updates[index] > 1.5:
            kind = "updated twice"
        else:
            continue
        if (name, kind) not in told:
            found[kind].append(index)
    return found


def _of_batches(e: Evidence) -> dict[FindingKind, list[int]]:
    noise = chance(e.samples)
    # Large updates scatter the means of batches as well, and leave the moving average behind all of them.
    scattered = (scatter > max(ALTERNATING + noise, 2 * e.bias[i]) for i, scatter in enumerate(e.scatter))
    alternating = _where(scattered)
    lagging = _where(bias > LAGGING and i not in alternating for i, bias in enumerate(e.bias))
    few = e.processes > 1 and e.samples is not None and e.samples <= FEW_SAMPLES and not alternating and not lagging
    noisy = (few and scatter > SMALL_BATCHES and not e.synchronized[i] for i, scatter in enumerate(e.scatter))
    return {
        "ranks differ": _where(gap > RANKS_DIFFER + noise / e.judged**0.5 for gap in e.gap),
        "alternating": alternating,
        "small batches": _where(noisy),
        "lagging": lagging,
    }


def _where(flags: Iterable[float]) -> list[int]:
    return [index for index, flag in enumerate(flags) if flag]
