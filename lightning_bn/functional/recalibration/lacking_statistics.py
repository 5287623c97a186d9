"""Files that lack running statistics of a layer, which a recalibration finds anew, and nothing else of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import quoted
from lightning_bn.functional.statistics.claimed_values import unlike
from lightning_bn.functional.statistics.file_entries import FileEntry, Shapes
from lightning_bn.functional.statistics.files import CheckpointFile

_STATISTICS = ("running_mean", "running_var")


class FoundEntry(NamedTuple):
    """Where in a file the weights of a model are.

    Attributes:
        entry: The state dict; its names are those of all that is wanted, also of what it lacks.
        lacking: The model's names of running statistics that it lacks.
    """

    entry: FileEntry
    lacking: frozenset[str]


def found_entry(
    file: CheckpointFile, model: nn.Module, wanted: Shapes, key: str | None, prefix: str | None
) -> FoundEntry:
    """Return where in a file all that is wanted of a model is, but perhaps for running statistics of BatchNorm layers.

    Raises:
        ValueError: If nothing fits or several places do, or if what there is of the statistics has other channels.
    """
    of, choice = type(model).__name__, {"key": key, "prefix": prefix}
    statistics = _statistics_in(model) & wanted.keys()
    others = {name: shape for name, shape in wanted.items() if name not in statistics}
    try:
        return FoundEntry(file.entry(wanted, of, **choice), frozenset())
    except ValueError:
        if not statistics or not others:
            raise
    entry = file.entry(others, of, **choice)
    entry = replace(entry, names={**entry.names, **{name: _place(entry, name) for name in statistics}})
    lacking = frozenset(name for name in statistics if entry.get(name) is None)
    for name in sorted(statistics - lacking):
        shape = getattr(entry[name], "shape", ())
        if wanted[name] not in (None, shape):
            raise ValueError(
                f"{file.path.name} does not fit {of}: it has {name!r} of shape {tuple(shape)}, and the model has it of "
                f"{tuple(wanted[name] or ())}."
            )
    return FoundEntry(entry, lacking)


def layers_of(names: Iterable[str]) -> list[str]:
    """Return the layers whose running statistics have these names, in order."""
    return sorted({name.rpartition(".")[0] for name in names})


def refuse_prior(file: str, lacking: Set[str], prior: Any) -> None:
    """Raise where statistics that a file lacks are to be blended with new ones.

    Raises:
        ValueError: Then.
    """
    if lacking and prior is not None:
        raise ValueError(
            f"prior={prior!r} blends with the running statistics of {file}, and it has none of "
            f"{quoted(layers_of(lacking))}: leave prior= out."
        )


def refuse_lacking(file: str, lacking: Set[str]) -> None:
    """Raise where statistics that a file lacks were not recalibrated.

    Raises:
        ValueError: Then.
    """
    if lacking:
        raise ValueError(
            f"{file} has no running statistics of {quoted(layers_of(lacking))}, and these were not recalibrated: they "
            f"were left out by modules=, exclude= or as frozen, or no forward reached them. Nothing was written."
        )


def refuse_unlike(file: str, entry: FileEntry, own: Mapping[str, Any]) -> None:
    """Raise where a file has something in the place of values of a model that cannot be loaded as these.

    Args:
        file: Its name.
        entry: Where in it the weights are.
        own: The state dict of the model.

    Raises:
        ValueError: Then.
    """
    for name, value in own.items():
        there = entry.get(name)
        why = unlike(there, value) if isinstance(there, Tensor) and isinstance(value, Tensor) else None
        if why is not None:
            raise ValueError(f"{file}: {entry.name_of(name)!r} {why}. Nothing was written.")


def _statistics_in(model: nn.Module) -> set[str]:
    """Names of the running statistics of all BatchNorm layers, by all names of these."""
    layers = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm)]
    return {f"{layer}.{value}" if layer else value for layer in layers for value in _STATISTICS}


def _place(entry: FileEntry, name: str) -> str:
    """The name in the file that a value would have: beside what it has of the layer, or else as of other layers."""
    layer = name.rpartition(".")[0]
    if any(own.rpartition(".")[0] == layer for own in entry.names):
        return entry.name_of(name)
    own, there = next(iter(entry.names.items()))
    while own and there and own.rpartition(".")[2] == there.rpartition(".")[2]:
        own, there = own.rpartition(".")[0], there.rpartition(".")[0]
    # What one of the two has before the names of both.
    rest = name.removeprefix(f"{own}.") if own else name
    return f"{there}.{rest}" if there else rest
