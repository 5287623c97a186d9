"""What is wrong with the BatchNorm layers of a file, each in one sentence, with what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_bn.functional._text import counted
from lightning_bn.functional.inspection.entries import Role
from lightning_bn.functional.inspection.layer_facts import LayerFacts
from lightning_bn.functional.inspection.remedies import Recalibrating
from lightning_bn.functional.statistics.opened_files import shown

FileFault: TypeAlias = Literal[
    "not finite", "negative variance", "zeros", "never updated", "unmoved", "collapsed", "exploding", "broken"
]
"""What makes a file unhealthy."""
FileNote: TypeAlias = Literal[
    "dead channels", "warming up", "counters", "counters lost", "weights near zero", "averages", "other kind"
]
"""What may be meant so."""

_NO_BATCH = "Was there a batch of this task? If not, leave it out of tasks."
_WARM_BELOW = 0.01
_MOST_NAMED = 4


@dataclass(frozen=True)
class FileFinding:
    """Something about the layers of one set in a file.

    Attributes:
        kind: A fault or a note.
        is_fault: Whether it makes the file unhealthy.
        entry: Key of the set of layers in the file, as a reader writes it; empty for the file itself.
        layers: Names of the layers.
        what: One sentence: what was found, and why it matters.
        remedy: One sentence or two: what to do.
        command: Of a shell, that does it; empty where none does.
    """

    kind: FileFault | FileNote
    is_fault: bool
    entry: str
    layers: tuple[str, ...]
    what: str
    remedy: str
    command: str = ""

    def __str__(self) -> str:
        return " ".join(one for one in (self.what, self.remedy, self.command) if one)


@dataclass(frozen=True)
class _Rule:
    kind: FileFault | FileNote
    is_fault: bool
    applies: Callable[[LayerFacts], bool]
    what: str
    remedy: str
    count: str = ""
    recalibrates: bool = False


def _is_collapsed(one: LayerFacts) -> bool:
    return 2 * one.collapsed >= one.channels


_RULES = (
    _Rule(
        "not finite",
        True,
        lambda one: one.nonfinite_affine > 0,
        "A weight or bias is NaN or infinite in {where}: everything behind it is NaN, in training and in evaluation.",
        "The weights are lost: look for the batch or the learning rate that did it, and go back to a checkpoint before "
        "it.",
        "nonfinite_affine",
    ),
    _Rule(
        "not finite",
        True,
        lambda one: one.nonfinite > 0,
        "A running mean or variance is NaN or infinite in {where}: evaluation puts out NaN, and a moving average never "
        "recovers. One batch with an infinite value is enough for it.",
        "If the losses of training are finite, the weights are well: recalibrate.",
        "nonfinite",
        recalibrates=True,
    ),
    _Rule(
        "negative variance",
        True,
        lambda one: one.negative > 0,
        "The variance is negative in {where}: no data has that, and evaluation puts out NaN there. It was computed as "
        "E[x^2] - E[x]^2, or by an average with negative weights.",
        "Recalibrate.",
        "negative",
        recalibrates=True,
    ),
    _Rule(
        "zeros",
        True,
        lambda one: one.is_zero,
        "Mean and variance are 0 in all channels of {where}: a recalibration or an average that saw no batch wrote "
        "them, and evaluation multiplies by 316 there.",
        "Recalibrate.",
        recalibrates=True,
    ),
    _Rule(
        "never updated",
        True,
        lambda one: one.is_initial and not one.updates,
        "Running statistics are the initial ones, mean 0 and variance 1, in {where}: no batch was ever seen in train "
        "mode, and evaluation does not normalize.",
        "If the trained model uses these layers, they were left out when weights were loaded, or were in eval mode all "
        "the time: recalibrate.",
        recalibrates=True,
    ),
    _Rule(
        "unmoved",
        True,
        lambda one: one.is_initial and bool(one.updates),
        "Running statistics are the initial ones, mean 0 and variance 1, in {where}, although updates were counted: "
        "something reset them, as stochastic weight averaging does, or momentum is 0.",
        "Recalibrate.",
        recalibrates=True,
    ),
    _Rule(
        "exploding",
        True,
        lambda one: one.exploding > 0,
        "Values explode in {where}: they outgrow float16 (65,504), or spread 1,000 times as wide as the layer's other "
        "channels.",
        "Recalibrate, and inspect what that wrote. If the values are still there, the network makes them: look at the "
        "learning rate, at the scale of the inputs and at what comes before the layer.",
        "exploding",
        recalibrates=True,
    ),
    _Rule(
        "collapsed",
        True,
        lambda one: _is_collapsed(one) and not one.is_zero,
        "The variance is below 1e-5 in {where}: half of a layer's channels or more put out nothing but their bias, or "
        "noise magnified.",
        "Recalibrate, and inspect what that wrote. If the variance is still there, the network makes it: look at what "
        "comes before the layer, as weights that died, a constant input or a ReLU that is never on.",
        "collapsed",
        recalibrates=True,
    ),
    _Rule(
        "dead channels",
        False,
        lambda one: one.collapsed > 0 and not _is_collapsed(one),
        "The variance is below 1e-5 in {where}: those channels are dead. Networks that were trained well have some.",
        "If there are more than in an earlier checkpoint, look at the learning rate.",
        "collapsed",
    ),
    _Rule(
        "warming up",
        False,
        lambda one: (one.initial_left or 0) >= _WARM_BELOW and not one.is_initial,
        "Fewer than 44 updates were counted in {where}: at torch's momentum of 0.1 more than 1 % of the running "
        "statistics is still the initial mean 0 and variance 1. Where the file was recalibrated and has no record of "
        "it, that is not so: counters stay as they were.",
        "More training ends it. If training is over, recalibrate.",
        recalibrates=True,
    ),
    _Rule(
        "counters lost",
        False,
        lambda one: one.lost_counter,
        "The counter of updates is 0 in {where}, and the running statistics are not the initial ones: a conversion "
        "lost the counter, or the statistics were set. Evaluation does not look at it, nor does training with a fixed "
        "momentum.",
        "Nothing is to be done, unless momentum is None: then the next update replaces the statistics by those of its "
        "batch, so set num_batches_tracked before training goes on.",
    ),
    _Rule(
        "weights near zero",
        False,
        lambda one: 2 * (one.weight_near_zero or 0) >= one.channels,
        "The affine weight of half the channels or more is near zero in {where}: they put out little but their bias.",
        "That is well where the weight began at zero, as the last BatchNorm of a residual block often does, or where "
        "channels are pruned.",
    ),
)


def findings_of(
    entry: str, layers: Sequence[LayerFacts], role: Role, way: Recalibrating, recalibrated: Collection[str] = ()
) -> list[FileFinding]:
    """Return what the layers of one set show by themselves, faults first.

    Args:
        entry: Its key.
        layers: What each of them says.
        role: Whose they are; counters of an average are averaged too.
        way: How it is recalibrated.
        recalibrated: Names of layers that were: their counters say nothing of their statistics.
    """
    found = []
    for rule in _RULES:
        hit = [one for one in layers if rule.applies(one)]
        if hit:
            what = rule.what.format(where=_where(hit, len(layers), rule.count))
            names = tuple(one.name for one in hit)
            remedy, command = rule.remedy, way.command if rule.recalibrates else ""
            if role == "task" and rule.kind == "never updated":
                remedy, command = _NO_BATCH, ""
            elif rule.recalibrates and way.instead:
                remedy = f"{remedy} {way.instead}"
            found.append(FileFinding(rule.kind, rule.is_fault, entry, names, what, remedy, command))
    told = {
        *recalibrated,
        *(name for one in found if one.kind in ("never updated", "counters lost") for name in one.layers),
    }
    counted_in = [one for one in layers if one.name not in told]
    return found + ([] if role == "averaged" else [*_counters(entry, counted_in)])


def listed(names: Sequence[str], most: int = _MOST_NAMED) -> str:
    """Names as a sentence has them, the first few."""
    said = ", ".join(shown(name) or "(the model itself)" for name in names[:most])
    return said if len(names) <= most else f"{said} and {len(names) - most} more"


def _where(hit: Sequence[LayerFacts], of: int, count: str) -> str:
    if count:
        said = [
            f"{getattr(one, count):,} of {counted(one.channels, 'channel')} of {listed([one.name])} "
            f"(first: {one.first_channels[count]})"
            for one in hit[:_MOST_NAMED]
        ]
        more = len(hit) - _MOST_NAMED
        return ", ".join(said) + (f" and {counted(more, 'more layer')}" if more > 0 else "")
    names = [one.name for one in hit]
    if len(hit) == of:
        return f"the one layer, {listed(names)}" if of == 1 else f"all {of} layers"
    return f"{len(hit)} of {of} layers ({listed(names)})"


def _counters(entry: str, layers: Sequence[LayerFacts]) -> Iterator[FileFinding]:
    """Where some layers were updated more often than others."""
    by_count = Counter(one.updates for one in layers if one.updates is not None)
    if len(by_count) < 2:
        return
    usual = by_count.most_common(1)[0][0]
    others = sorted((one for one in layers if one.updates not in (None, usual)), key=lambda one: one.updates or 0)
    said = ", ".join(f"{listed([one.name])} {one.updates:,}" for one in others[:_MOST_NAMED])
    more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    most = f"{counted(by_count[usual], 'layer')} {counted(usual, 'time')}"
    yield FileFinding(
        "counters",
        False,
        entry,
        tuple(one.name for one in others),
        f"Layers were updated differently often: {most}, {said}{more}.",
        "That is well for layers that were frozen, loaded from elsewhere, or used more than once in a forward; else "
        "they were in eval mode for a while, or part of the batches never reach them.",
    )
