"""Which task an unlabelled batch is of: the one whose statistics lie nearest to the batch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._batches import default_forward, model_device, to_device
from lightning_bn.functional._text import counted, named, quoted
from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.statistics.drift_measures import drift
from lightning_bn.functional.statistics.sample_moments import Moments, merge, moments, variance
from lightning_bn.functional.tasks.bank import TaskStatistics


class NearestTask(NamedTuple):
    """The task of a batch, as far as its statistics tell it.

    Attributes:
        task: The nearest one; None if another one is about as near, or the batch is not finite.
        distances: Of each task, the nearest one first: Jeffreys divergence between its statistics and the batch's own,
            mean over the channels of each layer, then over the layers.
    """

    task: str | None
    distances: dict[str, float]


@torch.no_grad()
def nearest_task(
    bank: TaskStatistics,
    model: nn.Module,
    batch: Any,
    *,
    margin: float = 0.1,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> NearestTask:
    """Return the task whose statistics the batch's own are nearest to, by one forward that moves nothing.

    In this forward the layers with statistics per task normalize with the batch, as in training, and everything else is
    in eval mode. A small batch is far from every task, its own one too: the more values, the surer is the answer. Where
    the tasks' inputs do not differ it cannot be told.

    Args:
        bank: Of at least two tasks.
        model: Has the layers; it is fed with the batch.
        batch: Of one task.
        margin: The share by which the nearest task has to be nearer than the next one, in [0, 1).
        forward: Called with the model and the batch; None as for :func:`~lightning_bn.functional.recalibrate`.

    Raises:
        ValueError: If the bank has one task, the margin is out of range, no layer was reached, or one was given one
            value per channel.
        RuntimeError: If a layer is synchronized with other processes.

    Source: Jeffreys (1946) for the divergence.

    Example:
        >>> from lightning_bn.functional import task_statistics
        >>> layer = nn.BatchNorm1d(1)
        >>> bank = task_statistics(layer, ["near", "far"])
        >>> with bank.task("far"):
        ...     _ = layer(torch.tensor([[9.0], [11.0]]))
        >>> nearest_task(bank, layer, torch.tensor([[8.0], [11.0]])).task
        'far'
    """
    if len(bank.tasks) < 2:
        raise ValueError(
            f"there is only one task, {quoted(bank.tasks)}: to find the nearest task, two or more are needed."
        )
    if not 0 <= margin < 1:
        raise ValueError(
            f"margin={margin} must be in [0, 1): the share by which the nearest task must be nearer than the next."
        )
    found = _statistics(bank, model, batch, forward or default_forward)
    distances = {}
    for task in bank.tasks:
        reference = bank.snapshot(task).only(found)
        samples = [found[name] for name in reference.names]
        mean = torch.cat([sample.mean for sample in samples]).to(reference.mean.device)
        var = torch.cat([variance(sample) for sample in samples]).to(reference.mean.device)
        by_layer = drift(reference, replace(reference, mean=mean, var=var), "jeffreys").values()
        distances[task] = float(torch.stack([channels.mean().cpu() for channels in by_layer]).mean())
    ordered = sorted(bank.tasks, key=lambda task: (math.isnan(distances[task]), distances[task]))
    first, second = (distances[task] for task in ordered[:2])
    told = first < second and first <= (1 - margin) * second
    return NearestTask(ordered[0] if told else None, {task: distances[task] for task in ordered})


def _statistics(
    bank: TaskStatistics, model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]
) -> dict[str, Moments]:
    """Statistics of what each layer that is reached is given; of all its uses together."""
    layers, found = bank.layers_by_name, dict[str, Moments]()
    for name, layer in layers.items():
        if processes_of(layer) > 1:
            raise RuntimeError(
                f"BatchNorm layer {named(name)} is synchronized over {processes_of(layer)} processes, which would all "
                "have to call this too: call it with a copy of the model whose layers are not synchronized."
            )
    ours = set(layers.values())
    modes = [Entries(name, one, attributes={"training": one in ours}) for name, one in model.named_modules()]
    still = [Entries(name, layer, attributes={"track_running_stats": False}) for name, layer in layers.items()]
    with ExitStack() as stack:
        stack.enter_context(exchanged("nearest_task", modes))
        stack.enter_context(exchanged("nearest_task", still))
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(partial(_take, found, name), with_kwargs=True)
            stack.callback(hook.remove)
        forward(model, to_device(batch, model_device(model)))
    if not found:
        raise ValueError(f"the forward reached none of the layers with statistics per task ({quoted(bank.layers)}).")
    return found


def _take(
    found: dict[str, Moments], name: str, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    batch: Tensor = args[0] if args else next(iter(kwargs.values()))
    if batch.numel() // layer.num_features <= 1:
        raise ValueError(
            f"BatchNorm layer {named(name)} got {counted(batch.numel() // layer.num_features, 'value')} per channel, "
            "too few for a variance: give more samples of the same task."
        )
    sample = moments(batch)
    found[name] = merge(found[name], sample) if name in found else sample
