"""What a freeze will do to a model, layer by layer, before it does anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_bn.functional._text import counted
from lightning_bn.functional.freezing.freeze_selection import FreezeSelection
from lightning_bn.functional.freezing.schedule import FreezeSchedule
from lightning_bn.functional.layers.names import kind_of, named_paths
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
        lookalikes: What has running statistics below these paths and is not torch's BatchNorm, so that it is not
            frozen: kinds by name.
    """

    layers: tuple[PlannedLayer, ...]
    schedule: FreezeSchedule
    others: int
    lookalikes: Mapping[str, str] = field(default_factory=dict)

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
        only = f", {by_task} of them only in batches of their tasks" if by_task else ""
        kinds = ", ".join(f"{name!r} ({kind})" for name, kind in self.lookalikes.items())
        alike = f"; not frozen, since they are not torch's BatchNorm: {kinds}" if kinds else ""
        layers = counted(len(self.layers), "layer")
        return f"{len(frozen)} of {layers} frozen{when} ({words}) by {rules}{only}{rest}{alike}"


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
    """Return what freezing with these arguments will do; nothing in ``model`` changes.

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
    return plan_of(model, FreezeSelection(modules, exclude, root, by_task, stats, affine), schedule or FreezeSchedule())


def plan_of(model: nn.Module, selection: FreezeSelection, schedule: FreezeSchedule) -> FreezePlan:
    """As :func:`plan`, of a selection."""
    always, by_task = selection.layers(model)
    chosen = [(one, always if task is None else by_task[task]) for task, one in selection.parts().items()]
    paths: dict[nn.Module, list[str]] = {}
    for path, module in named_paths(model):
        paths.setdefault(module, []).append(path)
    rules: dict[str, str] = {}
    for one, layers in chosen:
        for name, layer in layers.items():
            rules.setdefault(name, _rule(paths[layer], one))
    planned = tuple(
        PlannedLayer(
            name=name,
            kind=type(layer).__name__,
            rule=rules.get(name, ""),
            stats=name in rules and selection.stats and has_running_statistics(layer),
            affine=name in rules and selection.affine and bool(affine_parameters(layer)),
            processes=processes_of(layer),
            tasks=tuple(task for task, layers in by_task.items() if name in layers),
        )
        for name, layer in batch_norm_layers(model).items()
    )
    patterns = [(pattern, one.root) for one, _ in chosen for pattern in one.patterns()]
    below = {
        parameter
        for module, names in paths.items()
        if any(pattern.matches(name, root) for pattern, root in patterns for name in names)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    }
    if selection.affine:
        below -= {one for _, layers in chosen for layer in layers.values() for one in affine_parameters(layer)}
    alike = {name: kind_of(module) for name, module in selection.lookalikes(model).items()}
    return FreezePlan(planned, schedule, len(below), alike)


def _rule(paths: Sequence[str], selection: LayerSelection) -> str:
    """Return the first pattern that means a layer, under any of its names."""
    root = selection.root
    if selection.modules is None:
        return root or "every layer"
    return next(rule.text for rule in selection.patterns() if any(rule.matches(path, root) for path in paths))
