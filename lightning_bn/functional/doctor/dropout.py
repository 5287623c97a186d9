"""Dropout where BatchNorm suffers from it: before a layer, or inside what was meant to be frozen."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.finding import Finding, Severity
from lightning_bn.functional.doctor.remedies import lines
from lightning_bn.functional.doctor.traces import Dropout, Trace
from lightning_bn.functional.layers.names import named_paths
from lightning_bn.functional.layers.patterns import is_below

SHIFTED = 1.25
"""Ratio of variances with and without dropout, from which on results suffer."""
NOTICEABLE = 1.1
"""The same, from which on it is worth saying."""


def batch_norm_after_dropout(examination: Examination) -> Iterator[Finding]:
    """Find layers whose input has another variance with dropout, in training, than without, in evaluation."""
    shifts = _shifts(examination)
    noticed = [name for name, shift in shifts.items() if shift.ratio >= NOTICEABLE]
    direct = [name for name in noticed if shifts[name].direct and shifts[name].ratio >= SHIFTED]
    if direct:
        yield _after_dropout(examination, shifts, direct, "fault")
    if len(direct) < len(noticed):
        yield _after_dropout(examination, shifts, [name for name in noticed if name not in direct], "advice")


def _after_dropout(
    examination: Examination, shifts: Mapping[str, _Shift], names: Collection[str], severity: Severity
) -> Finding:
    worst = max(names, key=lambda name: shifts[name].ratio)
    where = quoted(sorted({dropout.module for name in names for dropout in shifts[name].dropouts}))
    p = max(dropout.p for dropout in shifts[worst].dropouts)
    how = "right before" if severity == "fault" else "before"
    return Finding(
        "batch-norm-after-dropout",
        severity,
        examination.in_order(names),
        f"dropout (p = {p:g}) in {where} comes {how} {counted(len(names), 'layer')}: the variance of the input of "
        f"{worst!r} differs by a factor of {shifts[worst].ratio:.2f} with it, in training, and without it, in "
        f"evaluation.",
        "Running statistics are collected with dropout on and used with dropout off: the layer divides by a standard "
        "deviation that evaluation does not have. Li et al. (2019, arXiv 1801.05134) call it variance shift, find that "
        "it makes inference worse, and advise to put dropout after the last BatchNorm.",
        lines(
            "# move the dropout behind the last BatchNorm, or take it out;",
            "# as a first aid, statistics without it:",
            "recalibrate(model, loader, containers_in_eval=True)",
        ),
    )


def dropout_in_frozen_container(examination: Examination) -> Iterator[Finding]:
    """Find containers that apply dropout by their own flag, though all that lies in them was put into eval mode."""
    if examination.traces is None or not examination.in_training:
        return
    modules = {name: module for name, module in named_paths(examination.model) if name}
    found: dict[str, Dropout] = {}
    layers: set[str] = set()
    for dropout in examination.traces.dropouts:
        name, module = dropout.module, modules.get(dropout.module)
        inside = [] if module is None else [child for child in module.modules() if child is not module]
        frozen = _frozen_around(examination, name) if inside else []
        if module is not None and module.training and frozen and not any(child.training for child in inside):
            found[name] = dropout
            layers.update(frozen)
    if found:
        name, dropout = next(iter(found.items()))
        yield Finding(
            "dropout-in-frozen-container",
            "fault",
            examination.in_order(layers),
            f"{dropout.kind} (p = {dropout.p:g}) is applied by {quoted([*found])} by its own flag, which is train "
            f"mode, though everything in it is in eval mode.",
            "What was meant to be frozen gives another output each time, which the statistics that are kept do not "
            "describe.",
            lines(
                "# puts the module itself into eval mode, with all in it:",
                f"for name in {[*found]!r}:",
                "    model.get_submodule(name).eval()",
            ),
        )


def _frozen_around(examination: Examination, name: str) -> list[str]:
    """The layers in a module, or else in the smallest one around it that has any, if all of them are frozen."""
    while name:
        layers = [layer for layer in examination.layers if is_below(layer, name)]
        if layers:
            return layers if all(map(examination.is_frozen, layers)) else []
        name = name.rpartition(".")[0]
    return []


@dataclass(frozen=True)
class _Shift:
    """By which factor, at least 1, dropout changes the variance of a layer's input, and whether it is right before."""

    ratio: float
    dropouts: frozenset[Dropout]
    direct: bool


def _shifts(examination: Examination) -> dict[str, _Shift]:
    """Of each layer that dropout comes before, the shift of the use that has the largest."""
    traces = examination.traces
    if traces is None or not traces.again:
        return {}
    found: dict[str, _Shift] = {}
    for name in examination.tracking_layers():
        first = traces.batches[0].uses.get(name, ())
        for index, use in enumerate(first):
            noisy = use.behind.dropouts and use.training
            ratio = ratio_of_variances(traces.again, traces.without_dropout, name, index) if noisy else 1.0
            if ratio > getattr(found.get(name), "ratio", 1.0):
                found[name] = _Shift(ratio, use.behind.dropouts, bool(use.behind.directly))
    return found


def ratio_of_variances(noisy: Sequence[Trace], calm: Sequence[Trace], name: str, index: int) -> float:
    """Return by which factor, at least 1, the variance of a use's input differs between two sets of forwards.

    The geometric mean over channels, of variances that are means over the forwards of a set.
    """
    sides = [
        [uses[index].var for trace in side if len(uses := trace.uses.get(name, ())) > index] for side in (noisy, calm)
    ]
    if not all(sides):
        return 1.0
    with_noise, without = (torch.stack(side).mean(0) for side in sides)
    alive = (without > 0) & (with_noise > 0)
    shift = float((with_noise[alive] / without[alive]).log().mean().abs().exp()) if alive.any() else 1.0
    return shift if math.isfinite(shift) else 1.0
