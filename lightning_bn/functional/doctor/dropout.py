"""Dropout where BatchNorm suffers from it: before a layer, or inside what was meant to be frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.doctor.examination import Examination, dropouts_in
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.use import Dropout
from lightning_bn.functional.layers.patterns import is_below

SHIFTED = 1.25
"""Ratio of variances with and without dropout, from which on results suffer."""
NOTICEABLE = 1.1
"""The same, from which on it is worth saying."""


def batch_norm_after_dropout(examination: Examination) -> Iterator[Finding]:
    """Find layers whose input has another variance with dropout, in training, than without, in evaluation."""
    shifts = _shifts(examination)
    found = [name for name, (ratio, _) in shifts.items() if ratio >= NOTICEABLE]
    if not found:
        return
    worst = max(found, key=lambda name: shifts[name][0])
    ratio, dropouts = shifts[worst]
    where = quoted(sorted({dropout.module for name in found for dropout in shifts[name][1]}))
    p = max(dropout.p for dropout in dropouts)
    yield Finding(
        "batch-norm-after-dropout",
        "fault" if ratio >= SHIFTED else "advice",
        examination.in_order(found),
        f"dropout (p = {p:g}) in {where} comes before {counted(len(found), 'layer')}: with it, in training, the "
        f"variance of the input of {worst!r} is {ratio:.2f} times that without it, in evaluation.",
        "Running statistics are collected with dropout on and used with dropout off: the layer divides by a standard "
        "deviation that evaluation does not have. Li et al. (2019, arXiv 1801.05134) call it variance shift, find that "
        "it makes inference worse, and advise to put dropout after the last BatchNorm.",
        "move the dropout behind the last BatchNorm, or set p=0 there; as a first aid: recalibrate(model, loader, "
        "containers_in_eval=True)  # with dropout off",
    )


def dropout_in_frozen_container(examination: Examination) -> Iterator[Finding]:
    """Find containers that apply dropout by their own flag, though all that lies in them was put into eval mode."""
    if examination.traces is None or not examination.in_training:
        return
    applied = {dropout.module: dropout for dropout in dropouts_in(examination.traces)}
    modules = dict(examination.model.named_modules())
    for name, module in modules.items():
        layers = [layer for layer in examination.layers if name and is_below(layer, name)]
        inside = [child for child in module.modules() if child is not module]
        if (
            module.training
            and layers
            and not any(child.training for child in inside)
            and name in applied
            and not isinstance(module, nn.Sequential)
        ):
            yield Finding(
                "dropout-in-frozen-container",
                "fault",
                examination.in_order(layers),
                f"everything in {name!r} is in eval mode but {name!r} itself is in train mode, and it applies "
                f"{applied[name].kind} (p = {applied[name].p:g}) by its own flag.",
                "What was meant to be frozen puts out something else each time: statistics are kept, but of inputs "
                "without the noise that training adds.",
                f"model.get_submodule({name!r}).eval()",
            )


def _shifts(examination: Examination) -> dict[str, tuple[float, frozenset[Dropout]]]:
    """Of each layer that dropout comes before, the ratio of variances, at least 1, and what was applied."""
    traces = examination.traces
    if traces is None or not traces.again or len(traces.again) != len(traces.without_dropout):
        return {}
    found = {}
    for name in examination.tracking_layers():
        first = traces.batches[0].uses.get(name, ())
        dropouts = frozenset().union(*(use.dropouts for use in first))
        if not dropouts or not all(use.training for use in first):
            continue
        ratios = []
        for index in range(len(first)):
            pairs = [
                (on.uses[name][index].var, off.uses[name][index].var)
                for on, off in zip(traces.again, traces.without_dropout, strict=True)
                if len(on.uses.get(name, ())) == len(off.uses.get(name, ())) == len(first)
            ]
            if not pairs:
                continue
            with_it, without = (torch.stack(side).mean(0) for side in zip(*pairs, strict=True))
            alive = (without > 0) & (with_it > 0)
            if alive.any():
                ratios.append(float((with_it[alive] / without[alive]).log().mean().exp()))
        if ratios:
            shift = max(ratios, key=lambda ratio: abs(math.log(ratio)))
            found[name] = (max(shift, 1 / shift), dropouts)
    return found
