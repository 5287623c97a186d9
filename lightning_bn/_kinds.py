"""Which kinds of layers a table lists: a word for its title, and a line of its own where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from lightning_bn.functional._text import counted
from lightning_bn.functional.layers.names import kind_of
from lightning_bn.functional.layers.patterns import shortest_paths

_MOST = 8
"""Paths that a line names."""


def one_kind(kinds: Mapping[str, str]) -> str:
    """Return what all layers are, "BatchNorm" where they differ; ``kinds`` by name."""
    found = set(kinds.values())
    return found.pop() if len(found) == 1 else "BatchNorm"


def kinds_line(kinds: Mapping[str, str]) -> list[str]:
    """Return a sentence on who is of which kind; none where all are of one."""
    if len(set(kinds.values())) < 2:
        return []
    (most, _), *fewer = Counter(kinds.values()).most_common()
    said = [f"{kind}: {paths_of([name for name in kinds if kinds[name] == kind], kinds)}" for kind, _ in fewer]
    return [f"{'; '.join(said)}; all others are {most}."]


def paths_of(chosen: list[str], everything: Mapping[str, object]) -> str:
    """Return the shortest paths that mean some layers and no other, and how many more there are.

    Args:
        chosen: Names of these layers.
        everything: All layers, by name.
    """
    paths = [path or "(the model itself)" for path in shortest_paths(chosen, everything)]
    rest = len(paths) - _MOST
    return ", ".join(paths[:_MOST]) + (f" and {counted(rest, 'more path')}" if rest > 0 else "")


def not_listed(others: Mapping[str, nn.Module] | None) -> list[str]:
    """Return a sentence on what has running statistics and is not torch's BatchNorm; none where nothing has."""
    kinds = [f"{name} ({kind_of(module)})" for name, module in (others or {}).items()]
    return [f"Not listed, since they are not torch's BatchNorm: {', '.join(kinds)}."] if kinds else []
