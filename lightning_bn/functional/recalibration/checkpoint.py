"""Recalibration of a checkpoint in hand: read, recalibrated, written anew with everything else as it was."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.names import canonical_name
from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.recalibration.precise_bn import recalibrate
from lightning_bn.functional.recalibration.result import Recalibration
from lightning_bn.functional.statistics.snapshots import Snapshot


@dataclass(frozen=True)
class RecalibratedCheckpoint:
    """What became of a checkpoint.

    Attributes:
        path: Where the new one is.
        averaged: Whether the weights in it are averages, as WeightAveraging saves them.
        recalibration: What was done to the statistics.
    """

    path: Path
    averaged: bool
    recalibration: Recalibration

    def __str__(self) -> str:
        weights = "averaged weights" if self.averaged else "weights as saved"
        return f"{self.path.name}: {weights}, {self.recalibration}"


def recalibrate_checkpoint(
    path: str | Path,
    model: nn.Module,
    batches: Iterable[Any],
    out: str | Path,
    *,
    prefix: str = "",
    overwrite: bool = False,
    **options: Any,
) -> RecalibratedCheckpoint:
    """Writes a copy of a checkpoint in which the running statistics are those of ``batches``.

    Nothing in the file is executed (``weights_only=True``). Where a checkpoint of Lightning's WeightAveraging holds
    averages, they are what is recalibrated, since they are its ``state_dict``; the weights being trained, beside them,
    stay as they are. What a BatchNormFreezer had frozen is not known here: leave it out with ``exclude``.

    Args:
        path: A Lightning checkpoint, or a state dict.
        model: Takes the weights, which it holds afterwards: the LightningModule itself, or the network in it together
            with ``prefix``.
        batches: As for :func:`~lightning_bn.functional.recalibrate`.
        out: Where to write. The file appears when it is complete.
        prefix: What the names in the checkpoint have before those of ``model``, for instance ``"model."``.
        overwrite: Whether ``out`` may exist already, or be ``path``.
        **options: All others of ``recalibrate``.

    Raises:
        FileExistsError: If ``out`` exists and ``overwrite`` is not given; nothing is read then.
        ValueError: If the file holds no state dict, or one that does not fit ``model``; and as for ``recalibrate``.
        pickle.UnpicklingError: If the file holds more than tensors and plain values.
    """
    path, out = Path(path), Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another out=, or pass overwrite=True to replace it.")
    checkpoint = _read(path)
    state = checkpoint.get("state_dict", checkpoint)
    _load(model, state, prefix, path)
    recalibration = recalibrate(model, batches, **options)
    for name, buffer in _statistics(model, recalibration.layers).items():
        if prefix + name in state:
            state[prefix + name] = buffer.detach().to("cpu", state[prefix + name].dtype, copy=True)
    _write(checkpoint, out)
    return RecalibratedCheckpoint(out, "averaging_state" in checkpoint, recalibration)


def snapshot_of_checkpoint(path: str | Path, like: Snapshot) -> Snapshot:
    """The running statistics that a checkpoint holds of the layers of a snapshot; nothing in the file is executed.

    Args:
        path: A Lightning checkpoint, or a state dict.
        like: Says which layers, and has what a checkpoint lacks (``eps``).

    Raises:
        ValueError: If the file holds no state dict, or lacks a layer or has it with other channels.
        pickle.UnpicklingError: If the file holds more than tensors and plain values.
    """
    checkpoint = _read(Path(path))
    state = checkpoint.get("state_dict", checkpoint)
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


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(
            f"{path.name} holds objects besides tensors and plain values, which reading would execute: load it "
            f"yourself if you trust it, save its state dict alone, and pass that. ({str(error).splitlines()[0]})"
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path.name} holds no state dict: neither the file itself nor its 'state_dict' is one.")
    return checkpoint  # type: ignore[no-any-return]


def _load(model: nn.Module, state: dict[str, Any], prefix: str, path: Path) -> None:
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    wanted = set(model.state_dict())
    missing = sorted(wanted - set(own))
    if missing:
        found = next((name[: -len(missing[0])] for name in state if name.endswith("." + missing[0])), None)
        hint = f" With prefix={found!r} it would." if found else ""
        raise ValueError(
            f"{path.name} does not fit {type(model).__name__} with prefix={prefix!r}: it lacks {quoted(missing)}.{hint}"
        )
    fitting: OrderedDict[str, Any] = OrderedDict((name, own[name]) for name in wanted)
    # Versions of the modules that wrote the file: newer ones migrate what older ones wrote.
    versions = getattr(state, "_metadata", None) or {}
    fitting._metadata = {  # type: ignore[attr-defined]
        name.removeprefix(prefix.rstrip(".")).lstrip("."): version
        for name, version in versions.items()
        if (name + ".").startswith(prefix)
    }
    model.load_state_dict(fitting)


def _statistics(model: nn.Module, layers: Collection[str]) -> dict[str, Tensor]:
    """Running statistics of some layers by all their names in a state dict, wrappers' components included."""
    chosen = {id(layer) for name, layer in batch_norm_layers(model).items() if name in layers}
    return {
        f"{path}.{value}".lstrip("."): buffer
        for path, module in model.named_modules(remove_duplicate=False)
        if id(module) in chosen
        for value in ("running_mean", "running_var")
        if (buffer := module._buffers[value]) is not None
    }


def _write(checkpoint: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        torch.save(checkpoint, part)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
