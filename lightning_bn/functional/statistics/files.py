"""Checkpoints as files: one reader, which executes nothing, and the running statistics in what it read."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.names import canonical_name
from lightning_bn.functional.statistics.snapshots import Snapshot


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, on the CPU; nothing in the file is executed.

    Raises:
        ValueError: If it holds no state dict.
        pickle.UnpicklingError: If it holds more than tensors and plain values.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(
            f"{path.name} holds objects besides tensors and plain values, which reading would execute: load it "
            f"yourself if you trust it, save its state dict alone, and pass that. ({str(error).splitlines()[0]})"
        ) from error
    state = state_dict_of(checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path.name} holds no state dict: neither the file itself nor its 'state_dict' is one.")
    return checkpoint  # type: ignore[no-any-return]


def state_dict_of(checkpoint: dict[str, Any]) -> Any:
    """Return the state dict in a Lightning checkpoint; a bare state dict is its own."""
    return checkpoint.get("state_dict", checkpoint)


def snapshot_of_checkpoint(path: str | Path, like: Snapshot) -> Snapshot:
    """Return the running statistics that a checkpoint holds of the layers of a snapshot; nothing in it is executed.

    Args:
        path: A Lightning checkpoint, or a state dict.
        like: Says which layers, and has what a checkpoint lacks (``eps``).

    Raises:
        ValueError: If the file holds no state dict, or lacks a layer or has it with other channels.
        pickle.UnpicklingError: If the file holds more than tensors and plain values.
    """
    state = state_dict_of(read_checkpoint(Path(path)))
    # Names as a model reports them: without the components that wrappers add.
    state = {canonical_name(nn.Module(), name): value for name, value in state.items()}
    missing = [
        name
        for name, size in zip(like.names, like.layout.sizes, strict=True)
        if getattr(state.get(f"{name}.running_mean"), "shape", None) != (size,)
    ]
    if missing:
        raise ValueError(
            f"{Path(path).name} has no running statistics of {quoted(missing)} with as many channels: it was written "
            f"by another model."
        )

    def gather(value: str) -> Tensor:
        return torch.cat([state[f"{name}.{value}"].to(like.mean.dtype) for name in like.names])

    counters = [state.get(f"{name}.num_batches_tracked", torch.tensor(-1)) for name in like.names]
    read = replace(
        like, mean=gather("running_mean"), var=gather("running_var"), num_batches_tracked=torch.stack(counters)
    )
    return read.to(like.mean.device)
