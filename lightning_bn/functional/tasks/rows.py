"""Batches of several tasks: each row is normalized with, and moves, the statistics of its own task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._tasks import none_begins
from lightning_bn.functional._text import counted, named
from lightning_bn.functional.layers.exchange import holders_of
from lightning_bn.functional.layers.overlay import Overlay, own_class, put_before, take_away
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.layers.torch_private import TORCHS_FORWARDS, attributes_of, buffers_of
from lightning_bn.functional.tasks.placed_sets import PlacedSets
from lightning_bn.functional.tasks.row_parts import evaluated_by_row, put_together, take
from lightning_bn.functional.tasks.task_sets import Buffers, check_known

_MARK = "_lightning_bn_rows"


@contextmanager
def by_row(
    placed: PlacedSets, tasks: Sequence[str], in_place: Callable[[str], AbstractContextManager[None]]
) -> Iterator[None]:
    """Inside, each row of a batch belongs to a task of its own; nobody is told of it.

    The layers hold the default's tensors. A task that begins inside counts until it ends, and so do other rows.

    Args:
        placed: The sets.
        tasks: Of each row.
        in_place: Puts a task's tensors into the layers; a moving average that begins is weighed anew when it ends.

    Raises:
        ValueError: If there is no row, or no such task.
        RuntimeError: If somebody has put another forward on a layer, as a recalibration does.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"rows={tasks!r}: give the name of a task for each sample of the batch, or use task(name).")
    for task in tasks:
        check_known(task, tuple(placed.sets))
    placed.resolve()
    for name, layer in placed.layers.items():
        _refuse_other_forward(name, layer)
    with none_begins(), ExitStack() as stack:
        for task in dict.fromkeys(tasks):
            stack.enter_context(in_place(task))
        stack.enter_context(placed.by_row())
        rows = _Rows(placed, tasks)
        for name, layer in placed.layers.items():
            stack.callback(_take_back, layer, attributes_of(layer).get(_MARK))
            put_before(layer, _ByRow)
            attributes_of(layer)[_MARK] = (name, rows)
        yield


def in_rows(layer: nn.Module) -> bool:
    """Whether the rows of what a layer is given belong to tasks of their own."""
    return _MARK in attributes_of(layer)


def _take_back(layer: _BatchNorm, before: Any) -> None:
    if before is None:
        attributes_of(layer).pop(_MARK, None)
        take_away(layer, _ByRow)
    else:
        attributes_of(layer)[_MARK] = before


def _refuse_other_forward(name: str, layer: _BatchNorm) -> None:
    if "forward" in attributes_of(layer):
        raise RuntimeError(
            f"BatchNorm layer {named(name)} has another forward than that of its class{_by(layer)}, which cannot "
            "handle rows of several tasks: remove that forward first, or run the samples of each task as a separate "
            "batch, with task(name)."
        )


def _by(layer: nn.Module) -> str:
    holders = ", ".join(map(repr, holders_of(layer)))
    return f" (held by {holders})" if holders else ""


class _ByRow(Overlay):
    """Put before the class of a layer whose batch belongs to several tasks."""

    mark = _MARK
    in_copies = False

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        name, rows = self.__dict__.get(_MARK, ("", None))
        forward = super().forward
        if rows is None or not rows.count():
            return forward(input, *args, **kwargs)
        run = torch.compiler.disable(rows.run) if torch.compiler.is_compiling() else rows.run
        return run(name, self, partial(forward, *args, **kwargs) if args or kwargs else forward, input)


