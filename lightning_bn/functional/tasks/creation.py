"""Statistics for each task, asked for as layers are everywhere: by modules, exclude and root."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.tasks.bank import Start, TaskStatistics


def task_statistics(
    model: nn.Module,
    tasks: Sequence[str],
    modules: Patterns = None,
    *,
    exclude: Patterns = None,
    root: str = "",
    default: str | None = None,
    start: Start = "cumulative",
) -> TaskStatistics:
    """Give each task running statistics of its own, in layers that stay the layers they are.

    Inside ``with bank.task(name):`` the selected layers hold the tensors of that task: other objects, never other
    values in the same ones, so that a step that serves several tasks has the gradients of separate networks. The
    default task owns the layers' own tensors. Outside of a context these are in place, and ``model.state_dict()`` holds
    them wherever it is taken, under the same keys.

    Args:
        model: Any module.
        tasks: Their names.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`; None for every layer with running
            statistics.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.
        default: The task that owns the layers' own tensors; None for the first.
        start: How the statistics of the other tasks begin, from the default's values: ``"cumulative"`` averages what a
            task sees in its first ``1 / momentum`` updates (the n-th has the weight ``max(momentum, 1 / n)``), so that
            what they began with is forgotten at once; ``"shared"`` is an ordinary moving average.

    Returns:
        The sets, until they are released.

    Raises:
        ValueError: If a name is no string, empty, ``"mixture"`` or given twice, there is none, or ``default`` or
            ``start`` is unknown.
        SelectionError: As for ``batch_norm_layers``, or if a selected layer has no running statistics.
        RuntimeError: If a selected layer has a set for each task already.

    Source: Chang et al. (2019), "Domain-Specific Batch Normalization", arXiv 1906.03950, section 3.

    Example:
        >>> import torch
        >>> layer = nn.BatchNorm1d(1)
        >>> bank = task_statistics(layer, ["near", "far"])
        >>> with bank.task("far"):
        ...     _ = layer(torch.tensor([[9.0], [11.0]]))
        >>> layer.running_mean, bank.snapshot("far").mean
        (tensor([0.]), tensor([10.]))
    """
    return TaskStatistics(model, tasks, LayerSelection(modules, exclude, root), default=default, start=start)
