"""How far the running statistics of two checkpoints lie apart."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bn.functional._checks import check_choice
from lightning_bn.functional._text import quoted
from lightning_bn.functional.inspection.comparison import ComparedLayer, Comparison
from lightning_bn.functional.inspection.entries import Entry, entries_in
from lightning_bn.functional.inspection.layer_facts import EPS
from lightning_bn.functional.inspection.matching import match
from lightning_bn.functional.inspection.recalibrated_layers import recalibrated_layers
from lightning_bn.functional.inspection.remedies import keys_of, recalibrating
from lightning_bn.functional.layers.names import without_wrappers
from lightning_bn.functional.layers.patterns import Patterns, SelectionError, as_patterns
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.claimed_values import distinct
from lightning_bn.functional.statistics.drift_measures import MEASURES, Measure, of_standardized, standardized
from lightning_bn.functional.statistics.opened_files import open_checkpoint
from lightning_bn.functional.statistics.snapshots import Snapshot


def compare_checkpoints(
    first: str | Path,
    second: str | Path,
    measure: Measure = "jeffreys",
    *,
    modules: Patterns = None,
    keys: tuple[str | None, str | None] = (None, None),
) -> Comparison:
    """Return how far the running statistics of a second checkpoint are from those of a first; nothing is executed.

    Names are matched without what wrappers add, and without leading components that one of the two has more. A file
    does not say a layer's ``eps``: torch's own, 1e-5, is assumed.

    Args:
        first: As for :func:`~lightning_bn.functional.inspect_checkpoint`.
        second: The same.
        measure: As for :func:`~lightning_bn.functional.drift`.
        modules: As for ``inspect_checkpoint``, on the names that both files share; None for all.
        keys: Of the state dicts that are compared, one for each file, as ``inspect_checkpoint`` gives them; None for
            the model's own.

    Raises:
        ValueError: As for ``inspect_checkpoint``, or if the files have no layer in common or no state dict of that key.
        SelectionError: As for ``inspect_checkpoint``.
        OSError: As for ``inspect_checkpoint``.
        pickle.UnpicklingError: As for ``inspect_checkpoint``.

    Example:
        >>> import tempfile
        >>> layer = torch.nn.BatchNorm1d(2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"bn." + name: value for name, value in layer.state_dict().items()}, f"{folder}/a.pt")
        ...     _ = layer.running_var.fill_(2)
        ...     torch.save({"model.bn." + name: value for name, value in layer.state_dict().items()}, f"{folder}/b.pt")
        ...     found = compare_checkpoints(f"{folder}/a.pt", f"{folder}/b.pt")
        >>> found.layers[0].name, found.layers[0].in_words()
        ('bn', 'variance x2.0, mean +0.0 sigma')
    """
    check_choice("measure", measure, MEASURES)
    sides = [_side(path, key) for path, key in zip((first, second), keys, strict=True)]
    one, other = (side.entry for side in sides)
    matched = match(list(one.layers), list(other.layers))
    if not matched.pairs:
        raise ValueError(
            f"no BatchNorm layer of {Path(first).name} ({quoted(list(one.layers), 3)}) has its name in "
            f"{Path(second).name} ({quoted(list(other.layers), 3)}): they are of different models."
        )
    pairs = _chosen(matched.pairs, modules)
    broken = [_broken(side, matched.prefixes[place], modules) for place, side in enumerate((one, other))]
    only = (matched.only_first, matched.only_second)
    alone = [
        tuple(names[short] for short in names if short not in broken[1 - place])
        for place, names in enumerate(_meant(only[place], matched.prefixes[place], modules) for place in (0, 1))
    ]
    sizes = {name: tuple(map(_channels, _of(one, other, *names))) for name, names in pairs.items()}
    comparable = {name: names for name, names in pairs.items() if len({*sizes[name]}) == 1}
    return Comparison(
        first=Path(first),
        second=Path(second),
        measure=measure,
        layers=tuple(_compared_once(sides, comparable, measure)),
        only_first=alone[0],
        only_second=alone[1],
        other_channels={name: (here, there) for name, (here, there) in sizes.items() if here != there},
        broken_first=broken[0],
        broken_second=broken[1],
        assumed=(*sides[0].assumed, *sides[1].assumed, *matched.assumed),
        recalibrated=tuple(name for name, (_, there) in pairs.items() if there in sides[1].recalibrated),
        command=sides[1].command,
    )


class _Side(NamedTuple):
    """The layers of one file that are compared.

    Attributes:
        entry: With them.
        same: For each the first name of its tensors.
        assumed: What was, in sentences.
        recalibrated: Names of those that were.
        command: Of a shell, that recalibrates them.
    """

    entry: Entry
    same: Mapping[str, str]
    assumed: Sequence[str]
    recalibrated: Collection[str]
    command: str


def _side(path: str | Path, key: str | None) -> _Side:
    file = open_checkpoint(path)
    entries = [entry for entry in entries_in(file.content) if entry.layers]
    if not entries:
        raise ValueError(f"{file.path.name} has no BatchNorm layer: nothing in it has a running mean and variance.")
    if key is not None:
        found = next((entry for entry in entries if entry.key == key), None)
        if found is None:
            there = quoted([one.key for one in entries])
            raise ValueError(f"{file.path.name} has no BatchNorm layers under {key!r}; there is {there}.")
    else:
        found = entries[0]
    same = distinct(found.layers, file.size)
    others = [entry.key for entry in entries if entry is not found and entry.role != "task"]
    said = f"Of {file.path.name} {found.key or 'the file itself'!r} was taken; there is {quoted(others)} too."
    assumed = [said] if key is None and others else []
    command = recalibrating(found, keys_of(entries), file).command
    return _Side(found, same, assumed, recalibrated_layers(found, file), command)


def _chosen(pairs: Mapping[str, tuple[str, str]], modules: Patterns) -> dict[str, tuple[str, str]]:
    patterns = as_patterns(modules, "modules")
    found = {name: names for name, names in pairs.items() if any(pattern.matches(name) for pattern in patterns)}
    if not found:
        raise SelectionError(f"modules={modules!r} matches none of the layers in both files: {quoted(list(pairs))}.")
    return found


def _meant(names: Iterable[str], prefix: str, modules: Patterns) -> dict[str, str]:
    """Those of the names that the patterns mean, as they are in the file, by what both files would share of them."""
    patterns = as_patterns(modules, "modules")
    short = {without_wrappers(name).removeprefix(prefix): name for name in names}
    return {one: name for one, name in short.items() if any(pattern.matches(one) for pattern in patterns)}


def _broken(side: Entry, prefix: str, modules: Patterns) -> dict[str, str]:
    return {short: side.broken[name] for short, name in _meant(side.broken, prefix, modules).items()}


def _of(one: Entry, other: Entry, here: str, there: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    return one.layers[here], other.layers[there]


def _channels(parts: Mapping[str, Tensor]) -> int:
    return len(parts["running_mean"])


def _compared_once(
    sides: Sequence[_Side], pairs: Mapping[str, tuple[str, str]], measure: Measure
) -> Iterator[ComparedLayer]:
    """The layers of the pairs; those of one layer under several names are compared once."""
    one, other = sides
    same = {name: (one.same[here], other.same[there]) for name, (here, there) in pairs.items()}
    unique = {names: _of(one.entry, other.entry, *names) for names in same.values()}
    named = {str(index): parts for index, parts in enumerate(unique.values())}
    compared = dict(zip(unique, _compared(named, measure), strict=True)) if named else {}
    for name, names in same.items():
        yield replace(compared[names], name=name)


@torch.no_grad()
def _compared(
    layers: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], measure: Measure
) -> list[ComparedLayer]:
    reference, current = (_snapshot(layers, [pair[side] for pair in layers.values()]) for side in (0, 1))
    shift, ratio = standardized(reference, current)
    # Of a negative variance some measures make a number, which means nothing.
    values = of_standardized(measure, shift, ratio, current.weight).abs().masked_fill(ratio < 0, torch.nan)
    differs = (reference.mean != current.mean) | (reference.var != current.var)
    moved = reference.layout.sum(differs.double()).tolist()
    parts = zip(*(one.split(reference.layout.sizes) for one in (values, shift, ratio)), strict=True)
    found = []
    for index, (name, (drift, shifts, ratios)) in enumerate(zip(layers, parts, strict=True)):
        worst = int(drift.nan_to_num(nan=torch.inf, posinf=torch.inf).argmax())
        counters = (_counter(reference, index), _counter(current, index))
        figures = (float(drift[worst]), float(drift.mean()), worst, float(ratios[worst]), float(shifts[worst]))
        found.append(ComparedLayer(name, len(drift), *figures, counters, not moved[index]))
    return found


def _snapshot(names: Mapping[str, object], layers: Sequence[Mapping[str, Tensor]]) -> Snapshot:
    layout = ChannelLayout(tuple(names), tuple(map(_channels, layers)))
    counters = [int(parts.get("num_batches_tracked", torch.tensor(-1)).double().nan_to_num(nan=-1)) for parts in layers]
    ones = [torch.ones(size, dtype=torch.float64) for size in layout.sizes]
    return Snapshot(
        layout,
        mean=torch.cat([parts["running_mean"].detach().double() for parts in layers]),
        var=torch.cat([parts["running_var"].detach().double() for parts in layers]),
        num_batches_tracked=torch.tensor([min(one, 2**62) for one in counters]),
        weight=torch.cat([parts.get("weight", one).detach().double() for parts, one in zip(layers, ones, strict=True)]),
        eps=(EPS,) * len(layout),
    )


def _counter(snapshot: Snapshot, index: int) -> int | None:
    count = int(snapshot.num_batches_tracked[index])
    return None if count < 0 else count
