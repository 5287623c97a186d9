"""Averages of the weights that several files of one model hold (a "model soup")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_bn.functional.recalibration.lacking_statistics import FoundEntry
from lightning_bn.functional.statistics.files import CheckpointFile, read_checkpoint


def average(first: FoundEntry, others: Sequence[Path], find: Callable[[CheckpointFile], FoundEntry]) -> FoundEntry:
    """Return the entry with averages of what several files hold; one file at a time is in memory.

    Args:
        first: The entry that they are written into. What any file lacks of the running statistics counts as lacking.
        others: Further files.
        find: Finds the entry of each.

    Raises:
        ValueError: If a file does not fit the model, or if whole numbers differ.
    """
    entry, lacking = first.entry, set(first.lacking)
    tensors = {name: one for name in (entry.names if others else ()) if isinstance(one := entry.get(name), Tensor)}
    # Of whole numbers there is no average; what is tied stays so.
    averaged = {name: one for name, one in tensors.items() if one.is_floating_point() or one.is_complex()}
    ids = {name: (one.data_ptr(), one.shape, one.stride(), one.dtype) for name, one in averaged.items()}
    alone = {key: name for name, key in reversed(ids.items())}
    sums = {name: _wide(averaged[name]) for name in alone.values()}
    for path in others:
        other = find(read_checkpoint(path))
        lacking |= other.lacking
        for name in tensors.keys() - averaged.keys():
            if not torch.equal(tensors[name], other.entry[name]):
                raise ValueError(
                    f"{path.name}: {name!r} holds whole numbers ({tensors[name].dtype}) that differ from those of the "
                    "first file, and whole numbers are not averaged. Are these checkpoints of one model?"
                )
        for name in sums.keys() - lacking:
            sums[name].add_(_wide(other.entry[name]))
    means = {name: (total / (1 + len(others))).to(averaged[name].dtype) for name, total in sums.items()}
    for name, key in ids.items():
        entry.state[entry.name_of(name)] = means[alone[key]]
    return FoundEntry(entry, frozenset(lacking))


def _wide(tensor: Tensor) -> Tensor:
    """A copy in double precision."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)
