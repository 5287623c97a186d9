"""What may be wrong with a BatchNorm layer of a file: when it is, why it matters, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_bn.functional.inspection.layer_facts import LayerFacts

FileFault: TypeAlias = Literal[
    "not finite", "negative variance", "zeros", "never updated", "unmoved", "collapsed", "exploding", "broken"
]
"""What makes a file unhealthy."""
FileNote: TypeAlias = Literal[
    "dead channels",
    "out of scale",
    "warming up",
    "counters",
    "counters lost",
    "weights near zero",
    "averages",
    "other kind",
]
"""What may be meant so."""

_WARM_BELOW = 0.01


@dataclass(frozen=True)
class Rule:
    """What is looked for in every layer.

    Attributes:
        kind: Of the finding.
        is_fault: Whether it makes the file unhealthy.
        applies: Whether a layer has it.
        what: One sentence, with a place for the layers.
        remedy: What to do.
        count: The attribute of the layer that counts its channels; empty where it is of the whole layer.
        recalibrates: Whether a recalibration may mend it.
    """

    kind: FileFault | FileNote
    is_fault: bool
    applies: Callable[[LayerFacts], bool]
    what: str
    remedy: str
    count: str = ""
    recalibrates: bool = False


def _is_collapsed(one: LayerFacts) -> bool:
    return 2 * one.collapsed >= one.channels


RULES = (
    Rule(
        "not finite",
        True,
        lambda one: one.nonfinite_affine > 0,
        "A weight or bias is NaN or infinite in {where}: everything behind it is NaN, in training and in evaluation.",
        "The weights cannot be saved: go back to an earlier checkpoint, and look for the batch or the learning rate "
        "that caused it.",
        "nonfinite_affine",
    ),
    Rule(
        "not finite",
        True,
        lambda one: one.nonfinite > 0,
        "A running mean or variance is NaN or infinite in {where}: evaluation outputs NaN, and a moving average never "
        "recovers. One batch with an infinite value is enough for it.",
        "If the losses of training are finite, only the statistics are broken: recalibrate.",
        "nonfinite",
        recalibrates=True,
    ),
    Rule(
        "negative variance",
        True,
        lambda one: one.negative > 0,
        "The variance is negative in {where}: no data has that, and evaluation outputs NaN there. It was computed as "
        "E[x^2] - E[x]^2, or by an average with negative weights.",
        "Recalibrate.",
        "negative",
        recalibrates=True,
    ),
    Rule(
        "zeros",
        True,
        lambda one: one.is_zero,
        "Mean and variance are 0 in all channels of {where}: a recalibration or an average that saw no batch wrote "
        "them, and evaluation multiplies by 316 there.",
        "Recalibrate.",
        recalibrates=True,
    ),
    Rule(
        "never updated",
        True,
        lambda one: one.is_initial and not one.updates,
        "Running statistics are the initial ones, mean 0 and variance 1, in {where}: no batch was ever seen in train "
        "mode, and evaluation does not normalize.",
        "If the trained model uses these layers, they were left out when weights were loaded, or were in eval mode all "
        "the time: recalibrate.",
        recalibrates=True,
    ),
    Rule(
        "unmoved",
        True,
        lambda one: one.is_initial and bool(one.updates),
        "Running statistics are the initial ones, mean 0 and variance 1, in {where}, although updates were counted: "
        "something reset them, as stochastic weight averaging does, or momentum is 0.",
        "Recalibrate.",
        recalibrates=True,
    ),
    Rule(
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
    Rule(
        "collapsed",
        True,
        lambda one: _is_collapsed(one) and not one.is_zero,
        "The variance is below 1e-5 in {where}: at least half of the layer's channels output nothing but their "
        "bias, or magnified noise.",
        "Recalibrate, and inspect what that wrote. If the variance is still there, the network makes it: look at what "
        "comes before the layer, as weights that died, a constant input or a ReLU that is never on.",
        "collapsed",
        recalibrates=True,
    ),
    Rule(
        "dead channels",
        False,
        lambda one: one.collapsed > 0 and not _is_collapsed(one),
        "The variance is below 1e-5 in {where}: those channels are dead. Networks that were trained well have some.",
        "If there are more than in an earlier checkpoint, look at the learning rate.",
        "collapsed",
    ),
    Rule(
        "warming up",
        False,
        lambda one: (one.initial_left or 0) >= _WARM_BELOW and not one.is_initial,
        "Fewer than 44 updates were counted in {where}: at torch's momentum of 0.1 more than 1 % of the running "
        "statistics is still the initial mean 0 and variance 1. Where the file was recalibrated and has no record of "
        "it, that is not so: counters stay as they were.",
        "More training ends it, but not in layers that are frozen. If training is over, recalibrate.",
        recalibrates=True,
    ),
    Rule(
        "counters lost",
        False,
        lambda one: one.lost_counter,
        "The counter of updates is 0 in {where}, and the running statistics are not the initial ones: a conversion "
        "lost the counter, or the statistics were set. Evaluation does not look at it, nor does training with a fixed "
        "momentum.",
        "Nothing is to be done, unless momentum is None: then the next update replaces the statistics by those of its "
        "batch, so set num_batches_tracked before training goes on.",
    ),
    Rule(
        "weights near zero",
        False,
        lambda one: 2 * (one.weight_near_zero or 0) >= one.channels,
        "The affine weight of at least half the channels is near zero in {where}: they output little but their bias.",
        "That is normal where the weight began at zero, as the last BatchNorm of a residual block often does, or where "
        "channels are pruned.",
    ),
)
