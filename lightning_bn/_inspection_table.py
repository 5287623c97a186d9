"""What a checkpoint says of its BatchNorm layers, as a person reads it: what is wrong first, then the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from lightning_bn._tables import Column, LayerTable
from lightning_bn.functional._text import counted
from lightning_bn.functional.inspection.findings import FileFinding, listed
from lightning_bn.functional.inspection.inspect import InspectedEntry, Inspection
from lightning_bn.functional.inspection.layer_facts import LayerFacts
from lightning_bn.functional.statistics.opened_files import shown

_ROLES = {
    "model": "the model",
    "averaged": "averaged weights",
    "in training": "the weights in training, of which the others are an average",
    "task": "statistics of a task",
}

_NOTHING = 1e-4
"""Share of initial values that is shown as none."""


def inspection_report(found: Inspection, callbacks: Mapping[str, str], most: int | None = 20) -> Iterator[LayerTable]:
    """Return what is to be printed, the most important first.

    Args:
        found: What :func:`~lightning_bn.functional.inspect_checkpoint` gave.
        callbacks: What callbacks left in the file, in words.
        most: How many layers of the first set to list, and none of the others; None for all of all.
    """
    for title, is_fault in ((verdict(found), True), ("Worth knowing", False)):
        said = [f"- {in_words(one)}" for one in found.findings if one.is_fault == is_fault]
        if said or is_fault:
            yield LayerTable(title, [], above=said)
    for index, entry in enumerate(found.entries):
        if not index or most is None:
            yield entry_table(entry, found, most)
    below = [f"- {summary(entry)}" for entry in found.entries[1:]] if most is not None else []
    if below:
        yield LayerTable("Also in the file", [], above=[*below, "--all lists their layers."])
    if callbacks:
        yield LayerTable(
            "What callbacks left in the file", [], above=[f"- {key}: {said}" for key, said in callbacks.items()]
        )
    yield LayerTable(source(found), [])
    said, commands = remedies(found), commands_of(found)
    if said:
        yield LayerTable("What to do", [], above=[f"- {one}" for one in said])
    if commands:
        yield LayerTable(next_step(found), [], commands=commands)


def remedies(found: Inspection) -> list[str]:
    """What to do about the findings, each remedy once, with the kinds of findings it is for."""
    kinds: dict[str, dict[str, None]] = {}
    for one in found.findings:
        kinds.setdefault(one.remedy, {})[one.kind] = None
    return [f"{', '.join(of)}: {remedy[:1].lower()}{remedy[1:]}" for remedy, of in kinds.items()]


def commands_of(found: Inspection) -> list[str]:
    """Commands that mend what was found; of a file that is well, the one that asks the data."""
    mending = list(dict.fromkeys(one.command for one in found.findings if one.command))
    if mending or found.faults:
        return mending
    first = found.entries[0]
    return [first.command] if first.command and len(first.recalibrated) < len(first.layers) else []


def next_step(found: Inspection) -> str:
    """What the commands do, with the colon before them."""
    if any(one.command for one in found.findings):
        return "To recalibrate, with the YAML file that trained it (in Python: recalibrate_checkpoint):"
    ask = "To recompute them, with the YAML file that trained it:"
    return f"Only data can show whether the statistics fit the weights. {ask}"


def verdict(found: Inspection) -> str:
    """Whether the file is well, in one sentence without a full stop."""
    layers = counted(sum(len(entry.layers) for entry in found.entries), "BatchNorm layer")
    if len(found.entries) > 1:
        layers += f" in {len(found.entries)} sets"
    faults = counted(len(found.faults), "fault") if found.faults else "no fault"
    return f"{shown(found.path.name)}: {faults} in {layers}"


def in_words(finding: FileFinding) -> str:
    """A finding with the set of layers it is of, if that is not the model's own."""
    where = "" if finding.entry in ("", "state_dict") else f"{finding.entry}, "
    return f"{where}{finding.kind}: {finding.what[:1].lower()}{finding.what[1:]}"


def source(found: Inspection) -> str:
    """What was read, in one sentence without a full stop."""
    about = dict(found.about)
    said = [f"Read: {found.kind}, {_bytes(found.size)}"]
    if "pytorch-lightning_version" in about:
        said.append(f"of pytorch-lightning {about['pytorch-lightning_version']}")
    said += [f"{name} {about[key]}" for key, name in (("epoch", "epoch"), ("global_step", "step")) if key in about]
    files = [file for file in found.files if file != found.path]
    return ", ".join(said) + (f", in {listed([file.name for file in files])}" if files else "")


def summary(entry: InspectedEntry) -> str:
    """One set of layers in one sentence."""
    counts = [one.updates for one in entry.layers if one.updates is not None]
    updates = ""
    if counts:
        updates = (
            f", {counted(min(counts), 'update')}"
            if min(counts) == max(counts)
            else f", {min(counts):,} to {max(counts):,} updates"
        )
    layers = counted(len(entry.layers), "BatchNorm layer")
    return f"{entry.key or 'the file itself'} ({_ROLES[entry.role]}): {layers}{updates}."


