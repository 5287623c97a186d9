"""Which modules are BatchNorm, under which names, and which of them a selection means."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.layers.patterns import Pattern, Patterns, SelectionError, as_patterns, is_below

_WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def batch_norm_layers(
    model: nn.Module, modules: Patterns = None, exclude: Patterns = None, root: str = ""
) -> dict[str, _BatchNorm]:
    """Every selected BatchNorm layer of ``model`` under its canonical name, in registration order.

    BatchNorm is what derives from ``torch.nn.modules.batchnorm._BatchNorm``: BatchNorm1d, 2d, 3d, SyncBatchNorm, the
    lazy variants and subclasses. Canonical names carry no wrapper components (``_orig_mod`` of compiled modules,
    ``_fsdp_wrapped_module``, ``module`` of DistributedDataParallel). A layer shared under several names is listed once,
    under the first of them.

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
    return select_layers(model, modules, exclude, root)


def select_layers(
    model: nn.Module, modules: Patterns, exclude: Patterns, root: str, argument: str = "modules"
) -> dict[str, _BatchNorm]:
    """:func:`batch_norm_layers`, whose errors say that ``modules`` was given as ``argument``."""
    found = _LayerNames(model)
    selected = set(found.layers) if modules is None and not root else found.match(modules, root, argument)
    if exclude is not None and exclude != []:
        remaining = selected - found.match(exclude, root, "exclude")
        if not remaining:
            raise SelectionError(
                f"exclude={exclude!r} leaves none of {counted(len(selected), 'selected BatchNorm layer')}: "
                f"exclude less, or select more."
            )
        selected = remaining
    return {found.names[key][0]: layer for key, layer in found.layers.items() if key in selected}


def tracked_layers(
    model: nn.Module, modules: Patterns = None, exclude: Patterns = None, root: str = ""
) -> dict[str, _BatchNorm]:
    """The selected BatchNorm layers that keep running statistics.

    With ``modules=None`` layers constructed with ``track_running_stats=False`` are left out; where ``modules`` names
    them they are an error, since what was asked for cannot be done.

    Args:
        model: Any module.
        modules: As for :func:`batch_norm_layers`.
        exclude: As for :func:`batch_norm_layers`.
        root: As for :func:`batch_norm_layers`.

    Raises:
        SelectionError: As for :func:`batch_norm_layers`; if a layer selected by ``modules`` has no running statistics;
            if no selected layer has any; or if a lazy layer is still uninitialized.
    """
    layers = batch_norm_layers(model, modules, exclude, root)
    without = [name for name, layer in layers.items() if not has_running_statistics(layer)]
    if without and (modules is not None or len(without) == len(layers)):
        raise SelectionError(
            f"BatchNorm without running statistics: {quoted(without)} (constructed with track_running_stats=False), "
            f"which normalizes with batch statistics in training and in evaluation. Leave it out with exclude, or "
            f"construct it with track_running_stats=True."
        )
    refuse_lazy(layers)
    return {name: layer for name, layer in layers.items() if name not in set(without)}


def refuse_lazy(layers: Mapping[str, _BatchNorm]) -> None:
    """Nothing where every layer has its channels.

    Raises:
        SelectionError: If a lazy layer is still uninitialized.
    """
    for name, layer in layers.items():
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise SelectionError(
                f"BatchNorm layer {name!r} is a {type(layer).__name__} that has not seen a batch yet, so it has no "
                f"channels: run one forward pass of the model first."
            )


