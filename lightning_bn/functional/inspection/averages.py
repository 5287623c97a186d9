"""Averaged weights in a file: whose their running statistics are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_bn.functional.inspection.entries import Entry, averages_without_statistics, bare
from lightning_bn.functional.inspection.findings import FileFinding
from lightning_bn.functional.inspection.remedies import Recalibrating, recalibrating
from lightning_bn.functional.statistics.opened_files import OpenedFile

_REMEDY = "Recalibrate before these weights are used, or compare their validation with and without."


def of_averages(entry: Entry, entries: Sequence[Entry], way: Recalibrating) -> list[FileFinding]:
    """Return what is to be known of the running statistics beside averaged weights; nothing of other sets.

    Args:
        entry: The set.
        entries: All of the file.
        way: How the set is recalibrated.
    """
    if entry.role != "averaged" or not entry.layers:
        return []
    others = [one for one in entries if one is not entry and one.role in ("model", "in training")]
    source = next((one for one in others if _has_statistics_of(entry, one)), None)
    if source is not None:
        what = (
            f"The weights are an average, and the running statistics are bit for bit those of "
            f"{source.key or 'the file itself'}: they were measured with other weights."
        )
    else:
        what = (
            "The weights are an average, and so may be the running statistics; the counters do not tell what is left "
            "of the initial values. Only data can show whether the statistics fit these weights."
        )
    remedy = f"{_REMEDY} {way.instead}".strip()
    return [FileFinding("averages", False, entry.key, tuple(entry.layers), what, remedy, way.command)]


def averages_alone(entries: Sequence[Entry], keys: Mapping[str, int], file: OpenedFile) -> Iterator[FileFinding]:
    """Yield what is to be known of averaged weights without running statistics.

    Args:
        entries: All sets of the file, the model's own first.
        keys: :func:`~lightning_bn.functional.inspection.remedies.keys_of` them.
        file: The file.
    """
    for one in averages_without_statistics(file.content, entries[0]):
        way = recalibrating(one, {**keys, one.key: 1}, file)
        what = (
            "These weights are an average and have no running statistics beside them: evaluated with those of the "
            "model, they are evaluated with statistics of other weights."
        )
        remedy = f"Recalibrate, which adds them. {way.instead}".strip()
        yield FileFinding("averages", False, one.key, tuple(one.layers), what, remedy, way.command)


def _has_statistics_of(entry: Entry, other: Entry) -> bool:
    """Whether all running statistics are those of another set, and not all weights are."""
    ours, theirs = bare(entry), bare(other)
    pairs = [(entry.layers[ours[name]], other.layers[theirs[name]]) for name in ours if name in theirs]
    if not pairs or len(pairs) < len(ours):
        return False
    same = all(_equal(one, two, "running_mean") and _equal(one, two, "running_var") for one, two in pairs)
    return same and not all(_equal(one, two, "weight") for one, two in pairs)


def _equal(one: Mapping[str, Any], other: Mapping[str, Any], part: str) -> bool:
    return part in one and part in other and torch.equal(one[part], other[part])
