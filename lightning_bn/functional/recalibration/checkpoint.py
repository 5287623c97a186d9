"""Recalibration of a checkpoint in hand: read, recalibrated, written anew with everything else as it was."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import counted, named, quoted
from lightning_bn.functional.layers.names import without_wrappers
from lightning_bn.functional.layers.properties import is_lazy
from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.layers.sets_per_task import sets_of
from lightning_bn.functional.layers.status import layer_status, update_status
from lightning_bn.functional.recalibration.average_of_files import averages
from lightning_bn.functional.recalibration.precise_bn import recalibrate
from lightning_bn.functional.recalibration.result import AllFrozenError, Recalibration
from lightning_bn.functional.statistics.file_entries import FileEntry, state_dicts_in
from lightning_bn.functional.statistics.files import check_out, read_checkpoint
from lightning_bn.functional.statistics.recalibration_record import RecalibratedLayer, total_of

_COUNTER = "num_batches_tracked"
_KEPT_BESIDE = ("current_model_state", "averaging_state")
"""What WeightAveraging saves beside the averages."""


@dataclass(frozen=True)
class RecalibratedCheckpoint:
    """What became of a checkpoint.

    Attributes:
        path: Where the new one is.
        averaged: Whether the weights in it are averages, as WeightAveraging saves them.
        recalibration: What was done to the statistics.
        found: Where in the file the model's weights were, if not under the same names; empty otherwise.
        entries_left: Other state dicts of the same layers in the file, by key, such as averaged weights; left as they
            were. What a callback keeps, and the weights beside Lightning's averages, are none of them.
        files: Names of the files whose average was recalibrated; empty for a single one.
        not_in_model: BatchNorm layers of the file that the model lacks, by their names in the file; left as they were.
        tasks_left: Tasks whose statistics lie in the file beside the model's own; left as they were.
    """

    path: Path
    averaged: bool
    recalibration: Recalibration
    found: str = ""
    not_in_model: tuple[str, ...] = ()
    tasks_left: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    entries_left: tuple[str, ...] = ()

    def __str__(self) -> str:
        weights = "averaged weights" if self.averaged else "weights as saved"
        weights = f"average of {counted(len(self.files), 'file')}, {weights}" if self.files else weights
        said = f"{self.path.name}: {weights}{f' ({self.found})' if self.found else ''}, {self.recalibration}"
        if self.not_in_model:
            layers = counted(len(self.not_in_model), "BatchNorm layer")
            said += f"; {layers} of the file not in the model and left as they were: {quoted(self.not_in_model)}"
        if self.entries_left:
            said += f"; {quoted(self.entries_left)} of the same file left as they were: choose with key"
        return f"{said}; {_left(self.tasks_left)}" if self.tasks_left else said


def recalibrate_checkpoint(
    path: str | Path | Sequence[str | Path],
    model: nn.Module,
    batches: Iterable[Any],
    out: str | Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
    recalibrate_frozen: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> RecalibratedCheckpoint:
    """Write a copy of a checkpoint in which the running statistics are those of ``batches``.

    Nothing in the file is executed (``weights_only=True``). Where a checkpoint of Lightning's WeightAveraging holds
    averages, they are what is recalibrated, since they are its ``state_dict``; the weights being trained, beside them,
    stay as they are. Layers whose running statistics were frozen by a BatchNormFreezer, as the file itself records, are
    left out. Of statistics per task, as TaskBatchNorm saves them, the default task's are recalibrated, since they are
    the model's own; a warning names the others, which stay as they are.

    A record says which layers were recalibrated, from how much, for ``lightning-bn inspect``: under ``"lightning_bn"``
    among the outermost keys of a checkpoint, or in the metadata of a safetensors file. A state dict, and a file of
    nothing but state dicts, get none. Counters of updates stay as they were.

    Of several files the weights are averaged first (a "model soup"): no file's statistics are those of the average. All
    else in the new file is the first one's.

    Args:
        path: A checkpoint of Lightning, a state dict, one nested in other things, or a ``.safetensors`` file; or a list
            of those of one model.
        model: Takes the weights, which it holds afterwards: the LightningModule itself, or the network in it.
        batches: As for :func:`~lightning_bn.functional.recalibrate`.
        out: Where to write, in the format of its suffix. The file appears when it is complete.
        key: Of the state dict in the file, outer keys first with dots between, for instance ``"ema"``; None takes the
            one that fits, and of Lightning's checkpoints ``"state_dict"``.
        prefix: What the names in the file have before those of ``model``, for instance ``"model."``; None takes the one
            that fits.
        recalibrate_frozen: Whether to recalibrate layers too that the file records as frozen.
        overwrite: Whether ``out`` may exist already, or be ``path``.
        **options: All others of ``recalibrate``.

    Raises:
        FileExistsError: If ``out`` exists and ``overwrite`` is not given; nothing is read then.
        IsADirectoryError: If ``out`` is a folder; nothing is read then.
        IsADirectoryError: If ``path`` is a folder, as sharded checkpoints are, and not a list of files.
        ModuleNotFoundError: If the format needs a package that is not installed.
        ValueError: If the file cannot be read or holds no state dict, if none or more than one place in it fits
            ``model``, if ``out`` cannot hold what it holds, or if its dtype cannot hold a population statistic; if
            ``model`` has statistics per task; if several files have other whole numbers; and as for ``recalibrate``.
            Nothing is written then.
        pickle.UnpicklingError: If the file holds more than tensors and plain values.

    Source: Wortsman et al. (2022), "Model soups", arXiv 2203.05482; Izmailov et al. (2018), arXiv 1803.05407, section
    3.3, on the statistics of averaged weights.
    """
    paths, out = [Path(one) for one in ([path] if isinstance(path, str | Path) else path)], Path(out)
    if not paths:
        raise ValueError("path is an empty list: name a checkpoint.")
    check_out(out, overwrite)
    _refuse_sets(model)
    checkpoint = read_checkpoint(paths[0])
    checkpoint.refuse_format(out)
    wanted = {
        name: value.shape if isinstance(value, Tensor) and not is_lazy(value) else None
        for name, value in model.state_dict().items()
        if name.rpartition(".")[2] != _COUNTER  # torch too loads what older versions saved without it
    }
    entry = checkpoint.entry(wanted, type(model).__name__, key=key, prefix=prefix)
    for value, average in averages(entry, paths[1:], wanted, type(model).__name__, key=key, prefix=prefix).items():
        entry.state[entry.name_of(value)] = average
    _load(model, entry)
    frozen = set() if recalibrate_frozen else _frozen_in(checkpoint.content)
    layers = batch_norm_layers(model)
    try:
        with _marked_frozen(_of_file(model, entry, frozen), checkpoint.path.name):
            recalibration = recalibrate(model, batches, **options)
    except AllFrozenError as error:
        if not frozen:
            raise
        records = f"{checkpoint.path.name} records them as frozen"
        raise AllFrozenError(f"{error} {records}: see recalibrate_frozen=.") from error
    rewritten = {id(layers[name]): name for name in recalibration.layers}
    recorded: dict[str, RecalibratedLayer] = {}
    counts = (recalibration.num_batches, recalibration.num_samples)
    for place, layer in model.named_modules(remove_duplicate=False):  # by all names, wrappers' components included
        if id(layer) in rewritten:
            written = []
            for value in ("running_mean", "running_var"):
                own = f"{place}.{value}" if place else value
                if own in entry.names:
                    there, statistics = entry.names[own], getattr(layer, value)
                    entry.state[there] = _narrowed(statistics, entry.state[there].dtype, rewritten[id(layer)], value)
                    written.append(entry.state[there])
            if len(written) == 2 and options.get("prior") is None:  # with it, part of the old ones is in the new ones
                recorded[there.rpartition(".")[0]] = RecalibratedLayer(total_of(*written), *counts)
    checkpoint.recalibrated(entry.key, recorded, out).write(out)
    tasks_left = _other_tasks_in(checkpoint.content)
    if tasks_left:
        warnings.warn(f"recalibrate_checkpoint: {_left(tasks_left)}", UserWarning, stacklevel=2)
    known = set(entry.names.values())
    others = [name for name in entry.state if name.endswith("running_mean") and name not in known]
    averaged = "averaging_state" in checkpoint.content and entry.key == "state_dict"
    not_in_model = tuple(name.removesuffix("running_mean").rstrip(".") for name in others)
    files = tuple(one.name for one in paths) if len(paths) > 1 else ()
    left = (not_in_model, tasks_left, files, _other_entries_in(checkpoint.content, entry))
    return RecalibratedCheckpoint(out, averaged, recalibration, str(entry), *left)


def _other_entries_in(content: Mapping[str, Any], entry: FileEntry) -> tuple[str, ...]:
    """Keys of other state dicts that have running statistics of the same names."""
    own = {name for name in entry.names.values() if name.endswith("running_mean")}
    others = {key: state for key, state in state_dicts_in(content).items() if key not in (entry.key, *_KEPT_BESIDE)}
    return tuple(
        key
        for key, state in others.items()
        if not key.startswith("callbacks.") and own & {without_wrappers(name) for name in state} | (own & state.keys())
    )


def _load(model: nn.Module, entry: FileEntry) -> None:
    own = model.state_dict()
    fitting = OrderedDict((name, entry.get(name, value)) for name, value in own.items())
    # Versions of the modules that wrote the file: newer ones migrate what older ones wrote.
    versions = getattr(entry.state, "_metadata", None) or {}
    metadata: dict[str, Any] = {}
    for name, there in entry.names.items():
        while name and there:
            name, there = name.rpartition(".")[0], there.rpartition(".")[0]  # noqa: PLW2901
            if there in versions:
                metadata.setdefault(name, versions[there])
    fitting._metadata = metadata  # type: ignore[attr-defined]
    model.load_state_dict(fitting)


def _frozen_in(content: Mapping[str, Any]) -> set[str]:
    """Names of the layers whose running statistics were frozen by a BatchNormFreezer, as it records them in a file."""
    states = content.get("callbacks")
    found: set[str] = set()
    for key, state in (states if isinstance(states, dict) else {}).items():
        if str(key).startswith("BatchNormFreezer") and state.get("settings", {}).get("stats", True):
            found |= {without_wrappers(name) for name in state.get("report", {}).get("layers", ())}
    return found


def _refuse_sets(model: nn.Module) -> None:
    """Raise where a model is to be read into that holds more than a file's own statistics."""
    named_layers = {name: module for name, module in model.named_modules() if sets_of(module) is not None}
    if named_layers:
        raise ValueError(
            f"BatchNorm layer {quoted(list(named_layers))} of the model has statistics per task, which a checkpoint is "
            f"not read into: release them first. To recalibrate those of all tasks, load them, call recalibrate(..., "
            f"task_of=) and save."
        )


