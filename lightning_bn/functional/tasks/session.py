"""One training or evaluation with statistics per task, with or without a Trainer: what to call around each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from lightning_bn.functional._tasks import Listener, end_batch
from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.tasks.bank import TaskStatistics
from lightning_bn.functional.tasks.watch import ForwardWatch

RAISE = "raise"
"""What is done with a batch of which nothing tells the task."""


class UnlabelledBatchError(ValueError):
    """Nothing told which task a batch belongs to."""


class TaskSession:
    """Puts the statistics of a batch's task in place until its end, and those of contexts inside of it.

    Args:
        bank: The statistics.
        unlabelled: ``"raise"``, or the task of batches of which nothing tells theirs.

    Attributes:
        samples: By task, of the batches since :meth:`forget_samples`.
        seen: Tasks that ran in training.

    Raises:
        ValueError: If there is no task ``unlabelled``.
    """

    def __init__(self, bank: TaskStatistics, unlabelled: str = RAISE) -> None:
        self._bank = bank
        self._unlabelled = None if unlabelled == RAISE else bank.known(unlabelled)
        self._listener = Listener(self._enter, self._leave)
        self._in_place = ExitStack()
        self._watch: ForwardWatch | None = None
        self._running: str | None = None
        self._contexts, self._open, self._training = 0, False, False
        self._samples: Mapping[str, int] = {}
        self._rows: list[str] = []
        self.samples: dict[str, int] = {}
        self.seen = set[str]()

    def start_batch(
        self, task: str | Sequence[str] | None, *, samples: Mapping[str, int] | None = None, training: bool = True
    ) -> None:
        """Put a task in place; what an earlier batch that was skipped has left is ended before.

        Args:
            task: The batch's own, or one for each of its rows; None where contexts inside its step tell.
            samples: That a task has in the batch, if it has any: the weight of what this process knows of it.
            training: Whether the batch is trained on.

        Raises:
            ValueError: If there is no such task.
        """
        self.end_skipped_batch()
        self._bank.resolve()
        of_rows = [] if task is None or isinstance(task, str) else list(map(self._bank.known, task))
        own = self._bank.known(task) if isinstance(task, str) else None if of_rows else self._unlabelled
        self._contexts, self._training, self._samples, self._open = 0, training, samples or {}, True
        self._listener.batch_task, self._rows = own, of_rows
        if self._watch is not None and self._watch.layers != self._bank.layers_by_name:
            self._watch.end()
            self._watch = None
        if own is None and not of_rows:
            self._watch_forwards()
        if self._watch is not None:
            self._watch.begin_batch()
        if training:
            self._saw(*dict.fromkeys(of_rows))
        self._listener.begin()

    def end_batch(self) -> None:
        """End what is in place, whatever lies on top of it.

        Raises:
            UnlabelledBatchError: If nothing told the task of what ran in the batch, and ``unlabelled`` is "raise".
        """
        outside = [] if self._watch is None or not self._open else list(self._watch.outside)
        none_told = self._listener.batch_task is None and not self._rows and not self._contexts
        self.end_skipped_batch()
        if outside and none_told:
            done = "moved" if self._training else "was evaluated with"
            raise UnlabelledBatchError(
                f"it is not known which task a batch belongs to that ran {counted(len(outside), 'BatchNorm layer')} "
                f"({quoted(outside)}) and {done} the statistics of the default task {self._bank.default!r}. Say it "
                "with task_key=, with `with lightning_bn.task(name):` around each task's part of the step, or in "
                "evaluation with val_tasks=; unlabelled=<task> gives such batches a task. The tasks are "
                f"{', '.join(self._bank.tasks)}."
            )

    def end_skipped_batch(self) -> None:
        """End what is in place and ask nothing: a batch that a hook skipped, or a failure."""
        if self._open:
            self._open = False
            end_batch()
            self._bank.look_outside()

    def forget_samples(self) -> None:
        """Count anew, after this process and the others have told each other what they know."""
        self.samples = {}

    def close(self) -> None:
        """End what is in place and watch no more."""
        self.end_skipped_batch()
        if self._watch is not None:
            self._watch.end()
        self._watch = None

    def _watch_forwards(self) -> None:
        if self._watch is None:
            self._watch = ForwardWatch(self._bank.layers_by_name, lambda: self._running)

    def _saw(self, *tasks: str) -> None:
        self.seen.update(tasks)
        for task in tasks:
            self.samples[task] = self.samples.get(task, 0) + self._samples.get(task, 0)

    def _enter(self, task: str | None) -> None:
        if task is None:
            if self._rows:
                self._in_place.enter_context(self._bank.rows(self._rows))
            return
        self._in_place.enter_context(self._bank.in_place(task))
        self._running = task
        self._contexts += task != self._listener.batch_task
        if self._contexts:
            self._watch_forwards()
        if self._training:
            self._saw(task)

    def _leave(self) -> None:
        self._running = None
        self._in_place.close()
