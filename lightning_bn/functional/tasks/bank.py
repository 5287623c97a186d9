"""A set of running statistics for each task, in the place of the layers' own while the task runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._checks import check_choice
from lightning_bn.functional._tasks import task as running_task
from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.statistics.snapshots import Snapshot, snapshot_of, write_snapshot
from lightning_bn.functional.tasks.beginning import Beginnings
from lightning_bn.functional.tasks.mixture import mixture_of
from lightning_bn.functional.tasks.outside import OutsideOfContexts
from lightning_bn.functional.tasks.placed_sets import PlacedSets
from lightning_bn.functional.tasks.rows import by_row
from lightning_bn.functional.tasks.saved_sets import sets_in, state_of
from lightning_bn.functional.tasks.task_sets import Buffers, check_known, checked_tasks, write_sets

Start: TypeAlias = Literal["cumulative", "shared"]


class TaskStatistics:
    """Running statistics of several tasks; :func:`~lightning_bn.functional.task_statistics` makes one.

    Attributes:
        tasks: Names of the tasks.
        default: The one that owns the layers' own tensors.
        start: How the others begin.
        outside: What moved the default's statistics outside of any context.
        task_of: Tells the task of a training batch and its index, for a recalibration; None where only contexts do.
    """

    def __init__(
        self, model: nn.Module, tasks: Sequence[str], selection: LayerSelection, *, default: str | None, start: Start
    ) -> None:
        names = checked_tasks(tasks)
        self.default = names[0] if default is None else default
        check_choice("default", self.default, names)
        check_choice("start", start, get_args(Start))
        self.tasks, self.start = tuple(names), start
        self._placed = PlacedSets(model, selection, self.default, self)
        self._beginnings = Beginnings()
        self.outside = OutsideOfContexts(self.default)
        self.task_of: Callable[[Any, int], str | None] | None = None
        for task in self.tasks:
            if task != self.default:
                self._begin(task)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(self._placed.layers)

    @property
    def layers_by_name(self) -> dict[str, _BatchNorm]:
        """The layers."""
        return dict(self._placed.layers)

    @property
    def all_layers(self) -> tuple[str, ...]:
        """Names of all BatchNorm layers of the model, also of those without sets."""
        return self._placed.all_layers()

    @property
    def running(self) -> str:
        """The task whose statistics lie in the layers."""
        return self._placed.running

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Inside, the layers hold the statistics of a task; contexts may be nested, the innermost counts.

        It is a context of :func:`lightning_bn.task` as well: who listens to these is told.

        Raises:
            ValueError: If there is no such task.
            ExchangeError: At the end, if something else that was put into a layer inside was not taken out.
        """
        self.known(name)
        with running_task(name), self.in_place(name):
            yield

    @contextmanager
    def rows(self, tasks: Sequence[str]) -> Iterator[None]:
        """Inside, each sample of a batch belongs to a task of its own: ``with bank.rows(["det", "seg", "det"]):``.

        In train mode the samples of each task are normalized with their own mean and variance and move that task's
        statistics, and in eval mode with the task's; a task that is not there is not updated. Nobody is told of it.
        A :meth:`task` inside counts until it ends. Put the backward inside too where it runs forwards again.

        Args:
            tasks: One name for each sample, in their order.

        Raises:
            ValueError: For an unknown task or none; in a forward, for another number of rows than names, or in train
                mode one value per channel of a task, before the layer's statistics are written.
            RuntimeError: If a layer is being recalibrated, is synchronized with others, or holds what others put there.
        """
        with by_row(self._placed, tasks, self.in_place):
            yield

    @contextmanager
    def in_place(self, task: str) -> Iterator[None]:
        """As :meth:`task`, and nobody is told of it."""
        placed = self._placed
        if placed.is_on_top(self.known(task)):
            yield
            return
        self.look_outside()
        placed.resolve()
        try:
            with self._beginnings.around(task, lambda: placed.sets[task], placed.layers), placed.in_place(task):
                yield
        finally:
            self.outside.seen(placed)

    @contextmanager
    def at_rest(self, task: str) -> Iterator[None]:
        """As :meth:`in_place`, with what a task holds outside of its contexts: to be read, or written to."""
        placed = self._placed
        with self._beginnings.ended(self.known(task), lambda: placed.sets[task], placed.layers), placed.in_place(task):
            yield

    def look_outside(self) -> None:
        """Tell of what moved the default's statistics outside of contexts."""
        if not self._placed.stack:
            self.outside.look(self._placed)

    def resolve(self) -> None:
        """Look what others have put into the layers, as ``.to()`` does; the sets go along."""
        self._placed.resolve()

    def home_of(self, layer: _BatchNorm, task: str) -> dict[str, Any]:
        """Where a task's tensors of a layer are kept, whichever lie in the layer."""
        return self._placed.home_of(layer, self.known(task))

    def wrote(self, task: str) -> None:
        """A task's tensors were written to: it goes on from there as an ordinary moving average."""
        self._placed.see_own()
        self._beginnings.drop(task)

    def parts(self) -> list[tuple[str, dict[str, Buffers]]]:
        """Return the tasks and their tensors by layer, the very ones."""
        self._placed.resolve()
        return [(task, self._placed.sets[task]) for task in self.tasks]

    def is_of(self, model: nn.Module) -> bool:
        """Whether these are statistics of a model's layers."""
        return self._placed.model is model

    def attach(self) -> None:
        """Have others know again that the layers have these statistics.

        Raises:
            RuntimeError: If a layer has others by now.
        """
        self._placed.attach()

    def detach(self) -> None:
        """Leave no trace on the layers, which hold their own tensors; the statistics can still be read and written."""
        self._placed.detach()

    def snapshot(self, task: str) -> Snapshot:
        """Return copies of a task's statistics."""
        with self.at_rest(task):
            return snapshot_of(self._placed.layers)

    def write(self, task: str, snapshot: Snapshot) -> None:
        """Write a snapshot into a task's statistics, which then go on from there as an ordinary moving average.

        Raises:
            ValueError: If there is no such task, or the snapshot is of other layers.
        """
        if snapshot.names != self.layers:
            raise ValueError(
                f"the snapshot is of layers {quoted(snapshot.names)}, the statistics per task are of layers "
                f"{quoted(self.layers)}: take a snapshot of the same layers."
            )
        with self.at_rest(task):
            write_snapshot(self._placed.layers, snapshot)
            self.wrote(task)

    def add(self, task: str, like: str | None = None) -> None:
        """Add a task.

        Args:
            task: Its name.
            like: The task whose statistics it begins from, and goes on with; None: from the default's, as ``start``
                says.

        Raises:
            ValueError: If the name cannot be one or is known already, or there is no task ``like``.
        """
        names = tuple(checked_tasks([*self.tasks, task]))
        if like is None:
            self._begin(task)
        else:
            self._placed.put(task, self._placed.copy(self.known(like)))
        self.tasks = names

    def remove(self, task: str) -> None:
        """Give up a task's statistics.

        Raises:
            ValueError: If there is no such task, it is the default, or it runs.
        """
        if self.known(task) in (self.default, *self._placed.stack):
            raise ValueError(f"task {task!r} cannot be removed: it is running, or it is the default task.")
        self.tasks = tuple(other for other in self.tasks if other != task)
        self._placed.put(task, None)
        self._beginnings.drop(task)

    def mixture(self, weights: Mapping[str, float] | None = None) -> Snapshot:
        """Return the statistics of all tasks together: the mean of means; the mean of variances plus that of means.

        Args:
            weights: Of the tasks, for instance their numbers of samples; None for equal ones. Tasks that are not named
                have none.

        Raises:
            ValueError: If a weight is negative, all are 0, or there is no such task.

        Source: the law of total variance.
        """
        given = dict.fromkeys(self.tasks, 1.0) if weights is None else dict(weights)
        return mixture_of({self.known(task): self.snapshot(task) for task in given}, given)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: all but the default's statistics, which are the model's own state."""
        self._placed.resolve()
        sets = {task: self._placed.sets[task] for task in self.tasks}
        return state_of(sets, self.default, start=self.start, beginning=self._beginnings.tasks())

    def load_state_dict(self, state: Mapping[str, Any], *, given_up: Sequence[str] = ()) -> list[str]:
        """Take statistics that were saved; call it after the model's own state was loaded.

        Args:
            state: Of :meth:`state_dict`.
            given_up: Tasks of it that are not wanted any more.

        Returns:
            What is to be told: tasks that are new, and another default.

        Raises:
            ValueError: If it has other layers or channels, or a task that is neither known here nor given up. Nothing
                was changed then.
        """
        placed, told = self._placed, []
        placed.resolve()
        read = sets_in(state, placed.own, self.tasks, given_up)
        if state["default"] != self.default:
            # The model's own state is the saved default's.
            read |= {state["default"]: placed.copy(self.default)} if state["default"] in self.tasks else {}
            told.append(f"the default task was {state['default']!r} when this was saved, and is {self.default!r} now")
        new = [task for task in self.tasks if task not in state["tasks"] and task != self.default]
        for task, sets in read.items():
            write_sets(sets, placed.sets[task])
        beginning = [task for task in state.get("beginning", ()) if task in self.tasks and task != self.default]
        self._beginnings = Beginnings(beginning)
        for task in new:
            self._begin(task)
            told.append(f"task {task!r} is new and begins with the default task's statistics (start={self.start!r})")
        placed.see_own()
        return told

    def release(self, keep: str | None = None) -> None:
        """Give all statistics up but one task's, which the layers' own tensors then hold.

        Args:
            keep: Which; None for the default's.

        Raises:
            ValueError: If there is no such task.
            RuntimeError: Inside a context.
        """
        kept = self.known(self.default if keep is None else keep)
        if self._placed.stack:
            raise RuntimeError(f"the context of task {self.running!r} has not ended: call release() after it.")
        self._placed.resolve()
        if kept != self.default:
            write_sets(self._placed.sets[kept], self._placed.own)
        self._placed.detach()
        self.tasks, self._placed.layers, self._placed.sets = (), {}, {}

    def known(self, task: str) -> str:
        """Return the name of a task; a ``ValueError`` with the closest if there is none."""
        check_known(task, self.tasks)
        return task

    def _begin(self, task: str) -> None:
        """Begin a task's statistics from the default's."""
        self._placed.put(task, self._placed.copy(self.default))
        if self.start == "cumulative":
            self._beginnings.add(task, self._placed.sets[task].values())
