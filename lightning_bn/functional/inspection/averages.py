"""Averaged weights in a file: whose their running statistics are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_bn.functional.inspection.entries import Entry, bare
from lightning_bn.functional.inspection.findings import FileFinding
from lightning_bn.functional.inspection.remedies import Recalibrating

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
