"""What drift is measured from where that is a checkpoint: the layers' own statistics in it, and those of each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import named
from lightning_bn.functional.layers.sets_per_task import sets_of, statistics_by_task
from lightning_bn.functional.monitoring.settings import REFERENCES
from lightning_bn.functional.statistics.file_entries import FileEntry
from lightning_bn.functional.statistics.files import CheckpointFile, read_checkpoint, snapshot_in
from lightning_bn.functional.statistics.snapshots import Snapshot, snapshot_of

_CALLBACK = "TaskBatchNorm"
"""What keeps statistics per task in a checkpoint of Lightning."""


@dataclass(frozen=True)
class SavedReference:
    """Statistics that were read from a checkpoint.

    Attributes:
        own: The layers' own, those of the default task of now where there are several.
        tasks: Those of each task of the layers; of one that the file does not know, the layers' own in the file.
        entry: Where in the file the layers' own are.
    """

    own: Snapshot
    tasks: dict[str, Snapshot]
    entry: FileEntry


def read_reference(reference: str | Path, layers: Mapping[str, _BatchNorm]) -> SavedReference | None:
    """Return the statistics that a checkpoint holds of some layers; nothing in it is executed.

    Args:
        reference: Its path; None is returned where it is another reference, by its name.
        layers: By name.

    Raises:
        ValueError: As for :func:`~lightning_bn.functional.statistics.files.snapshot_of_checkpoint`, or if a task's
            statistics in it have other channels.
        OSError: As for ``snapshot_of_checkpoint``.
        pickle.UnpicklingError: As for ``snapshot_of_checkpoint``.
    """
    if reference in REFERENCES:
        return None
    own_sets, of_tasks = statistics_by_task(layers)
    file = read_checkpoint(reference)
    own, entry = snapshot_in(file, snapshot_of(own_sets))
    tasks = {}
    for task, sets in of_tasks.items():
        tasks[task] = own.only(sets)
        for saved in _saved_sets(file, task):
            tasks[task] = _with_saved(tasks[task], saved, entry, f"{file.path.name}, task {task!r}")
    for task, read in tasks.items():
        defaults = [name for name in read.names if _is_default(layers[name], task)]
        own = _with(own, read.only(defaults)) if defaults else own
    return SavedReference(own, tasks, entry)


def _is_default(layer: _BatchNorm, task: str) -> bool:
    sets = sets_of(layer)
    return sets is not None and sets.default == task


def _saved_sets(file: CheckpointFile, task: str) -> Iterator[Mapping[str, Any]]:
    """Tensors of a task by layer and buffer; none of the file's default task, whose are the model's own."""
    callbacks = file.content.get("callbacks")
    for key, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if str(key).startswith(_CALLBACK) and isinstance(state, Mapping) and task in state.get("sets", {}):
            yield state["sets"][task]


def _with_saved(snapshot: Snapshot, saved: Mapping[str, Any], entry: FileEntry, where: str) -> Snapshot:
    for name, size in zip(snapshot.names, snapshot.layout.sizes, strict=True):
        mean, var, count = (
            saved.get(entry.name_of(f"{name}.{key}" if name else key))
            for key in ("running_mean", "running_var", "num_batches_tracked")
        )
        if mean is None or var is None:
            continue
        if mean.shape != (size,) or var.shape != (size,):
            raise ValueError(
                f"{where}: layer {named(name)} has {len(mean)} channels in the file and {size} in this "
                "model: the file is of another model."
            )
        one = snapshot.only([name])
        counted = one.num_batches_tracked if count is None else count.reshape(1)
        snapshot = _with(snapshot, replace(one, mean=mean, var=var, num_batches_tracked=counted))
    return snapshot


def _with(snapshot: Snapshot, part: Snapshot) -> Snapshot:
    """A snapshot with the statistics of another one for the layers of that."""
    means, variances = snapshot.layout.split(snapshot.mean), snapshot.layout.split(snapshot.var)
    counts = dict(zip(snapshot.names, snapshot.num_batches_tracked, strict=True))
    device = snapshot.mean.device
    for name, count in zip(part.names, part.num_batches_tracked, strict=True):
        means[name] = part.layout.split(part.mean)[name].to(device)
        variances[name] = part.layout.split(part.var)[name].to(device)
        counts[name] = count.to(device)
    return replace(
        snapshot,
        mean=torch.cat([*means.values()]),
        var=torch.cat([*variances.values()]),
        num_batches_tracked=torch.stack([*counts.values()]),
    )
