"""Which BatchNorm layers are meant: a selection, and what it finds in a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._checks import check_text
from lightning_bn.functional._text import counted, named, quoted
from lightning_bn.functional.layers.names import LayerNames, lookalikes, named_paths
from lightning_bn.functional.layers.patterns import Pattern, Patterns, SelectionError, as_patterns
from lightning_bn.functional.layers.properties import has_running_statistics


@dataclass(frozen=True)
class LayerSelection:
    """Which layers are meant, in the grammar of :func:`batch_norm_layers`; names are resolved when it is asked.

    Attributes:
        modules: What to select; None for every BatchNorm layer.
        exclude: What to leave out.
        root: Put before every pattern.
        argument: What the user calls ``modules``, for errors.
    """

    modules: Patterns = None
    exclude: Patterns = None
    root: str = ""
    argument: str = field(default="modules", compare=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be read, before anything is looked for."""
        check_text("root", self.root, empty=True)
        as_patterns(self.modules, self.argument)
        if self.exclude is not None and self.exclude != []:
            as_patterns(self.exclude, "exclude")

    def layers(self, model: nn.Module, names: LayerNames | None = None) -> dict[str, _BatchNorm]:
        """As :func:`batch_norm_layers`; where somebody has walked over the model, with the names found."""
        found = LayerNames(model) if names is None else names
        everything = self.modules is None and not self.root
        selected = set(found.layers) if everything else found.match(self.modules, self.root, self.argument)
        if self.exclude is not None and self.exclude != []:
            remaining = selected - found.match(self.exclude, self.root, "exclude")
            if not remaining:
                raise SelectionError(
                    f"exclude={self.exclude!r} leaves none of {counted(len(selected), 'selected BatchNorm layer')}: "
                    f"exclude less, or select more."
                )
            selected = remaining
        return found.named(selected)

    def tracked_layers(self, model: nn.Module, names: LayerNames | None = None) -> dict[str, _BatchNorm]:
        """As :func:`tracked_layers`; with ``names`` as for :meth:`layers`."""
        layers = self.layers(model, names)
        without = [name for name, layer in layers.items() if not has_running_statistics(layer)]
        if without and (self.modules is not None or len(without) == len(layers)):
            raise SelectionError(
                f"BatchNorm layer {quoted(without)} has no running statistics (constructed with "
                "track_running_stats=False) and normalizes with batch statistics in training and in evaluation. "
                "Leave it out with exclude, or construct it with track_running_stats=True."
            )
        refuse_lazy(layers)
        left_out = set(without)
        tracked = {name: layer for name, layer in layers.items() if name not in left_out}
        for name, layer in tracked.items():
            size = layer.running_mean.numel()  # type: ignore[union-attr]
            if not layer.num_features and isinstance(layer, nn.modules.lazy.LazyModuleMixin):
                raise SelectionError(
                    f"BatchNorm layer {named(name)} is a {type(layer).__name__} that has loaded its values but has "
                    "not seen a batch yet: run one forward pass of the model first."
                )
            if size != layer.num_features:
                raise SelectionError(
                    f"{type(layer).__name__} {named(name)} holds running statistics of {size} values for its "
                    f"{layer.num_features} channels: only the layer itself knows what they mean. Leave it out with "
                    "exclude."
                )
        return tracked

    def lookalikes(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return what is meant and has running statistics, but is not torch's BatchNorm."""
        excluded = as_patterns(self.exclude, "exclude") if self.exclude else []
        return {
            name: module
            for name, module in lookalikes(named_paths(model)).items()
            if any(pattern.matches(name, self.root) for pattern in self.patterns())
            and not any(pattern.matches(name, self.root) for pattern in excluded)
        }

    def patterns(self) -> list[Pattern]:
        """Its ``modules``, each as a predicate on names."""
        return as_patterns(self.modules, self.argument)


def batch_norm_layers(
    model: nn.Module, modules: Patterns = None, *, exclude: Patterns = None, root: str = ""
) -> dict[str, _BatchNorm]:
    """Return every selected BatchNorm layer of ``model`` under its canonical name, in registration order.

    BatchNorm is what derives from ``torch.nn.modules.batchnorm._BatchNorm``: BatchNorm1d, 2d, 3d, SyncBatchNorm, the
    lazy variants and subclasses. Canonical names carry no wrapper components (``_orig_mod`` of compiled modules,
    ``_fsdp_wrapped_module``, ``_forward_module`` of Fabric, ``module`` of DistributedDataParallel and AveragedModel). A
    layer shared under several names is listed once, under the first of them.

    Args:
        model: Any module.
        modules: What to select; one pattern or several, None for every BatchNorm layer. A module path such as
            ``"backbone.layer1"`` selects itself and everything below it, by whole components. A pattern with ``*``,
            ``?`` or ``[`` is a glob over components (``**`` stands for any number of them, also none) and selects
            everything below what it matches. ``"re:..."`` is a regular expression for the whole name of a layer.
        exclude: What to leave out, in the same grammar. A shared layer is selected if any of its names is, and left out
            if any of its names is.
        root: Put before every pattern, so that names are given relative to it: ``root="model"`` where a LightningModule
            keeps the network in ``self.model``.

    Raises:
        SelectionError: If ``model`` has no BatchNorm layer, if a pattern matches none, or if everything is excluded.
        TypeError: If a pattern is not a string.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
        >>> list(batch_norm_layers(net))
        ['1', '2.0']
        >>> list(batch_norm_layers(net, exclude="1"))
        ['2.0']
    """
    return LayerSelection(modules, exclude, root).layers(model)


def tracked_layers(
    model: nn.Module, modules: Patterns = None, *, exclude: Patterns = None, root: str = ""
) -> dict[str, _BatchNorm]:
    """Return the selected BatchNorm layers that keep running statistics.

    With ``modules=None`` layers constructed with ``track_running_stats=False`` are left out; where ``modules`` names
    them they are an error, since what was asked for cannot be done.

    Args:
        model: Any module.
        modules: As for :func:`batch_norm_layers`.
        exclude: As for :func:`batch_norm_layers`.
        root: As for :func:`batch_norm_layers`.

    Raises:
        SelectionError: As for :func:`batch_norm_layers`; if a layer selected by ``modules`` has no running statistics;
            if no selected layer has any, or one has other than one value per channel; or if a lazy layer is still
            uninitialized.
    """
    return LayerSelection(modules, exclude, root).tracked_layers(model)


def refuse_lazy(layers: Mapping[str, _BatchNorm]) -> None:
    """Raise where a layer has no channels yet.

    Raises:
        SelectionError: If a lazy layer is still uninitialized.
    """
    for name, layer in layers.items():
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise SelectionError(
                f"BatchNorm layer {named(name)} is a {type(layer).__name__} that has not seen a batch yet, so "
                f"it has no "
                f"channels: run one forward pass of the model first."
            )
