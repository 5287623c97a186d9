"""The tensors of each task, by layer, and the names that tasks may have."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.torch_private import STATISTICS, buffers_of

MIXTURE = "mixture"
"""All tasks together."""
Buffers = dict[str, Tensor]
"""A layer's running statistics by the names of its buffers; only those that are there."""


def buffers_in(layer: _BatchNorm) -> Buffers:
    """The very tensors that lie in a layer."""
    own = buffers_of(layer)
    return {key: buffer for key in STATISTICS if (buffer := own.get(key)) is not None}


def copies(sets: Mapping[str, Buffers]) -> dict[str, Buffers]:
    """Copies with memory of their own: a view that is saved carries all of its storage."""
    # A Trainer evaluates in inference mode, whose tensors no training may write to.
    with torch.inference_mode(False), torch.no_grad():
        return {name: {key: buffer.detach().clone() for key, buffer in one.items()} for name, one in sets.items()}


@torch.no_grad()
def write_sets(sets: Mapping[str, Buffers], into: Mapping[str, Buffers]) -> None:
    """Write the values of tensors by layer into others, those that are there."""
    for name, one in into.items():
        for key, buffer in one.items():
            buffer.copy_(sets[name][key])


def checked_tasks(tasks: Sequence[str]) -> list[str]:
    """Return the names of tasks.

    Raises:
        ValueError: If there is none, one is given twice, or one is no string, empty, or ``"mixture"``.
    """
    names: list[Any] = [tasks] if isinstance(tasks, str) else list(tasks)
    why = [f"{name!r} is not a name of a task" for name in names if not isinstance(name, str) or name in ("", MIXTURE)]
    why += [f"{name!r} is given twice" for name in names if names.count(name) > 1]
    if why or not names:
        raise ValueError(
            f"tasks={tasks!r}: {why[0] if why else 'no task is given'}. Give each task a different name, a string "
            f"that is not empty; {MIXTURE!r} means all tasks together."
        )
    return names


def check_known(task: str, tasks: Sequence[str], where: str = "") -> None:
    """Raise unless ``task`` is one of ``tasks``; ``where`` follows its name.

    Raises:
        ValueError: With the tasks that there are, and the closest.
    """
    if task not in tasks:
        close = difflib.get_close_matches(str(task), tasks, n=1)
        hint = f" Closest: {close[0]!r}." if close else ""
        raise ValueError(
            f"there is no task {task!r}{where}; the tasks are {', '.join(map(repr, tasks)) or 'none'}.{hint}"
        )
