"""Recalibration of a checkpoint in hand: read, recalibrated, written anew with everything else as it was."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import named, quoted
from lightning_bn.functional.layers.names import without_wrappers
from lightning_bn.functional.layers.properties import is_lazy
from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.layers.sets_per_task import sets_of
from lightning_bn.functional.layers.status import layer_status, update_status
from lightning_bn.functional.recalibration.average_of_files import average
from lightning_bn.functional.recalibration.lacking_statistics import (
    FoundEntry,
    found_entry,
    layers_of,
    refuse_lacking,
    refuse_prior,
    refuse_unlike,
)
from lightning_bn.functional.recalibration.precise_bn import recalibrate
from lightning_bn.functional.recalibration.recalibrated_checkpoint import RecalibratedCheckpoint, tasks_in_words
from lightning_bn.functional.recalibration.result import AllFrozenError
from lightning_bn.functional.statistics.callbacks_in_file import frozen_in, other_tasks_in
from lightning_bn.functional.statistics.file_entries import FileEntry, state_dicts_in
from lightning_bn.functional.statistics.files import CheckpointFile, read_checkpoint
from lightning_bn.functional.statistics.recalibration_record import RecalibratedLayer, total_of
from lightning_bn.functional.statistics.writable import check_out

_COUNTER = "num_batches_tracked"
_KEPT_BESIDE = ("current_model_state", "averaging_state")
"""What WeightAveraging saves beside the averages."""


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

    Running statistics that the file lacks are added. Where it lacks anything else of the model, it is refused.

    A record says which layers were recalibrated, from how much, for ``lightning-bn inspect``: under ``"lightning_bn"``
    among the outermost keys of a checkpoint, or in the metadata of a safetensors file. A state dict, and a file of
    nothing but state dicts, get none. Counters of updates stay as they were.

    Of several files the weights are averaged first (a "model soup"): no file's statistics are those of the average. All
    else in the new file is the first one's.

    Args:
        path: A checkpoint of Lightning, a state dict, one nested in other things, or a ``.safetensors`` file; the index
            of a checkpoint in several files (``model.safetensors.index.json``), or a folder that holds one of these; or
            a list of those of one model.
        model: Takes the weights, which it holds afterwards: the LightningModule itself, or the network in it.
        batches: As for :func:`~lightning_bn.functional.recalibrate`.
        out: Where to write, in the format of its suffix, also what came in several files. The file appears when it is
            complete.
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
        IsADirectoryError: If ``path`` is a folder that has to be put together first, as those of FSDP and DeepSpeed.
        FileNotFoundError: If there is no such file, or a shard is missing.
        ModuleNotFoundError: If the format needs a package that is not installed.
        ValueError: If the file cannot be read or holds no state dict, if none or more than one place in it fits
            ``model`` or what is there is no value of the model (quantized, sparse, without values), if ``out`` cannot
            hold what it holds, or if its dtype cannot hold a population statistic; if ``model`` has statistics per
            task; if several files have other whole numbers; and as for ``recalibrate``. Nothing is written then.
        pickle.UnpicklingError: If the file holds more than tensors and plain values.

    Source: Wortsman et al. (2022), "Model soups", arXiv 2203.05482; Izmailov et al. (2018), arXiv 1803.05407, section
    3.3, on the statistics of averaged weights.
    """
    paths = [Path(one) for one in ([path] if isinstance(path, str | Path) else path)]
    if not paths:
        raise ValueError("path is an empty list: name a checkpoint.")
    check_out(out, overwrite)
    out = Path(out)
    _refuse_sets(model)
    checkpoint = read_checkpoint(paths[0])
    checkpoint.refuse_format(out)
    held = model.state_dict()
    wanted = {
        name: value.shape if isinstance(value, Tensor) and not is_lazy(value) else None
        for name, value in held.items()
        if name.rpartition(".")[2] != _COUNTER  # torch too loads what older versions saved without it
    }

    def find(file: CheckpointFile) -> FoundEntry:
        found = found_entry(file, model, wanted, key, prefix)
        refuse_unlike(file.path.name, found.entry, held)
        return found

    entry, lacking = average(find(checkpoint), paths[1:], find)
    refuse_prior(checkpoint.path.name, lacking, options.get("prior"))
    _load(model, entry)
    frozen = set() if recalibrate_frozen else frozen_in(checkpoint.content)
    layers = batch_norm_layers(model)
    try:
        with _marked_frozen(_of_file(model, entry, frozen), checkpoint.path.name):
            recalibration = recalibrate(model, batches, **options)
    except AllFrozenError as error:
        if not frozen:
            raise
        records = f"{checkpoint.path.name} records them as frozen"
        raise AllFrozenError(f"{error} {records}: see recalibrate_frozen=.") from error
    rewritten, unfilled = {id(layers[name]): name for name in recalibration.layers}, set(lacking)
    recorded: dict[str, RecalibratedLayer] = {}
    counts = (recalibration.num_batches, recalibration.num_samples)
    for place, layer in model.named_modules(remove_duplicate=False):  # by all names, wrappers' components included
        if id(layer) in rewritten:
            written = []
            for value in ("running_mean", "running_var"):
                own = f"{place}.{value}" if place else value
                if own in entry.names:
                    there, statistics = entry.names[own], getattr(layer, value)
                    dtype = entry.state.get(there, statistics).dtype
                    entry.state[there] = _narrowed(statistics, dtype, rewritten[id(layer)], value)
                    if own in lacking:
                        _add_counter(entry, place, layer)
                        unfilled.discard(own)
                    written.append(entry.state[there])
            if len(written) == 2 and options.get("prior") is None:  # with it, part of the old ones is in the new ones
                recorded[there.rpartition(".")[0]] = RecalibratedLayer(total_of(*written), *counts)
    refuse_lacking(checkpoint.path.name, unfilled)
    checkpoint.recalibrated(entry.key, recorded, out).write(out)
    tasks_left = other_tasks_in(checkpoint.content)
    if tasks_left:
        warnings.warn(f"recalibrate_checkpoint: {tasks_in_words(tasks_left)}", UserWarning, stacklevel=2)
    known = set(entry.names.values())
    others = [name for name in entry.state if name.endswith("running_mean") and name not in known]
    averaged = "averaging_state" in checkpoint.content and entry.key == "state_dict"
    not_in_model = tuple(name.removesuffix("running_mean").rstrip(".") for name in others)
    files = tuple(one.name for one in paths) if len(paths) > 1 else ()
    left = (not_in_model, tasks_left, files, _other_entries_in(checkpoint.content, entry))
    added, shards = tuple(layers_of(lacking)), len(checkpoint.shards.files) if checkpoint.shards else 0
    return RecalibratedCheckpoint(out, averaged, recalibration, str(entry), *left, added=added, shards=shards)


def _add_counter(entry: FileEntry, place: str, layer: _BatchNorm) -> None:
    """Of a layer whose statistics are added: torch expects all three, or none."""
    there = entry.name_of(f"{place}.{_COUNTER}" if place else _COUNTER)
    if there not in entry.state and layer.num_batches_tracked is not None:
        entry.state[there] = layer.num_batches_tracked.detach().to("cpu", copy=True)


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


def _refuse_sets(model: nn.Module) -> None:
    """Raise where a model is to be read into that holds more than a file's own statistics."""
    named_layers = {name: module for name, module in model.named_modules() if sets_of(module) is not None}
    if named_layers:
        raise ValueError(
            f"BatchNorm layer {quoted(list(named_layers))} of the model has statistics per task, which a checkpoint is "
            f"not read into: release them first. To recalibrate those of all tasks, load them, call recalibrate(..., "
            f"task_of=) and save."
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
