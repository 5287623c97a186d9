"""Statistics per task that lie in a checkpoint, compared without the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bn.functional._checks import check_choice
from lightning_bn.functional._text import named, quoted
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.claimed_values import distinct, unreadable
from lightning_bn.functional.statistics.drift_measures import MEASURES, Measure
from lightning_bn.functional.statistics.file_entries import FileEntry, find_entry
from lightning_bn.functional.statistics.opened_files import open_checkpoint
from lightning_bn.functional.statistics.snapshots import Snapshot
from lightning_bn.functional.tasks.drift import TaskDrift, drift_between

_EPS = 1e-5
"""torch's own; a file does not say a layer's."""
_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class TasksInFile:
    """Statistics per task of one callback, or of one bank, in a checkpoint.

    Attributes:
        key: Where its state is in the file, outer keys first with dots between.
        tasks: Names of the tasks.
        default: The one whose statistics are those of the model's own state dict.
        updates: Of each task's statistics, the most of any layer; None where no layer has a counter.
        drift: How far they lie apart; without those that were never updated, where two others remain.
        missing: The default task, if the file has not one state dict with its statistics; empty otherwise.
    """

    key: str
    tasks: tuple[str, ...]
    default: str
    updates: Mapping[str, int | None]
    drift: TaskDrift
    missing: str = ""

    @property
    def unseen(self) -> list[str]:
        """Tasks without any update: what lies in their sets is what they began with."""
        return [task for task, count in self.updates.items() if count == 0]


def tasks_in_file(path: str | Path, measure: Measure = "jeffreys") -> list[TasksInFile]:
    """Return the statistics per task in a checkpoint, and how far they lie apart; nothing in it is executed.

    Args:
        path: A checkpoint of Lightning saved with a TaskBatchNorm callback, or a file with the state dict of a bank.
        measure: As for :func:`~lightning_bn.functional.drift`.

    Raises:
        ValueError: If it is no checkpoint, or has no statistics of at least two tasks.
        OSError: If it cannot be read.
        pickle.UnpicklingError: If it holds more than tensors and plain values.

    Example:
        >>> import tempfile
        >>> from lightning_bn.functional import task_statistics
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> bank = task_statistics(model, ["near", "far"])
        >>> with bank.task("far"):
        ...     _ = model(torch.tensor([[9.0], [11.0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": model.state_dict(), "bank": bank.state_dict()}, f"{folder}/both.pt")
        ...     [found] = tasks_in_file(f"{folder}/both.pt")
        >>> found.drift.suggest(), found.unseen
        (['0'], ['near'])
    """
    check_choice("measure", measure, MEASURES)
    file = open_checkpoint(path)
    states = dict(_banks(file.content))
    if not states:
        raise ValueError(
            f"{file.path.name} has no statistics per task: it holds neither a TaskBatchNorm callback nor a state dict "
            "of task_statistics. The statistics in its state dict are used for all tasks."
        )
    return [_read(key, state, file.content, file.size, measure) for key, state in states.items()]


def _banks(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """States of banks: in the file, in an entry of it, or among a Lightning checkpoint's callbacks."""
    callbacks = content.get("callbacks")
    places = [("", content), *content.items()]
    places += [(f"callbacks.{key}", one) for key, one in (callbacks if isinstance(callbacks, dict) else {}).items()]
    for key, one in places:
        if _is_bank(one) and isinstance(key, str | int):
            yield str(key), one


def _is_bank(value: Any) -> bool:
    return isinstance(value, dict) and {"layers", "tasks", "default", "sets"} <= value.keys()


def _read(key: str, state: Mapping[str, Any], content: dict[Any, Any], size: int, measure: Measure) -> TasksInFile:
    tasks, layers, default = state["tasks"], state["layers"], state["default"]
    if not all(isinstance(one, list | tuple) for one in (tasks, layers)) or not all(
        isinstance(one, str) for one in (*tasks, *layers, default)
    ):
        raise ValueError(
            f"the statistics per task under {key!r} name no tasks and layers: they were changed after they were saved."
        )
    if not layers or not isinstance(state["sets"], dict):
        raise ValueError(
            f"the statistics per task under {key!r} name no layer: they were changed after they were saved."
        )
    own = _own(content, layers)
    values = {task: state["sets"].get(task, {}) for task in tasks if task != default}
    found = {task: _layers(task, of_task.get, layers, size) for task, of_task in values.items()}
    if own is not None:
        found = {default: _layers(default, own.get, layers, size), **found}
    if len(found) < 2:
        raise ValueError(
            f"{key!r} has statistics of only one task, {quoted([*found])}: to compare tasks, two or more are needed."
        )
    updates = {task: _updates(of_task) for task, of_task in found.items()}
    seen = {task: found[task] for task, count in updates.items() if count != 0}
    # What no batch has moved says nothing of its task.
    snapshots = {task: _snapshot(of_task) for task, of_task in (seen if len(seen) > 1 else found).items()}
    return TasksInFile(
        key=key,
        tasks=tuple(found),
        default=default,
        updates=updates,
        drift=drift_between(snapshots, measure, _without_sets(own, layers)),
        missing="" if own is not None else default,
    )


def _own(content: dict[Any, Any], layers: list[str]) -> FileEntry | None:
    """The model's own state dict, under whatever prefix; None if there is none, or not a single one."""
    wanted = {f"{name}.{part}": None for name in layers for part in _STATISTICS}
    try:
        return find_entry(
            {name: one for name, one in content.items() if name != "callbacks" and not _is_bank(one)}, wanted, ""
        )
    except ValueError:
        return None


def _without_sets(own: FileEntry | None, layers: list[str]) -> list[str]:
    """Names of the model's other layers with running statistics, as the model has them."""
    if own is None:
        return []
    start = len(own.prefix)
    names = [name.rpartition(".")[0] for name in own.state if name.endswith(f".{_STATISTICS[0]}")]
    return [short for name in names if (short := name[start:]) not in layers and name.startswith(own.prefix)]


def _layers(task: str, get: Any, layers: list[str], size: int) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name in layers:
        parts = {part: get(f"{name}.{part}") for part in (*_STATISTICS, _COUNTER)}
        mean, var = (parts[part] for part in _STATISTICS)
        if not (_is_whole(mean) and _is_whole(var) and mean.shape == var.shape):
            raise ValueError(
                f"task {task!r}: BatchNorm layer {named(name)} lacks a mean or a variance with one value per channel: "
                "the statistics were changed after they were saved."
            )
        found[name] = {part: one for part, one in parts.items() if isinstance(one, Tensor)}
    distinct(found, size)
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and unreadable(value) is None and value.dim() == 1 and len(value) > 0


def _snapshot(layers: Mapping[str, Mapping[str, Tensor]]) -> Snapshot:
    layout = ChannelLayout(tuple(layers), tuple(len(parts[_STATISTICS[0]]) for parts in layers.values()))
    mean, var = (torch.cat([parts[part].double() for parts in layers.values()]) for part in _STATISTICS)
    unknown = torch.full((len(layout),), -1)
    return Snapshot(layout, mean, var, unknown, torch.ones_like(mean), (_EPS,) * len(layout))


def _updates(layers: Mapping[str, Mapping[str, Tensor]]) -> int | None:
    counters = [parts[_COUNTER] for parts in layers.values() if _COUNTER in parts]
    known = [float(one.double()) for one in counters if one.numel() == 1 and unreadable(one) is None]
    return max((int(one) for one in known if 0 <= one < 2**62), default=None)
