"""Which layers have which fault, by thresholds on what was measured."""

from __future__ import annotations

import math
from collections.abc import Container

import torch
from torch import Tensor

from lightning_bn.functional.monitoring.finding_in_words import OF_COUNTERS, MonitorFinding, MonitorFindingKind, told_of
from lightning_bn.functional.monitoring.measure import Evidence

JUDGED_BY_BATCHES: tuple[MonitorFindingKind, ...] = ("lagging", "alternating", "ranks differ", "small batches")
"""What cannot be told of a layer that is warming up."""
LAGGING = 0.75
"""Mean distance of a batch's mean from the moving average, in standard deviations, that says it lags."""
ALTERNATING = 0.7
"""Deviation of batch means around that, in standard deviations, beyond what batches of their size have by chance."""
RANKS_DIFFER = 0.5
"""Mean distance of a rank's batches from those of all ranks, in standard deviations."""
EXPLODING = 100.0
"""Geometric mean over a layer's channels of variance over that of the reference."""
FEW_SAMPLES = 4
"""In the batch of one of several processes, up to which normalizing together is worth saying."""
SMALL_BATCHES = 0.3
"""Deviation of the means of such batches, in standard deviations."""
TWICE = 1.5
"""Updates per batch that are more than one use."""
APART = 0.7
"""Distance of the means of two uses of a layer in one batch, in standard deviations, beyond chance."""
FEWEST_BATCHES = 8
"""That a judgment on batches rests on."""


def diagnose(evidence: Evidence, told: Container[tuple[str, ...]] = ()) -> list[MonitorFinding]:
    """Return every fault; empty for a healthy model.

    Args:
        evidence: What was measured.
        told: Layers and kinds that were said before, with the task where it was one's: those of the counters are not
            said again.
    """
    t = evidence.table
    frozen = torch.tensor([bool(one) for one in evidence.frozen_by], device="cpu")
    moves = frozen & ((t.updates > 0) | (t.changed > 0))
    stalled = evidence.training & ~frozen & (evidence.idle >= FEWEST_BATCHES)
    found: dict[MonitorFindingKind, Tensor] = {
        "not finite": t.nonfinite_anywhere > 0,
        "collapsed": t.newly_collapsed > 0,
        "exploding": (t.explosion > EXPLODING) & (t.nonfinite == 0),
        "frozen but moves": moves,
        "stalled": stalled,
    }
    twice = (t.updates > TWICE) & ~moves & ~stalled
    apart = t.apart > APART + chance(evidence.samples) / max(evidence.judged, 1) ** 0.5
    # One cause: where some uses differ, layers behind them are used as often.
    found["shared" if any((twice & apart).tolist()) else "updated twice"] = twice
    if evidence.judged >= FEWEST_BATCHES:
        found |= _of_batches(evidence)
    findings = []
    for kind, where in found.items():
        layers = where.nonzero().flatten().tolist()
        if kind in OF_COUNTERS:
            same = ("shared", "updated twice") if kind in ("shared", "updated twice") else (kind,)
            names, task = evidence.names, evidence.task
            layers = [i for i in layers if not any(told_of(names[i], one, task) in told for one in same)]
        if kind == "shared":
            layers.sort(key=lambda index: -float(t.apart[index]))
        if layers:
            findings.append(MonitorFinding.of(evidence, kind, layers))
    return findings


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


def _of_batches(evidence: Evidence) -> dict[MonitorFindingKind, Tensor]:
    t, noise = evidence.table, chance(evidence.samples)
    # Large updates scatter the means of batches as well, and leave the moving average behind all of them.
    alternating = (t.scatter > ALTERNATING + noise) & (t.scatter > 2 * t.bias)
    lagging = (t.bias > LAGGING) & ~alternating
    found: dict[MonitorFindingKind, Tensor] = {
        "ranks differ": t.gap > RANKS_DIFFER + noise / evidence.judged**0.5,
        "alternating": alternating,
        "lagging": lagging,
    }
    few = evidence.processes > 1 and evidence.samples is not None and evidence.samples <= FEW_SAMPLES
    if few and not (alternating | lagging).any():
        found["small batches"] = (t.scatter > SMALL_BATCHES) & ~evidence.synchronized
    return found
