"""What is wrong with the BatchNorm layers of a file, each in one sentence, with what to do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_bn.functional._text import counted
from lightning_bn.functional.inspection.entries import Role
from lightning_bn.functional.inspection.layer_facts import LayerFacts
from lightning_bn.functional.inspection.remedies import Recalibrating
from lightning_bn.functional.inspection.rules import RULES, FileFault, FileNote
from lightning_bn.functional.statistics.opened_files import shown

_NO_BATCH = "Was there a batch of this task? If not, leave it out of tasks."
_MOST_NAMED = 4
_OUT_OF_SCALE = 1e4
"""A layer's variance over those of the others. 84 is the largest in a trained EfficientNet-Lite0."""


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
    for rule in RULES:
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
    found += _out_of_scale(entry, layers, way)
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


def _out_of_scale(entry: str, layers: Sequence[LayerFacts], way: Recalibrating) -> Iterator[FileFinding]:
    """Where the variance of a whole layer is of another order than those of all others, by their medians."""
    known = {one.name: one.var[1] for one in layers if 0 < one.var[1] < math.inf}
    far = {}
    for name, variance in known.items():
        others = [other for one, other in known.items() if one != name]
        if len(others) >= 2 and variance >= _OUT_OF_SCALE * median(others):
            far[name] = variance / median(others)
    if far:
        most = max(far, key=lambda name: far[name])
        yield FileFinding(
            "out of scale",
            False,
            entry,
            tuple(far),
            f"The variance of {listed([*far])} is up to {far[most]:,.0f} times that of the other layers, by their "
            f"medians. Where the inputs of a layer are not as large, it outputs little but its bias.",
            f"Recalibrate, and see whether the variance stays. {way.instead}".rstrip(),
            way.command,
        )


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
        f"Layers have different numbers of updates: {most}, {said}{more}.",
        "That is normal for layers that were frozen, loaded from elsewhere, or used more than once in a forward. "
        "Otherwise they were in eval mode for a while, or some batches never reach them.",
    )
