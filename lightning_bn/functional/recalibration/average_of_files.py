"""Averages of the weights that several files of one model hold (a "model soup")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_bn.functional.statistics.file_entries import FileEntry, Shapes
from lightning_bn.functional.statistics.files import read_checkpoint


def averages(
    first: FileEntry, others: Sequence[Path], wanted: Shapes, of: str, **choice: str | None
) -> dict[str, Tensor]:
    """Return by the model's names the averages of what several files hold; one file at a time is in memory.

    Raises:
        ValueError: If a file does not fit the model, or if whole numbers differ.
    """
    tensors = {name: first[name] for name in (first.names if others else ()) if isinstance(first[name], Tensor)}
    # Of whole numbers there is no average; what is tied stays so.
    averaged = {name: one for name, one in tensors.items() if one.is_floating_point() or one.is_complex()}
    ids = {name: (one.data_ptr(), one.shape, one.stride(), one.dtype) for name, one in averaged.items()}
    alone = {key: name for name, key in reversed(ids.items())}
    sums = {name: _wide(averaged[name]) for name in alone.values()}
    for path in others:
        entry = read_checkpoint(path).entry(wanted, of, **choice)
        for name in tensors.keys() - averaged.keys():
            if not torch.equal(tensors[name], entry[name]):
                raise ValueError(
                    f"{path.name}: {name!r} holds whole numbers ({tensors[name].dtype}) that are not those of the "
                    f"first file, and have no average. Are these checkpoints of one model?"
                )
        for name, total in sums.items():
            total.add_(entry[name])
    means = {name: (total / (1 + len(others))).to(averaged[name].dtype) for name, total in sums.items()}
    return {name: means[alone[key]] for name, key in ids.items()}


def _wide(tensor: Tensor) -> Tensor:
    """A copy in double precision."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)
