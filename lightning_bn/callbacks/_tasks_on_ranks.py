"""Statistics per task on several ranks: which task a batch has, how many samples count for it, and merging them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from lightning_bn.callbacks._lightning.namespaces import Trainer, rank_zero_warn
from lightning_bn.callbacks._ranks import agree_on_task, max_over_ranks
from lightning_bn.functional._batches import num_samples
from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.tasks.across_processes import merge_across_processes
from lightning_bn.functional.tasks.bank import TaskStatistics
from lightning_bn.functional.tasks.session import TaskSession
from lightning_bn.functional.tasks.task_sets import Buffers

_ONE_TASK = (
    "With broadcast buffers or SyncBatchNorm, ranks share the statistics of a batch: let the sampler give all ranks "
    "a batch of the same task, or without SyncBatchNorm use DDPStrategy(broadcast_buffers=False)."
)


Told: TypeAlias = str | list[str] | None
"""A batch's task, or one for each of its rows, or nothing."""


class TasksOnRanks:
    """What ranks tell each other of tasks in a fit; one rank alone tells nobody.

    Args:
        trainer: Of the fit, whose strategy is set up.
        bank: The statistics.
    """

    def __init__(self, trainer: Trainer, bank: TaskStatistics) -> None:
        self._trainer, self._bank, self._warned = trainer, bank, False
        shares = getattr(trainer.strategy.model, "broadcast_buffers", False)
        synchronized = any(processes_of(layer) > 1 for layer in bank.layers_by_name.values())
        self._share = trainer.world_size > 1 and (shares or synchronized)

    def agree(self, own: Callable[[], Told]) -> Told:
        """Return a batch's task, the same on all ranks where they share its statistics; or those of its rows.

        Raises:
            DisagreementError: On every rank, with the task that each has.
        """
        return agree_on_task(self._trainer, "train", own, _ONE_TASK) if self._share else own()

    def samples_in(self, batch: Any, task: Told) -> Mapping[str, int]:
        """Samples that each task may have in a batch, which may hold a part for each of them; by them ranks weigh."""
        if self._trainer.world_size == 1:
            return {}
        if isinstance(task, list):
            return Counter(task)
        parts = batch if isinstance(batch, Mapping) else {}
        whole = num_samples(batch) or 1
        return {task: num_samples(parts[task]) or whole if task in parts else whole for task in self._bank.tasks}

    def merge(self, session: TaskSession, further: Sequence[tuple[str, dict[str, Buffers]]]) -> None:
        """Merge the statistics of all ranks, and further sets of the same tasks, by the samples that each saw."""
        if self._trainer.world_size > 1:
            parts = [*self._bank.parts(), *further]
            merge_across_processes(parts, session.samples, self._trainer.strategy.root_device)
        session.forget_samples()

    def warn_of_unseen(self, seen: set[str]) -> None:
        """Warn of tasks that no rank has seen, in the first epoch; every rank has to call this."""
        if self._warned:
            return
        self._warned = True
        tasks = self._bank.tasks
        flags = torch.tensor([float(task in seen) for task in tasks])
        of_all = max_over_ranks(self._trainer)
        flags = flags if of_all is None else of_all(flags)
        unseen = [task for task, flag in zip(tasks, flags.tolist(), strict=True) if not flag]
        if unseen:
            rank_zero_warn(
                f"TaskBatchNorm: tasks names {quoted(unseen)}, but no batch in epoch {self._trainer.current_epoch} "
                f"was of that task; tasks seen: {quoted(sorted(seen)) or 'none'}. Set task_key= to the key of the "
                "batch that holds the task, or put `with lightning_bn.task(name):` around the task's part of the "
                "step."
            )
