"""Which task a batch belongs to: one answer for all callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

from lightning_bn.callbacks._lightning.namespaces import MisconfigurationException
from lightning_bn.functional.tasks.task_sets import check_known


class TaskOf:
    """The task of a batch, as a function of it.

    Args:
        task_key: A key of the batch, or the import path (with a dot) of a function of batch and batch index. None: only
            :func:`lightning_bn.task` contexts tell.
        tasks: Those that there are; None where any may come.
        otherwise: The task of batches of which nothing tells theirs; None for an error where there is no such key.

    Raises:
        MisconfigurationException: If the import path leads nowhere or to something that cannot be called.
    """

    def __init__(
        self, task_key: str | None, *, tasks: Sequence[str] | None = None, otherwise: str | None = None
    ) -> None:
        self._key, self._tasks, self._otherwise = task_key, tasks, otherwise
        self._function = _imported(task_key) if task_key is not None and "." in task_key else None

    def __call__(self, batch: Any, batch_idx: int) -> str | None:
        """Return the task of ``batch``, None where only contexts tell.

        Raises:
            MisconfigurationException: If the batch has no such key, or its value is not one task that there is.
        """
        tasks = self.of_rows(batch, batch_idx)
        if tasks is None or isinstance(tasks, str):
            return tasks
        raise MisconfigurationException(
            f"task_key={self._key!r}: one batch holds the tasks {sorted({*tasks})}. Each batch must be of one task; "
            "or put `with lightning_bn.task(name):` around each task's part of the training step."
        )

    def of_rows(self, batch: Any, batch_idx: int) -> str | list[str] | None:
        """Return the task of ``batch``, or where they differ that of each of its samples.

        Raises:
            MisconfigurationException: If the batch has no such key, or its value holds no task that there is.
        """
        told = self._told(batch, batch_idx)
        tasks = _in_names(told, str(self._key))
        if tasks is None:
            return self._otherwise
        for task in dict.fromkeys(tasks if self._tasks is not None else ()):
            try:
                check_known(task, self._tasks or ())
            except ValueError as error:
                raise MisconfigurationException(f"task_key={self._key!r}: batch {batch_idx}: {error}") from error
        return tasks[0] if len({*tasks}) == 1 else tasks

    def _told(self, batch: Any, batch_idx: int) -> Any:
        """What the function or the key says; None for nothing."""
        if self._function is not None:
            return self._function(batch, batch_idx)
        if self._key is None:
            return None
        if not isinstance(batch, Mapping) or self._key not in batch:
            if self._otherwise is not None:
                return None
            there = f"has only the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else "has no keys"
            raise MisconfigurationException(
                f"task_key={self._key!r}: the batch is a {type(batch).__name__} that {there}. Name a key of the batch, "
                f"or give the import path of a function of batch and batch index that returns the task."
            )
        return batch[self._key]


def _in_names(value: Any, key: str) -> list[str] | None:
    """The one task that a value says, or one for each sample; None where it says nothing."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None if value is None else [str(value)]
    # A default collate makes a list of the samples' tasks.
    told = [one.item() if isinstance(one, Tensor) else one for one in value]
    untold = sum(one is None for one in told)
    if not told or 0 < untold < len(told):
        raise MisconfigurationException(
            f"task_key={key!r}: one batch holds the tasks {sorted(set(map(str, told)))}. Give one task for the whole "
            "batch, or a task for each sample."
        )
    return None if untold else [str(one) for one in told]


def _imported(path: str) -> Callable[[Any, int], Any]:
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MisconfigurationException(
            f"task_key={path!r} has a dot, so it is read as the import path of a function, but {error}."
        ) from error
    if not callable(function):
        raise MisconfigurationException(f"task_key={path!r} is a {type(function).__name__}, not a function.")
    return function  # type: ignore[no-any-return]