class _Rows:
    """Which row belongs to which task.

    Args:
        placed: The sets.
        tasks: Of each row.
    """

    def __init__(self, placed: PlacedSets, tasks: Sequence[str]) -> None:
        self._placed, self._depth = placed, placed.depth
        self._tasks = tuple(dict.fromkeys(tasks))
        places = {task: place for place, task in enumerate(self._tasks)}
        self._which = [places[task] for task in tasks]
        self._counts = [self._which.count(place) for place in range(len(places))]
        self._on: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}

    def count(self) -> bool:
        """Whether no task has begun inside, which counts then."""
        return self._placed.depth == self._depth

    def run(self, name: str, layer: _BatchNorm, forward: Callable[[Tensor], Any], batch: Tensor) -> Any:
        """Return what the layer's forward gives for each task's rows.

        Raises:
            ValueError: If the batch has another number of rows, or in training a task has one value per channel.
            RuntimeError: If the layer cannot be run so. No statistic was changed in either case.
        """
        self._check(name, layer, batch)
        sets = [self._placed.sets[task][name] for task in self._tasks]
        which, indices = self._indices(batch.device)
        fits = len(sets) > 1 and batch.dim() > 1 and batch.shape[1] == layer.num_features and batch.is_contiguous()
        torchs = own_class(layer).forward in TORCHS_FORWARDS and not isinstance(forward, partial)
        if fits and not layer.training and torchs:
            return evaluated_by_row(layer, sets, which, batch)
        if not layer.training and torch.is_grad_enabled():
            # A backward in eval mode reads them, and a later forward in train mode moves them unseen.
            sets = [{key: buffer.clone() for key, buffer in one.items()} for one in sets]
        if len(sets) == 1:
            return _run_with(name, layer, sets[0], forward, batch)
        parts = [
            _run_with(name, layer, one, forward, part) for one, part in zip(sets, take(batch, indices), strict=True)
        ]
        return put_together(parts, indices)

    def _check(self, name: str, layer: _BatchNorm, batch: Tensor) -> None:
        rows = len(batch) if batch.dim() else 0
        if rows != len(self._which):
            raise ValueError(
                f"BatchNorm layer {named(name)} got {counted(rows, 'row')}, but rows() names the tasks of "
                f"{len(self._which)}. Layers that run on points, on regions of interest or on time steps folded into "
                "the batch have other rows: exclude them from the statistics per task, or use task(name)."
            )
        _refuse_other_forward(name, layer)
        own = self._placed.own[name]["running_mean"]
        held = buffers_of(layer).get("running_mean")
        others = [holder for holder in holders_of(layer) if holder != "task_statistics"]
        if held is not own and (layer.training or not others):
            raise RuntimeError(
                f"the running statistics of BatchNorm layer {named(name)} were replaced{_by(layer)}, as .to() or "
                "functional_call do, and it is not known which task the new ones belong to. Replace them before "
                "rows(), or leave the layer's buffers out."
            )
        if not layer.training:
            return
        if processes_of(layer) > 1:
            raise RuntimeError(
                f"BatchNorm layer {named(name)} is synchronized over {processes_of(layer)} processes, and rows of the "
                "others may belong to other tasks: use task(name) with the same task in all processes, or layers "
                "that are not synchronized."
            )
        values = batch.numel() // (rows * layer.num_features)
        for task, count in zip(self._tasks, self._counts, strict=True):
            if count * values == 1:
                raise ValueError(
                    f"BatchNorm layer {named(name)} got one value per channel of task {task!r}, which has no "
                    "variance: give each task in a batch at least two rows."
                )

    def _indices(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Of each row the place of its task, and the rows of each task."""
        if device not in self._on:
            places = [[row for row, one in enumerate(self._which) if one == place] for place in range(len(self._tasks))]
            which = torch.tensor(self._which, device=device)
            self._on[device] = (which, [torch.tensor(rows, device=device) for rows in places])
        return self._on[device]


def _run_with(name: str, layer: _BatchNorm, buffers: Buffers, forward: Callable[[Tensor], Any], batch: Tensor) -> Any:
    """Run a layer on a batch with these tensors in its place."""
    held = buffers_of(layer)
    own = {key: held[key] for key in buffers}
    try:
        held.update(buffers)
        output = forward(batch)
        if any(held.get(key) is not buffer for key, buffer in buffers.items()):
            raise RuntimeError(
                f"the forward of BatchNorm layer {named(name)} replaces the tensors of its running statistics, so "
                "that rows of several tasks would not move them: use task(name), or write to the existing tensors in "
                "place."
            )
        return output
    finally:
        held.update(own)
