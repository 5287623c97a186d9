"""What a checkpoint says of its BatchNorm layers, as a person reads it: what is wrong first, then the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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


def inspection_report(found: Inspection, callbacks: Mapping[str, str], most: int | None = 20) -> Iterator[LayerTable]:
    """Return what is to be printed, the most important first.

    Args:
        found: What :func:`~lightning_bn.functional.inspect_checkpoint` gave.
        callbacks: What callbacks left in the file, in words.
        most: How many layers of the first set to list, and none of the others; None for all of all.
    """
    faults = [f"- {in_words(one)}" for one in found.findings if one.is_fault]
    notes = [f"- {in_words(one)}" for one in found.findings if not one.is_fault]
    yield LayerTable(verdict(found), [], above=faults)
    if notes:
        yield LayerTable("Worth knowing", [], above=notes)
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


def verdict(found: Inspection) -> str:
    """Whether the file is well, in one sentence without a full stop."""
    layers = counted(sum(len(entry.layers) for entry in found.entries), "BatchNorm layer")
    if len(found.entries) > 1:
        layers += f" in {len(found.entries)} sets"
    faults = counted(len(found.faults), "fault") if found.faults else "no fault"
    return f"{shown(found.path.name)}: {faults} in {layers}"


def in_words(finding: FileFinding) -> str:
    """A finding with the set of layers it is of, if that is not the model's own."""
    where = "" if finding.entry in ("", "state_dict") else f"{finding.entry}: "
    return f"{where}{finding}"


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
            f", {min(counts):,} updates"
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
    columns = [
        Column("channels", 6, "right"),
        Column("updates", 4, "right"),
        Column("mean", 5, "right"),
        Column("variance", 3, "right"),
        Column("initial values left", 7, "right", instead=_left_in_words(entry.layers)),
        Column("weights near 0", 8, "right"),
        Column("found", 1),
    ]
    table = LayerTable(title, columns, below=rest)
    for layer in order[:most]:
        of_layer = kinds.get(layer.name, ())
        table.add_row(
            shown(layer.name),
            f"{layer.channels:,}",
            "-" if layer.updates is None else f"{layer.updates:,}",
            _span(layer.mean),
            _span(layer.var),
            share(layer.initial_left),
            "-" if layer.weight_near_zero is None else f"{layer.weight_near_zero:,}",
            ", ".join(of.kind for of in of_layer) or "-",
            style="red" if any(of.is_fault for of in of_layer) else "yellow" if of_layer else "",
        )
    return table


def share(left: float | None) -> str:
    """What is left of initial values, as a person reads it."""
    if left is None:
        return "-"
    return f"{100 * left:.0f} %" if left >= 0.1 or left < 0.0001 else f"{100 * left:.2g} %"


def _left_in_words(layers: Sequence[LayerFacts]) -> str:
    left = [one.initial_left for one in layers if one.initial_left is not None]
    return f"Of the initial values at most {share(max(left))} is left." if left else ""


def _span(values: tuple[float, float, float]) -> str:
    low, _, high = values
    return f"{_number(low)} to {_number(high)}"


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
