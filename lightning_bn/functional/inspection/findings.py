"""What is wrong with the BatchNorm layers of a file, each in one sentence, with what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_bn.functional._text import counted
from lightning_bn.functional.inspection.entries import Role
from lightning_bn.functional.inspection.layer_facts import LayerFacts
from lightning_bn.functional.statistics.opened_files import shown

FileFault: TypeAlias = Literal[
    "not finite", "negative variance", "zeros", "never updated", "unmoved", "collapsed", "exploding", "broken"
]
"""What makes a file unhealthy."""
FileNote: TypeAlias = Literal["dead channels", "warming up", "counters", "weights near zero", "averages", "other kind"]
"""What may be meant so."""

RECALIBRATE = (
    "Recalibrate: lightning-bn recalibrate --config train.yaml --ckpt_path in.ckpt --out out.ckpt, or in Python "
    "recalibrate_checkpoint"
)
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
        remedy: One sentence: what to do.
    """

    kind: FileFault | FileNote
    is_fault: bool
    entry: str
    layers: tuple[str, ...]
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}"


@dataclass(frozen=True)
class _Rule:
    kind: FileFault | FileNote
    is_fault: bool
    applies: Callable[[LayerFacts], bool]
    what: str
    remedy: str
    count: str = ""


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
        f"If training goes on with finite losses, the weights are well. {RECALIBRATE}.",
        "nonfinite",
    ),
    _Rule(
        "negative variance",
        True,
        lambda one: one.negative > 0,
        "The variance is negative in {where}: no data has that, and evaluation puts out NaN there. It was computed as "
        "E[x^2] - E[x]^2, or by an average with negative weights.",
        f"{RECALIBRATE}.",
        "negative",
    ),
    _Rule(
        "zeros",
        True,
        lambda one: one.is_zero,
        "Mean and variance are 0 in all channels of {where}: a recalibration or an average that saw no batch wrote "
        "them, and evaluation multiplies by 316 there.",
        f"{RECALIBRATE}.",
    ),
    _Rule(
        "never updated",
        True,
        lambda one: one.is_initial and not one.updates,
        "Running statistics are the initial ones, mean 0 and variance 1, in {where}: no batch was ever seen in train "
        "mode, and evaluation does not normalize.",
        f"If these layers belong to the trained model, they were left out when weights were loaded, or were in eval "
        f"mode all the time. {RECALIBRATE}.",
    ),
    _Rule(
        "unmoved",
        True,
        lambda one: one.is_initial and bool(one.updates),
        "Running statistics are the initial ones, mean 0 and variance 1, in {where}, although updates were counted: "
        "something reset them, as stochastic weight averaging does, or momentum is 0.",
        f"{RECALIBRATE}.",
    ),
    _Rule(
        "exploding",
        True,
        lambda one: one.exploding > 0,
        "Values explode in {where}: they outgrow float16 (65,504), or spread 1,000 times as wide as the layer's other "
        "channels.",
        "Look at the learning rate, at the inputs' scale and at what comes before the layer.",
        "exploding",
    ),
    _Rule(
        "collapsed",
        True,
        lambda one: _is_collapsed(one) and not one.is_zero,
        "The variance is below 1e-5 in {where}: half of those layers or more is dead, and puts out its bias or "
        "magnified noise.",
        "Look at what feeds them: weights that died, a constant input, a ReLU that is never on.",
        "collapsed",
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
        "statistics is still the initial mean 0 and variance 1. After a recalibration, which counts batches anew, that "
        "is well.",
        f"Train longer, or else: {RECALIBRATE[0].lower()}{RECALIBRATE[1:]}.",
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


def findings_of(entry: str, layers: Sequence[LayerFacts], role: Role) -> list[FileFinding]:
    """Return what the layers of one set show by themselves, faults first.

    Args:
        entry: Its key.
        layers: What each of them says.
        role: Whose they are; counters of an average are averaged too.
    """
    found = []
    for rule in _RULES:
        hit = [one for one in layers if rule.applies(one)]
        if hit:
            what = rule.what.format(where=_where(hit, len(layers), rule.count))
            names = tuple(one.name for one in hit)
            remedy = _NO_BATCH if role == "task" and rule.kind == "never updated" else rule.remedy
            found.append(FileFinding(rule.kind, rule.is_fault, entry, names, what, remedy))
    return found + ([] if role == "averaged" else [*_counters(entry, layers)])


def listed(names: Sequence[str], most: int = _MOST_NAMED) -> str:
    """Names as a sentence has them, the first few."""
    said = ", ".join(shown(name) or "(the model itself)" for name in names[:most])
    return said if len(names) <= most else f"{said} and {len(names) - most} more"


def _where(hit: Sequence[LayerFacts], of: int, count: str) -> str:
    if count:
        said = [
            f"{getattr(one, count):,} of {one.channels:,} channels of {listed([one.name])} "
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
    yield FileFinding(
        "counters",
        False,
        entry,
        tuple(one.name for one in others),
        f"Layers were updated differently often: {counted(by_count[usual], 'layer')} {usual:,} times, {said}{more}.",
        "That is well for layers that were frozen, loaded from elsewhere, or used more than once in a forward; else "
        "they were in eval mode for a while, or part of the batches never reach them.",
    )
