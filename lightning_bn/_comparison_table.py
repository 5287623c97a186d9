"""How far two checkpoints lie apart, as a person reads it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from lightning_bn._tables import Column, LayerTable
from lightning_bn.functional._text import counted
from lightning_bn.functional.inspection.comparison import ComparedLayer, Comparison
from lightning_bn.functional.inspection.findings import listed
from lightning_bn.functional.statistics.opened_files import shown

UNITS = {
    "jeffreys": "0.1 is a variance x1.6 or a mean 0.3 sigma off",
    "wasserstein": "0.1 is a mean 0.3 sigma off or a standard deviation x1.3",
    "mean_shift": "in standard deviations of the first file",
    "log_variance_ratio": "0.69 is a doubled variance",
    "hellinger": "0 is the same, 1 is apart altogether",
    "output": "mean squared change of the layer's output in evaluation",
}
"""What a number of each measure means."""


def comparison_report(found: Comparison, above: float | None = None, most: int | None = 20) -> Iterator[LayerTable]:
    """Return what is to be printed, the most important first.

    Args:
        found: What :func:`~lightning_bn.functional.compare_checkpoints` gave.
        above: The drift from which on a layer is at fault; None where nobody asked.
        most: How many layers to list; None for all.
    """
    faults = [f"- {fault}" for fault in faults_of(found, above)]
    counters = _counters(found)
    order = [one for one in found.worst_first() if not one.identical]
    yield LayerTable(verdict(found), [], above=[*faults, *found.assumed, *counters])
    if order:
        yield _table(found, order, above, most)
    yield LayerTable(next_step(found), [], commands=commands_of(found))


def _table(found: Comparison, order: list[ComparedLayer], above: float | None, most: int | None) -> LayerTable:
    """The layers that differ."""
    still = len(found.layers) - len(order)
    rest = [f"... {len(order) - most:,} more that moved less; --all lists them."] if most and len(order) > most else []
    same = (
        [f"{counted(still, 'layer')} {'is' if still == 1 else 'are'} the same in both, value by value."]
        if still
        else []
    )
    units = (
        f"Sigma: the standard deviation in the first file. Variances: with torch's eps of 1e-5. {found.measure}: "
        f"{UNITS[found.measure]}."
    )
    columns = [
        Column(found.measure, 2, "right"),
        Column("worst channel", 1),
        Column("mean of channels", 5, "right"),
        Column("channels", 6, "right"),
        Column("updates", 4, "right"),
    ]
    title = f"{counted(len(order), 'layer')} that differ, the furthest first"
    table = LayerTable(title.replace("layer that differ,", "layer that differs,"), columns, below=[*rest, *same, units])
    for one in order[:most]:
        updates = ["-" if count is None else f"{count:,}" for count in one.updates]
        table.add_row(
            shown(one.name),
            f"{one.drift:.2g}",
            f"{one.in_words()} ({one.channel})",
            f"{one.mean_drift:.2g}",
            f"{one.channels:,}",
            updates[0] if updates[0] == updates[1] else " -> ".join(updates),
            style="red" if above is not None and not one.drift <= above else "",
        )
    return table


def next_step(found: Comparison) -> str:
    """What to do with what was found, with the colon before the commands; a sentence without them has no full stop."""
    if _is_mended(found):
        return "If both have the same weights, the drift is how far off the statistics of the first file were"
    if found.broken_first or found.broken_second or not found.command:
        return "What is wrong in a file, and what to do about it:"
    ask = "To recompute those of the second file, with the YAML file that trained it:"
    if all(one.identical for one in found.layers):
        one = "If the two files have other weights, these statistics fit at most one of them."
        return f"{one} Only data can show which. {ask}"
    return f"Only data can show which statistics fit the weights beside them. {ask}"


def commands_of(found: Comparison) -> list[str]:
    """The command that asks the data; where a layer is not whole, those that look at the files."""
    if _is_mended(found):
        return []
    broken = [path for path, there in ((found.first, found.broken_first), (found.second, found.broken_second)) if there]
    if found.command and not broken:
        return [found.command]
    paths = [str(path) for path in broken or [found.second]]
    return [shlex.join(["lightning-bn", "inspect", path if path.isprintable() else "FILE"]) for path in paths]


def _is_mended(found: Comparison) -> bool:
    """Whether all that can be compared was recalibrated in the second file, and nothing else is wrong."""
    broken = found.broken_first or found.broken_second
    return bool(found.layers) and not broken and {one.name for one in found.layers} <= {*found.recalibrated}


def verdict(found: Comparison) -> str:
    """What moved most, in one sentence without a full stop."""
    both = f"{shown(found.first.name)} to {shown(found.second.name)}"
    if not found.layers:
        return f"{both}: no layer can be compared"
    worst = found.worst_first()[0]
    layers = counted(len(found.layers), "BatchNorm layer")
    apart = len(found.only_first) + len(found.only_second) + len(found.other_channels)
    apart += len({*found.broken_first, *found.broken_second})
    if all(one.identical for one in found.layers):
        others = f", and {apart} cannot be compared" if apart else ""
        return f"{both}: the running statistics of {layers} are the same{others}"
    return f"{both}: running statistics of {layers} moved most at {shown(worst.name)}, {worst.in_words()}"


def faults_of(found: Comparison, above: float | None) -> list[str]:
    """What makes a check fail, one sentence each; what two files cannot have in common is said without a check too."""
    said = []
    if above is not None and (beyond := found.above(above)):
        said.append(f"{counted(len(beyond), 'layer')} beyond {above:g} ({found.measure}): {_named(beyond)}.")
    for names, which in ((found.only_first, found.first), (found.only_second, found.second)):
        if names:
            said.append(f"{counted(len(names), 'layer')} in {shown(which.name)} only: {listed(names)}.")
    said += broken_of(found)
    if found.other_channels:
        sizes = ", ".join(f"{shown(name)} ({one:,} and {two:,})" for name, (one, two) in found.other_channels.items())
        said.append(f"Other numbers of channels: {sizes[:400]}.")
    return said


def broken_of(found: Comparison) -> list[str]:
    """Layers that are none, one sentence for each file: wrong in any case."""
    return [
        f"{counted(len(broken), 'layer')} of {shown(path.name)} {'is' if len(broken) == 1 else 'are'} not whole: "
        + "; ".join(f"{listed([name])} {why}" for name, why in [*broken.items()][:4])
        + (f"; and {len(broken) - 4} more." if len(broken) > 4 else ".")
        for path, broken in ((found.first, found.broken_first), (found.second, found.broken_second))
        if broken
    ]


def _named(layers: list[ComparedLayer]) -> str:
    return listed([one.name for one in layers])


def _counters(found: Comparison) -> list[str]:
    """How the counters moved on, and why statistics may differ where they did not."""
    known_to_be = {*found.recalibrated}
    said = []
    if known_to_be:
        which = "all layers were" if len(known_to_be) == len(found.layers) else f"{len(known_to_be):,} layers were"
        which = "1 layer was" if len(known_to_be) == 1 else which
        said.append(f"In the second file {which} recalibrated, as it records.")
    updates = [layer.updates for layer in found.layers]
    known = [(one, two) for one, two in updates if one is not None and two is not None]
    if not known:
        return said
    back = [layer.name for layer in found.layers if None not in layer.updates and _step(layer) < 0]
    steps = {two - one for one, two in known if two >= one}
    if back:
        layers = counted(len(back), "layer")
        said.append(f"Fewer updates than in the first file: {layers} ({listed(back)}), reset or of another run.")
    others = [layer.name for layer in found.layers if not layer.identical and _is_still(layer)]
    others = [name for name in others if name not in known_to_be]
    if steps == {0} and not others and not known_to_be and not back:
        said.append(f"{'Its' if len(known) == 1 else 'Their'} counters of updates are equal too.")
    if steps and steps != {0}:
        who = "The others were" if back else "Each layer was" if len(steps) == 1 else "Layers were"
        times = f"{max(steps):,}" if len(steps) == 1 else f"{min(steps):,} to {max(steps):,}"
        said.append(f"{who} updated {times} {'time' if times == '1' else 'times'} more in the second file.")
    if others:
        which = "" if len(others) == len(found.layers) else f" in {counted(len(others), 'layer')} ({listed(others)})"
        said.append(
            f"Counters of updates are equal but statistics differ{which}: they are of another run, averaged, "
            f"recalibrated or edited."
        )
    return said


def _is_still(layer: ComparedLayer) -> bool:
    return None not in layer.updates and _step(layer) == 0


def _step(layer: ComparedLayer) -> int:
    return (layer.updates[1] or 0) - (layer.updates[0] or 0)