def _other_tasks_in(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Tasks whose statistics a TaskBatchNorm saved in a file, but the default one, whose are the model's own."""
    states = content.get("callbacks")
    found: dict[str, None] = {}
    for key, state in (states if isinstance(states, dict) else {}).items():
        if str(key).startswith("TaskBatchNorm"):
            found |= dict.fromkeys(task for task in state.get("tasks", ()) if task != state.get("default"))
    return tuple(found)


def _left(tasks: Sequence[str]) -> str:
    return (
        f"the file has statistics of the task{'s' * (len(tasks) > 1)} {quoted(tasks, len(tasks))} too, which were left "
        f"as they were"
    )


def _of_file(model: nn.Module, entry: FileEntry, frozen: set[str]) -> list[_BatchNorm]:
    """The layers of the model that have one of these names in the file."""
    found = {}
    for place, layer in model.named_modules(remove_duplicate=False):
        there = entry.names.get(f"{place}.running_mean" if place else "running_mean", "").rpartition(".")[0]
        if isinstance(layer, _BatchNorm) and there and without_wrappers(there) in frozen:
            found[id(layer)] = layer
    return list(found.values())


@contextmanager
def _marked_frozen(layers: list[_BatchNorm], owner: str) -> Iterator[None]:
    """Record for a while that the layers are frozen, so that they are left alone and counted as such."""
    before = [layer_status(layer).stats_frozen_by for layer in layers]
    try:
        for layer, owners in zip(layers, before, strict=True):
            update_status(layer, stats_frozen_by=(*owners, owner))
        yield
    finally:
        for layer, owners in zip(layers, before, strict=True):
            update_status(layer, stats_frozen_by=owners)


def _narrowed(values: Tensor, dtype: torch.dtype, layer: str, value: str) -> Tensor:
    """The values as the file has them.

    Raises:
        ValueError: If its dtype cannot hold them.
    """
    narrow = values.detach().to("cpu", dtype, copy=True)
    if not narrow.isfinite().all():
        raise ValueError(
            f"BatchNorm layer {named(layer)}: its {value} reaches {float(values.abs().max()):.6g}, and {dtype} "
            f"in the file "
            f"ends at {torch.finfo(dtype).max:.6g}. Nothing was written: save the file's running statistics as float32 "
            f"first, or leave the layer out with exclude=."
        )
    return narrow
