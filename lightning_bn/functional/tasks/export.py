"""A checkpoint of several tasks made into one of a single task, which loads wherever the model does."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_bn.functional._text import named, quoted
from lightning_bn.functional.layers.names import without_wrappers
from lightning_bn.functional.statistics.files import CheckpointFile, read_checkpoint
from lightning_bn.functional.statistics.writable import check_out
from lightning_bn.functional.tasks.task_sets import check_known

CALLBACK = "TaskBatchNorm"
"""Begins the key under which a checkpoint has the statistics per task of a callback."""
_PLACES = {"state_dict": "sets", "current_model_state": "current_sets"}
"""State dicts of a checkpoint, and where the statistics for each lie; the second ones are beside averaged weights."""


def export_task(checkpoint: str | Path, task: str, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a copy of a checkpoint whose state dict holds the running statistics of one task.

    The statistics per task are taken out of the file, so that it is a plain checkpoint of this task: it loads into the
    model alone, without this package. All else in it is bit-identical. Where averaged weights lie in the file, as
    WeightAveraging saves them, the state dict gets the averaged statistics of the task, and ``current_model_state``
    gets those of the weights in training. Nothing in the file is executed (``weights_only=True``).

    Args:
        checkpoint: Of Lightning, saved with a TaskBatchNorm callback.
        task: Its name. Of several TaskBatchNorm callbacks those count that have this task; others stay in the file.
        out: Where to write. The file appears when it is complete.
        overwrite: Whether ``out`` may exist already.

    Returns:
        Where the copy is.

    Warns:
        UserWarning: If no batch of the task had been seen: its statistics are what they began with.

    Raises:
        FileExistsError: If ``out`` exists and ``overwrite`` is not given; nothing is read then.
        IsADirectoryError: If ``out`` or ``checkpoint`` is a folder.
        ValueError: If ``out`` is the checkpoint itself or cannot hold what it holds, if the file cannot be read, has no
            statistics per task or not those of ``task``, if a layer of them is not in a state dict or has other
            channels there, or if statistics for the weights in training are missing. Nothing is written then.
        pickle.UnpicklingError: If the file holds more than tensors and plain values.

    Example:
        >>> import tempfile, torch
        >>> from lightning_bn.functional import task_statistics
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> bank = task_statistics(model, ["near", "far"])
        >>> with bank.task("far"):
        ...     _ = model(torch.tensor([[9.0], [11.0]]))
        >>> saved = {"state_dict": model.state_dict(), "callbacks": {"TaskBatchNorm": bank.state_dict()}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(saved, f"{folder}/both.ckpt")
        ...     exported = torch.load(export_task(f"{folder}/both.ckpt", "far", f"{folder}/far.ckpt"))
        >>> exported["state_dict"]["0.running_mean"], exported["callbacks"]
        (tensor([10.]), {})
    """
    path, out = Path(checkpoint), Path(out)
    if path.exists() and out.exists() and out.samefile(path):
        raise ValueError(
            f"out={str(out)!r} is the checkpoint itself, and the other tasks in it would be lost: name another file."
        )
    check_out(out, overwrite)
    file = read_checkpoint(path)
    file.refuse_format(out)
    for key, state in _states_with(task, file).items():
        if task != state["default"]:  # those are the state dict's own
            for entry, sets in _PLACES.items():
                if entry in file.content:
                    _put(_sets_of(task, state, sets, path.name), file.content[entry], f"{path.name}, {entry}")
            # Not of averages, whose counters are averaged too, and rounded down.
            _warn_of_unseen(task, state.get("current_sets", state["sets"])[task], path.name)
        del file.content["callbacks"][key]
    file.write(out)
    return out


def _states_with(task: str, file: CheckpointFile) -> dict[str, Mapping[str, Any]]:
    """The statistics per task of all callbacks that know a task, by the callbacks' keys.

    Raises:
        ValueError: If there is none.
    """
    callbacks = file.content.get("callbacks")
    states = {
        key: state
        for key, state in (callbacks if isinstance(callbacks, dict) else {}).items()
        if str(key).startswith(CALLBACK) and "sets" in state
    }
    if not states:
        raise ValueError(
            f"{file.path.name} has no statistics per task: none of its callbacks "
            f"({quoted([*(callbacks or ())]) or 'there is none'}) is a {CALLBACK}. The statistics in its state dict "
            "are used for all tasks."
        )
    known = dict.fromkeys(name for state in states.values() for name in state["tasks"])
    check_known(task, tuple(known), f" in {file.path.name}")
    return {key: state for key, state in states.items() if task in state["tasks"]}


def _sets_of(task: str, state: Mapping[str, Any], sets: str, file: str) -> Mapping[str, Tensor]:
    if task not in state.get(sets, {}):
        raise ValueError(
            f"{file} has averaged weights beside those in training, but no {sets!r}, the statistics of task {task!r} "
            f"for the weights in training: {CALLBACK} did not average them. Save without averaging, or export "
            f"{state['default']!r}, whose statistics are in the state dicts."
        )
    found: Mapping[str, Tensor] = state[sets][task]
    return found


def _put(values: Mapping[str, Tensor], state: dict[str, Any], where: str) -> None:
    """Write a task's values into a state dict, under all names that a layer has there.

    Raises:
        ValueError: If a layer is not there, or has other channels.
    """
    bare, aliases = defaultdict(list), defaultdict(list)
    for name, there in state.items():
        bare[without_wrappers(name)].append(name)
        if isinstance(there, Tensor):
            aliases[_memory(there)].append(name)
    places: dict[str, Tensor] = {}
    for full, value in values.items():
        own = full.removeprefix(".")  # of a model that is a layer itself
        wrapped = bare[without_wrappers(own)]
        name = wrapped[0] if own not in state and len(wrapped) == 1 else own
        layer = named(own.rpartition(".")[0])
        if name not in state:
            raise ValueError(
                f"{where}: BatchNorm layer {layer} has statistics per task, and {own!r} is not there: the "
                f"checkpoint was changed after it was saved."
            )
        if state[name].shape != value.shape:
            raise ValueError(
                f"{where}: {own!r} has the shape {tuple(state[name].shape)}, and the statistics per task of BatchNorm "
                f"layer {layer} have {tuple(value.shape)}: they are of another model."
            )
        places |= dict.fromkeys(aliases[_memory(state[name])], value)
    state.update(places)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """The same for the names of one tensor: a layer that a model has twice is loaded once by each of its names."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape


def _warn_of_unseen(task: str, values: Mapping[str, Tensor], file: str) -> None:
    counters = [value for name, value in values.items() if name.endswith("num_batches_tracked")]
    if counters and not any(counters):
        warnings.warn(
            f"{file}: no batch of task {task!r} had been seen, so its statistics are still the initial ones.",
            UserWarning,
            stacklevel=3,
        )
