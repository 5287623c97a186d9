"""What a freeze will do to a model, layer by layer, before it does anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_bn.functional._text import counted
from lightning_bn.functional.freezing.freeze import select_to_freeze
from lightning_bn.functional.freezing.schedule import FreezeSchedule
from lightning_bn.functional.layers.names import named_paths
from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.properties import affine_parameters, has_running_statistics, processes_of
from lightning_bn.functional.layers.selection import LayerSelection, batch_norm_layers


@dataclass(frozen=True)
class PlannedLayer:
    """What a plan means for one BatchNorm layer.

    Attributes:
        name: Canonical name.
        kind: Name of its class.
        rule: The pattern that selected it, as it was written; empty if none did.
        stats: Whether its running statistics are frozen.
        affine: Whether its ``weight`` and ``bias`` are; False for a layer that has none.
        processes: How many processes' batches it normalizes together in training: 1 unless it is synchronized.
        tasks: The tasks during whose batches it is frozen; empty if during all.
    """

    name: str
    kind: str
    rule: str
    stats: bool
    affine: bool
    tasks: tuple[str, ...] = ()
    processes: int = 1

    @property
    def frozen(self) -> bool:
        """Whether any rule touches it."""
        return bool(self.rule)


@dataclass(frozen=True)
class FreezePlan:
    """What a freeze will do.

    Attributes:
        layers: Every BatchNorm layer of the model, in registration order.
        schedule: When.
        others: Parameters below the same paths that are not frozen and will still train.
    """

    layers: tuple[PlannedLayer, ...]
    schedule: FreezeSchedule
    others: int

    @property
    def frozen(self) -> tuple[PlannedLayer, ...]:
        """The layers that some rule touches."""
        return tuple(layer for layer in self.layers if layer.frozen)

    def __str__(self) -> str:
        frozen = self.frozen
        what = [word for word in ("stats", "affine") if any(getattr(layer, word) for layer in frozen)]
        words = ", ".join(what).replace("stats", "statistics")
        counts = {rule: sum(layer.rule == rule for layer in frozen) for rule in dict.fromkeys(x.rule for x in frozen)}
        rules = ", ".join(f"{rule}: {count}" for rule, count in counts.items())
        when = "" if self.schedule.always else f" {self.schedule}"
        weights, verb = counted(self.others, "other weight"), "trains" if self.others == 1 else "train"
        rest = f"; {weights} below these paths still {verb}" if self.others else ""
        by_task = sum(bool(layer.tasks) for layer in frozen)
        only = f", {by_task} of them in batches of their tasks only" if by_task else ""
        return f"{len(frozen)} of {counted(len(self.layers), 'layer')} frozen{when} ({words}) by {rules}{only}{rest}"


def plan(
    model: nn.Module,
    modules: Patterns = None,
    *,
    exclude: Patterns = None,
    root: str = "",
    stats: bool = True,
    affine: bool = True,
    by_task: Mapping[str, Patterns] | None = None,
    schedule: FreezeSchedule | None = None,
) -> FreezePlan:
    """What freezing with these arguments will do; nothing in ``model`` changes.

    Args:
        model: Any module.
        modules: As for :func:`~lightning_bn.functional.freeze_batch_norm`. With ``by_task``, None means no layer beside
            the tasks' own.
        exclude: As for ``freeze_batch_norm``; holds for the tasks too.
        root: As for ``freeze_batch_norm``.
        stats: As for ``freeze_batch_norm``.
        affine: As for ``freeze_batch_norm``.
        by_task: Further modules for each task, frozen while a batch of that task is trained.
        schedule: When; None for always.

    Raises:
        SelectionError: As for ``freeze_batch_norm``.
        ValueError: As for ``freeze_batch_norm``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        >>> print(plan(net, "2", affine=False))
        1 of 2 layers frozen (statistics) by 2: 1; 4 other weights below these paths still train
    """
    always, by_task_selections = selections(modules, exclude, root, by_task)
    base, tasks = select_by_task(model, always, by_task_selections, stats=stats, affine=affine)
    layers_by_name = batch_norm_layers(model)
    paths: dict[int, list[str]] = {id(layer): [] for layer in layers_by_name.values()}
    for path, module in named_paths(model):
        if id(module) in paths:
            paths[id(module)].append(path)
    rules = {} if always is None else {name: _rule(paths[id(layers_by_name[name])], always) for name in base}
    for task, names in tasks.items():
        for name in names:
            rules.setdefault(name, _rule(paths[id(layers_by_name[name])], by_task_selections[task]))
    layers = tuple(
        PlannedLayer(
            name=name,
            kind=type(layer).__name__,
            rule=rules.get(name, ""),
            stats=name in rules and stats and has_running_statistics(layer),
            affine=name in rules and affine and bool(affine_parameters(layer)),
            processes=processes_of(layer),
            tasks=() if name in base else tuple(task for task, names in tasks.items() if name in names),
        )
        for name, layer in layers_by_name.items()
    )
    chosen = [*([] if always is None else [always]), *by_task_selections.values()]
    return FreezePlan(layers, schedule or FreezeSchedule(), _others(model, layers, chosen))


def selections(
    modules: Patterns, exclude: Patterns, root: str, by_task: Mapping[str, Patterns] | None
) -> tuple[LayerSelection | None, dict[str, LayerSelection]]:
    """Return what is meant for every batch, None for nothing, and what is meant for the batches of each task."""
    always = None if modules is None and by_task else LayerSelection(modules, exclude, root)
    tasks = {
        task: LayerSelection(paths, exclude, root, f"by_task[{task!r}]") for task, paths in (by_task or {}).items()
    }
    return always, tasks


def select_by_task(
    model: nn.Module,
    always: LayerSelection | None,
    by_task: Mapping[str, LayerSelection],
    *,
    stats: bool,
    affine: bool,
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return names frozen during every batch, and for each task those frozen during its batches beside them.

    Raises:
        SelectionError: As for :func:`plan`.
        ValueError: As for :func:`plan`.
    """
    base = () if always is None else tuple(select_to_freeze(model, always, stats=stats, affine=affine))
    tasks = {task: select_to_freeze(model, chosen, stats=stats, affine=affine) for task, chosen in by_task.items()}
    return base, {task: tuple(name for name in names if name not in base) for task, names in tasks.items()}


def _rule(paths: Sequence[str], selection: LayerSelection) -> str:
    """The first pattern that means a layer, under any of its names."""
    root = selection.root
    if selection.modules is None:
        return root or "every layer"
    return next(rule.text for rule in selection.patterns() if any(rule.matches(path, root) for path in paths))


def _others(model: nn.Module, layers: Sequence[PlannedLayer], chosen: Sequence[LayerSelection]) -> int:
    """Parameters that require a gradient, lie where the rules point and are not frozen."""
    by_name = batch_norm_layers(model)
    frozen = {id(parameter) for layer in layers if layer.affine for parameter in affine_parameters(by_name[layer.name])}
    patterns = [(pattern, selection.root) for selection in chosen for pattern in selection.patterns()]
    meant = {
        id(parameter)
        for path, module in named_paths(model)
        if any(pattern.matches(path, root) for pattern, root in patterns)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    }
    return len(meant - frozen)