def is_lazy(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a lazy layer that has not seen a batch yet."""
    return isinstance(tensor, UninitializedBuffer | UninitializedParameter)


def has_running_statistics(layer: _BatchNorm) -> bool:
    """Whether the layer holds running statistics as buffers, whatever its flags say."""
    return layer.running_mean is not None and layer.running_var is not None


def processes_of(layer: _BatchNorm) -> int:
    """How many processes' batches a layer normalizes together in training: 1 unless it is synchronized.

    Its group's size; None for a group means all processes.
    """
    # -1 in a process that is not in the group.
    return max(dist.get_world_size(layer.process_group), 1) if is_synchronized(layer) else 1  # type: ignore[arg-type]


def is_synchronized(layer: _BatchNorm) -> bool:
    """Whether a layer's forward in train mode waits for other processes, if its group has any.

    SyncBatchNorm and layers of its kind have the ``process_group`` that they communicate in.
    """
    kind = isinstance(layer, nn.SyncBatchNorm) or hasattr(layer, "process_group")
    return kind and dist.is_available() and dist.is_initialized()


def affine_parameters(layer: _BatchNorm) -> list[nn.Parameter]:
    """The layer's ``weight`` and ``bias``, those it has; of a parametrized one, the parameters it is computed from."""
    found: list[nn.Parameter] = []
    parametrizations = layer._modules.get("parametrizations")
    for name in ("weight", "bias"):
        own = layer._parameters.get(name)
        if isinstance(own, nn.Parameter):
            found.append(own)
        elif isinstance(parametrizations, nn.ModuleDict) and name in parametrizations:
            found += parametrizations[name].parameters()
    return found


def named_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every one of its canonical names, in registration order."""
    seen: set[tuple[str, int]] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        name = canonical_name(model, path)
        if (name, id(module)) not in seen:
            seen.add((name, id(module)))
            yield name, module


def canonical_name(model: nn.Module, path: str) -> str:
    """``path`` below ``model`` without the components that wrappers add.

    Example:
        >>> canonical_name(nn.Sequential(), "backbone._orig_mod.bn1")
        'backbone.bn1'
    """
    kept: list[str] = []
    module: nn.Module | None = model
    for component in path.split(".") if path else ():
        wrapped = component == "module" and isinstance(module, DistributedDataParallel | DataParallel)
        if not wrapped and component not in _WRAPPER_COMPONENTS:
            kept.append(component)
        module = None if module is None else module._modules.get(component)
    return ".".join(kept)


class _LayerNames:
    """All names of all BatchNorm layers below one model, and of the modules around them."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[int, _BatchNorm] = {}
        self.names: dict[int, list[str]] = {}
        self.paths: dict[str, None] = {}
        others: Counter[str] = Counter()
        for name, module in named_paths(model):
            self.paths[name] = None
            if isinstance(module, _BatchNorm):
                self.layers[id(module)] = module
                self.names.setdefault(id(module), []).append(name)
            elif "Norm" in type(module).__name__:
                others[type(module).__name__] += 1
        if not self.layers:
            kinds = ", ".join(f"{count} {kind}" for kind, count in others.items()) or "no normalization layer at all"
            raise SelectionError(
                f"{type(model).__name__} has no BatchNorm layer (found: {kinds}). Layers count that derive from "
                f"torch.nn.modules.batchnorm._BatchNorm; if the layers are built later (configure_model), call this "
                f"afterwards."
            )

    def match(self, patterns: Patterns, root: str, argument: str) -> set[int]:
        """Keys of the layers that any of the patterns means."""
        matched: set[int] = set()
        for pattern in as_patterns(patterns, argument):
            hits = self._hits(pattern, root)
            if not hits:
                raise SelectionError(self._nothing(pattern, root, argument))
            matched |= hits
        return matched

    def _hits(self, pattern: Pattern, root: str) -> set[int]:
        return {key for key, names in self.names.items() if any(pattern.matches(name, root) for name in names)}

    def _below(self, path: str) -> int:
        """How many BatchNorm layers are at ``path`` or below it."""
        return sum(any(is_below(name, path) for name in names) for names in self.names.values())

    def _nothing(self, pattern: Pattern, root: str, argument: str) -> str:
        """Why a pattern means nothing, and what was probably meant."""
        if root and not self._below(root):
            return f"root={root!r} has no BatchNorm layer below it. {self._closest(root, '')}"
        full = f"{root}.{pattern.text}" if root else pattern.text
        if full in self.paths:
            return (
                f"{argument}: {full!r} exists but has no BatchNorm layer at or below it: take it off the list. "
                f"{self._closest(pattern.text, root)}"
            )
        start = f"{argument}: {pattern.text!r} matches no BatchNorm layer" + (f" below root={root!r}" if root else "")
        return f"{start}. {self._root_hint(pattern, root)}{self._closest(pattern.text, root)}"

    def _root_hint(self, pattern: Pattern, root: str) -> str:
        """The root under which the pattern would have meant something, as a sentence or nothing."""
        candidates = {"", *self.paths} - {root}
        for candidate in sorted(candidates, key=lambda path: (path.count(".") + bool(path), path)):
            hits = self._hits(pattern, candidate)
            if hits:
                return f"With root={candidate!r} it would match {len(hits)}. "
        return ""

    def _closest(self, pattern: str, root: str) -> str:
        """Names near the pattern with the number of BatchNorm layers below each."""
        counts = {path: self._below(path) for path in self.paths if path and is_below(path, root)}
        relative = {path[len(root) :].lstrip("."): count for path, count in counts.items() if count}
        relative.pop("", None)
        literal = pattern.removeprefix("re:")
        close = difflib.get_close_matches(literal, relative, n=3, cutoff=0.4)
        if not close:
            top = min((name.count(".") for name in relative), default=0)
            close = [name for name in relative if name.count(".") == top][:5]
        near = ", ".join(f"{name!r} ({relative[name]} BatchNorm)" for name in close)
        return f"Closest: {near}." if near else f"The model has {counted(len(self.layers), 'BatchNorm layer')}."
