"""Recalibration of a checkpoint in hand: read, recalibrated, written anew with everything else as it was."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.recalibration.precise_bn import recalibrate
from lightning_bn.functional.recalibration.result import Recalibration
from lightning_bn.functional.statistics.files import read_checkpoint, state_dict_of


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
    """Write a copy of a checkpoint in which the running statistics are those of ``batches``.

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
    checkpoint = read_checkpoint(path)
    state = state_dict_of(checkpoint)
    _load(model, state, prefix, path)
    recalibration = recalibrate(model, batches, **options)
    rewritten = [layer for name, layer in batch_norm_layers(model).items() if name in recalibration.layers]
    statistics = {id(buffer) for layer in rewritten for buffer in (layer.running_mean, layer.running_var)}
    # By all their names, wrappers' components included.
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if id(buffer) in statistics and prefix + name in state:
            state[prefix + name] = buffer.detach().to("cpu", state[prefix + name].dtype, copy=True)
    _write(checkpoint, out)
    return RecalibratedCheckpoint(out, "averaging_state" in checkpoint, recalibration)


def _load(model: nn.Module, state: dict[str, Any], prefix: str, path: Path) -> None:
    wanted = model.state_dict().keys()
    missing = sorted(name for name in wanted if prefix + name not in state)
    if missing:
        found = next((name[: -len(missing[0])] for name in state if name.endswith("." + missing[0])), None)
        hint = f" With prefix={found!r} it would." if found else ""
        raise ValueError(
            f"{path.name} does not fit {type(model).__name__} with prefix={prefix!r}: it lacks {quoted(missing)}.{hint}"
        )
    fitting: OrderedDict[str, Any] = OrderedDict((name, state[prefix + name]) for name in wanted)
    # Versions of the modules that wrote the file: newer ones migrate what older ones wrote.
    fitting._metadata = {  # type: ignore[attr-defined]
        name.removeprefix(prefix.rstrip(".")).lstrip("."): version
        for name, version in (getattr(state, "_metadata", None) or {}).items()
        if (name + ".").startswith(prefix)
    }
    model.load_state_dict(fitting)


def _write(checkpoint: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        torch.save(checkpoint, part)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
