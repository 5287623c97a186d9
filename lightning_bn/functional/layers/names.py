"""Names of modules: canonical ones, without what wrappers add, and those that lie nearest to a wrong one."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cached_property

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_bn.functional._text import counted
from lightning_bn.functional.layers.patterns import Pattern, Patterns, SelectionError, as_patterns, is_below
from lightning_bn.functional.layers.torch_private import buffers_of, children_of

# Of compiled, sharded and checkpointed modules, and the two that Fabric's wrapper has for one module.
_WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPER_COMPONENTS |= {"_forward_module", "_original_module"}
# These keep the module in an attribute ``module``, a name that others may give to a child of their own.
_WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)
_WRAPPER_NAMES = frozenset({"ModelEma", "ModelEmaV2", "ModelEmaV3"})  # timm's


def named_paths(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module under every one of its canonical names, in registration order.

    Example:
        >>> relu = nn.ReLU()
        >>> [name for name, _ in named_paths(nn.ModuleDict({"act": relu, "_orig_mod": nn.ModuleDict({"again": relu})}))]
        ['', 'act', '', 'again']
    """
    found: dict[tuple[str, int], nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if (name, id(module)) in found:
            return
        found[name, id(module)] = module
        for key, child in children_of(module).items():
            if child is not None:
                wrapped = key in _WRAPPER_COMPONENTS or (key == "module" and _is_wrapper(module))
                visit(name if wrapped else f"{name}.{key}" if name else key, child)

    visit("", model)
    return [(name, module) for (name, _), module in found.items()]


def named_batch_norm(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return every BatchNorm layer under the first of its canonical names; empty if there is none."""
    found: dict[int, tuple[str, _BatchNorm]] = {}
    for name, module in named_paths(model):
        if isinstance(module, _BatchNorm):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def lookalikes(paths: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Return modules that have running statistics and are not torch's BatchNorm, under the first of their names.

    Args:
        paths: Modules under all of their names.

    For instance an in-place activated BatchNorm, an InstanceNorm that tracks, BatchNorm in TorchScript, or one written
    by hand. Not one whose statistics no forward moves, as torchvision's FrozenBatchNorm2d.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in paths:
        has = all(buffers_of(module).get(key) is not None for key in ("running_mean", "running_var"))
        if has and not isinstance(module, _BatchNorm) and kind_of(module) != "FrozenBatchNorm2d":
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def kind_of(module: nn.Module) -> str:
    """Return the name of a module's class; of one in TorchScript, that of the class that was scripted."""
    name: str = getattr(module, "original_name", type(module).__name__)
    return name


def without_wrappers(name: str) -> str:
    """Return ``name`` without anything that wrappers may have added, where the model is not at hand.

    Example:
        >>> without_wrappers("module.backbone._orig_mod.bn1")
        'backbone.bn1'
    """
    return ".".join(part for part in name.split(".") if part != "module" and part not in _WRAPPER_COMPONENTS)


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, _WRAPPERS) or type(module).__name__ in _WRAPPER_NAMES


class LayerNames:
    """All names of all BatchNorm layers below one model, and of the modules around them, from one walk over it.

    Args:
        model: Any module.

    Attributes:
        layers: The BatchNorm layers by their ids.
        names: All names of each of them, by its id.

    Raises:
        SelectionError: If there is no BatchNorm layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[int, _BatchNorm] = {}
        self.names: dict[int, list[str]] = {}
        self._found = named_paths(model)
        for name, module in self._found:
            if isinstance(module, _BatchNorm):
                self.layers[id(module)] = module
                self.names.setdefault(id(module), []).append(name)
        if not self.layers:
            others = Counter(type(one).__name__ for _, one in self._found if "Norm" in type(one).__name__)
            kinds = ", ".join(f"{count} {kind}" for kind, count in others.items()) or "no normalization layer at all"
            alike = [f"{name!r} ({kind})" for name, kind in self.lookalikes.items()]
            if alike:
                kinds += f"; with running statistics of another kind: {', '.join(alike[:5])}"
            raise SelectionError(
                f"{type(model).__name__} has no BatchNorm layer (found: {kinds}). Only layers that derive from "
                "torch.nn.modules.batchnorm._BatchNorm count; if the model builds its layers later "
                "(configure_model), call this after that."
            )

    @cached_property
    def modules(self) -> dict[nn.Module, str]:
        """Every module of the model once, with the first of its names, in registration order."""
        found: dict[nn.Module, str] = {}
        for name, module in self._found:
            found.setdefault(module, name)
        return found

    @cached_property
    def paths(self) -> dict[str, None]:
        """All names of all modules."""
        return dict.fromkeys(name for name, _ in self._found)

    @cached_property
    def lookalikes(self) -> dict[str, str]:
        """The kind of each of :func:`lookalikes`, by name."""
        return {name: kind_of(module) for name, module in lookalikes(self._found).items()}

    def named(self, keys: Collection[int] | None = None) -> dict[str, _BatchNorm]:
        """Return the BatchNorm layers, or those of some ids, under the first name of each."""
        return {self.names[key][0]: layer for key, layer in self.layers.items() if keys is None or key in keys}

    def match(self, patterns: Patterns, root: str, argument: str) -> set[int]:
        """Return the keys of the layers that any of the patterns means."""
        matched: set[int] = set()
        for pattern in as_patterns(patterns, argument):
            hits = self._hits(pattern, root)
            of_others = argument == "exclude" and any(pattern.matches(name, root) for name in self.lookalikes)
            if not hits and not of_others:
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
            below = [f"{name!r} ({kind})" for name, kind in self.lookalikes.items() if is_below(name, full)]
            frozen = [
                name for name, module in self._found if is_below(name, full) and kind_of(module) == "FrozenBatchNorm2d"
            ]
            if below:
                return (
                    f"{argument}: {full!r} has no BatchNorm layer of torch. The layers there that have running "
                    "statistics are of another kind, which lightning_bn cannot freeze, measure or recalibrate: "
                    f"{', '.join(below[:5])}."
                )
            if frozen:
                return (
                    f"{argument}: every layer of {full!r} is a FrozenBatchNorm2d ({len(frozen)}), which training "
                    "never changes: there is nothing to do, take it off the list."
                )
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
