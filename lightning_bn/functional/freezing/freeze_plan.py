"""What a freeze will do to a model, layer by layer, before it does anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_bn.functional._text import counted
from lightning_bn.functional.freezing.freeze import select_to_freeze
from lightning_bn.functional.freezing.schedule import FreezeSchedule
from lightning_bn.functional.layers.patterns import Pattern, Patterns, as_patterns
from lightning_bn.functional.layers.selection import (
    affine_parameters,
    batch_norm_layers,
    has_running_statistics,
    named_paths,
    processes_of,
)


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
    exclude: Patterns = None,
    root: str = "",
    *,
    stats: bool = True,
    affine: bool = True,
    by_task: Mapping[str, str | Sequence[str]] | None = None,
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
    base, tasks = select_by_task(model, modules, exclude, root, stats=stats, affine=affine, by_task=by_task)
    layers_by_name = batch_norm_layers(model)
    paths: dict[int, list[str]] = {id(layer): [] for layer in layers_by_name.values()}
    for path, module in named_paths(model):
        if id(module) in paths:
            paths[id(module)].append(path)
    rules = {name: _rule(paths[id(layers_by_name[name])], modules, root) for name in base}
    for task, names in tasks.items():
        for name in names:
            rules.setdefault(name, _rule(paths[id(layers_by_name[name])], (by_task or {})[task], root))
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
    return FreezePlan(layers, schedule or FreezeSchedule(), _others(model, layers, modules, by_task, root))


def select_by_task(
    model: nn.Module,
    modules: Patterns,
    exclude: Patterns,
    root: str,
    *,
    stats: bool,
    affine: bool,
    by_task: Mapping[str, str | Sequence[str]] | None,
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Names frozen during every batch, and for each task those frozen during its batches beside them.

    Raises:
        SelectionError: As for :func:`plan`.
        ValueError: As for :func:`plan`.
    """
    base: tuple[str, ...] = ()
    if modules is not None or not by_task:
        base = tuple(select_to_freeze(model, modules, exclude, stats=stats, affine=affine, root=root))
    tasks = {}
    for task, patterns in (by_task or {}).items():
        argument = f"by_task[{task!r}]"
        names = select_to_freeze(model, patterns, exclude, stats=stats, affine=affine, root=root, argument=argument)
        tasks[task] = tuple(name for name in names if name not in base)
    return base, tasks


def _rule(paths: Sequence[str], patterns: Patterns, root: str) -> str:
    """The first pattern that means a layer, under any of its names."""
    if patterns is None:
        return root or "every layer"
    listed = as_patterns(patterns, "modules")
    return next(pattern.text for pattern in listed if any(pattern.matches(path, root) for path in paths))


def _others(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    modules: Patterns,
    by_task: Mapping[str, str | Sequence[str]] | None,
    root: str,
) -> int:
    """Parameters that require a gradient, lie where the rules point and are not frozen."""
    patterns = list(_all_patterns(modules, by_task))
    by_name = batch_norm_layers(model)
    frozen = {id(parameter) for layer in layers if layer.affine for parameter in affine_parameters(by_name[layer.name])}
    meant = {
        id(parameter)
        for path, module in named_paths(model)
        if any(pattern.matches(path, root) for pattern in patterns)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    }
    return len(meant - frozen)


def _all_patterns(modules: Patterns, by_task: Mapping[str, str | Sequence[str]] | None) -> Iterator[Pattern]:
    if modules is not None or not by_task:
        yield from as_patterns(modules, "modules")
    for patterns in (by_task or {}).values():
        yield from as_patterns(patterns, "by_task")