def entry_table(entry: InspectedEntry, found: Inspection, most: int | None = None) -> LayerTable:
    """The layers of one set, those with faults first.

    Args:
        entry: The set.
        found: What it is of.
        most: How many layers to list; None for all.
    """
    kinds: dict[str, list[FileFinding]] = {}
    for one in found.findings:
        if one.entry == entry.key:
            for name in one.layers:
                kinds.setdefault(name, []).append(one)
    order = sorted(entry.layers, key=lambda one: not any(of.is_fault for of in kinds.get(one.name, ())))
    where = "" if entry.key in ("", "state_dict") else f" of {entry.key}"
    title = f"{counted(len(entry.layers), 'BatchNorm layer')}{where}, {counted(_channels(entry.layers), 'channel')}"
    rest = [] if most is None or len(order) <= most else [f"... {len(order) - most:,} more; --all lists them."]
    columns = _columns(entry)
    table = LayerTable(title, [column for column, _ in columns], below=[*rest, *_of_counters(entry)])
    for layer in order[:most]:
        of_layer = kinds.get(layer.name, ())
        found_there = ", ".join(of.kind for of in of_layer) or "-"
        style = "red" if any(of.is_fault for of in of_layer) else "yellow" if of_layer else ""
        table.add_row(shown(layer.name), *(cell(layer) or found_there for _, cell in columns), style=style)
    return table


def _columns(entry: InspectedEntry) -> list[tuple[Column, Callable[[LayerFacts], str]]]:
    """Columns with what each says of a layer; without those that say nothing of any. The last one is for findings."""
    # The mean goes before a number that is the same in all layers, which is said below the table.
    updates = 5 if len({one.updates for one in entry.layers}) == 1 else 4
    columns: list[tuple[Column, Callable[[LayerFacts], str]]] = [
        (Column("channels", 6, "right"), lambda one: f"{one.channels:,}"),
        (Column("updates", updates, "right"), lambda one: "-" if one.updates is None else f"{one.updates:,}"),
        (Column("mean", 9 - updates, "right"), lambda one: _span(one.mean)),
        (Column("variance", 3, "right"), lambda one: _span(one.var)),
    ]
    if any(one.initial_left is not None for one in entry.layers):
        left = Column("initial values left", 7, "right", instead=_left_in_words(entry.layers))
        columns.append((left, lambda one: share(one.initial_left)))
    if any(one.weight_near_zero for one in entry.layers):
        near = Column("weights near 0", 8, "right")
        columns.append((near, lambda one: "-" if one.weight_near_zero is None else f"{one.weight_near_zero:,}"))
    return [*columns, (Column("found", 1), lambda _: "")]


def _of_counters(entry: InspectedEntry) -> list[str]:
    """What the counters do not tell, and why."""
    said = []
    if entry.recalibrated:
        counts = [one for one in entry.recalibrated.values() if one[0] is not None]
        batches, samples = max(counts, key=lambda one: one[0] or 0, default=(None, None))
        source = "" if batches is None else f" from {counted(batches, 'batch', 'batches')}"
        source += "" if samples is None else f" with {counted(samples, 'sample')}"
        layers = (
            "all layers" if len(entry.recalibrated) == len(entry.layers) else counted(len(entry.recalibrated), "layer")
        )
        said.append(f"Recalibrated: {layers}{source}. Counters of updates stay as they were, and say nothing of these.")
    missing = sum(one.updates is None for one in entry.layers)
    if missing:
        layers = "these layers have" if missing == len(entry.layers) else f"{counted(missing, 'layer')} with - has"
        said.append(f"Updates: {layers} no counter in the file.")
    return said


def share(left: float | None) -> str:
    """What is left of initial values, as a person reads it."""
    if left is None:
        return "-"
    return f"{100 * left:.0f} %" if left >= 0.1 or left < _NOTHING else f"{100 * left:.2g} %"


def _left_in_words(layers: Sequence[LayerFacts]) -> str:
    most = max(one.initial_left for one in layers if one.initial_left is not None)
    return (
        f"Of the initial values at most {share(most)} is left."
        if most >= _NOTHING
        else "Nothing is left of the initial values."
    )


def _span(values: tuple[float, float, float]) -> str:
    low, high = _number(values[0]), _number(values[2])
    return low if low == high else f"{low}..{high}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < 1e5 else f"{value:.2g}"


def _channels(layers: Sequence[LayerFacts]) -> int:
    return sum(one.channels for one in layers)


def _bytes(size: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size = size / 1000  # type: ignore[assignment]
    return f"{size:.3g} GB"
