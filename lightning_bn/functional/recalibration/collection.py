"""What one pass collects: of layers with statistics per task by task, of the others from all batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._tasks import Listener, task
from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.sets_per_task import SetsPerTask, sets_of
from lightning_bn.functional.recalibration.collector import Collector, collecting
from lightning_bn.functional.recalibration.gathered import Gathered
from lightning_bn.functional.recalibration.population import Population

Layers: TypeAlias = Mapping[str, _BatchNorm]
TaskOf: TypeAlias = Callable[[Any], str | None]
Parts: TypeAlias = dict[str | None, dict[str, _BatchNorm]]


def parts_of(layers: Layers, sets: SetsPerTask | None) -> Parts:
    """Return layers, by name, under each task whose statistics they have, and under None those without any."""
    own = {name: layer for name, layer in layers.items() if sets is not None and sets_of(layer) is sets}
    others = {name: layer for name, layer in layers.items() if name not in own}
    parts: Parts = {None: others} if others else {}
    return parts | (dict.fromkeys(sets.tasks, own) if sets is not None and own else {})


class Collection:
    """Collectors of layers with and without statistics per task; :func:`collecting_parts` makes one.

    A batch's own task, and the contexts inside its forward, which count more, tell whose statistics lie in the layers
    that are not collected and to whom that belongs which is. What runs outside of both is the default's, as in
    training.

    Attributes:
        parts: What was gathered, by task; under None of the layers without statistics per task.
        served: Tasks that layers were run for in the last batch.
        running: Tasks of the last batch in the order in which they ran; None for none.
        told: Batches that layers were run for a task in which something told.
        untold: Batches in which layers with statistics per task ran where nothing told.
    """

    def __init__(self, without: Collector | None, by_task: Collector | None, sets: SetsPerTask | None) -> None:
        self._collectors = [one for one in (without, by_task) if one is not None]
        self._by_task, self._sets = by_task, sets
        self.parts: dict[str | None, Gathered] = {}
        for collector in self._collectors:
            self.parts |= collector.parts
        self.served: set[str] = set()
        self.running: list[str | None] = []
        self.told = self.untold = 0
        self._untold = False
        self._listener = Listener(self._enter, self._leave)
        self._in_place = ExitStack()

    @contextmanager
    def batch(self, own: str | None) -> Iterator[None]:
        """Around the forward of a batch, of which a failure leaves nothing.

        Args:
            own: The batch's task; None where contexts tell.
        """
        self.served, self.running, self._untold = set(), [], False
        with ExitStack() as stack:
            for collector in self._collectors:
                stack.enter_context(collector.batch())
            if self._sets is not None:
                if own is not None:
                    stack.enter_context(task(own))
                stack.enter_context(self._listening())
            yield
        self.told += bool(self.served) and any(one is not None for one in self.running)
        self.untold += self._untold

    def populations(self) -> dict[str | None, Population]:
        """Return what was gathered.

        Raises:
            RecalibrationError: As :meth:`Collector.population`.
        """
        return {key: one.population(key) for one in self._collectors for key in one.parts}

    @contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            self._listener.begin()
            yield
        finally:
            self._listener.end()

    def _enter(self, name: str | None) -> None:
        sets = self._sets
        assert sets is not None  # who listens has them
        running = sets.default if name is None else known_task(name, sets, "a context")
        if self._by_task is not None:
            self._by_task.change(running)
        self._in_place.enter_context(sets.in_place(running))
        self.running.append(name)

    def _leave(self) -> None:
        if self._by_task is not None and self.running and self._by_task.called():
            self._untold |= self.running[-1] is None
            self.served.add(self.running[-1] or (self._sets.default if self._sets is not None else ""))
        self._in_place.close()


@contextmanager
def collecting_parts(parts: Parts, sets: SetsPerTask | None) -> Iterator[Collection]:
    """Yield what collects of these layers; see :func:`~.collector.collecting`."""
    tasks = [key for key in parts if key is not None]
    with ExitStack() as stack:
        without = stack.enter_context(collecting(parts[None])) if None in parts else None
        by_task = stack.enter_context(collecting(parts[tasks[0]], tasks)) if tasks else None
        yield Collection(without, by_task, sets)


def known_task(name: Any, sets: SetsPerTask, who: str) -> str:
    """Return the name of a task.

    Raises:
        ValueError: If it is none of the tasks, with these.
    """
    if name not in sets.tasks:
        raise ValueError(
            f"{who} says that a batch, or a part of its forward, belongs to task {name!r}, but there are statistics "
            f"only for the tasks {quoted(sets.tasks, len(sets.tasks))}. Nothing was changed."
        )
    return str(name)


def no_task_told(sets: SetsPerTask) -> str:
    """Return what to say where nothing told the task of any batch."""
    return (
        f"the layers have statistics for each of the tasks {quoted(sets.tasks, len(sets.tasks))}, and it is not known "
        "which task the batches belong to: pass task_of=, a function that returns the task of a batch, or put `with "
        "lightning_bn.task(name):` around each task's part of the forward. To recalibrate the default task alone: "
        f"task_of=lambda batch: {sets.default!r}. Nothing was changed."
    )
