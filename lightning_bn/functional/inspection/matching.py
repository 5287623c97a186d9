"""Layers of two files that are the same, although their names have other things before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lightning_bn.functional.layers.names import without_wrappers

_MOST_TRIED = 40
_DEEPEST = 3
_FEW = 5_000


@dataclass(frozen=True)
class Matching:
    """Which names of two files mean the same layers.

    Attributes:
        pairs: By the name that both share, the name in the first file and the one in the second.
        only_first: Names that the first file alone has.
        only_second: Names that the second file alone has.
        prefixes: What the names of the pairs have before what both share, in the first file and in the second.
        assumed: What was assumed, one sentence each.
    """

    pairs: Mapping[str, tuple[str, str]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    prefixes: tuple[str, str]
    assumed: tuple[str, ...]


def match(first: Collection[str], second: Collection[str]) -> Matching:
    """Return which of the names mean the same layers.

    Components that wrappers add (``module``, ``_orig_mod``, ``_forward_module`` and others) do not count. Of all ways
    to leave out the leading components of one side or of both, that one is taken which pairs most layers, and of these
    the one that leaves out least.

    Args:
        first: Names of layers in one file.
        second: Names of layers in the other.
    """
    firsts, seconds = _without(first), _without(second)
    tried = [
        (-len(_common(firsts, seconds, one, other)), one.count(".") + other.count("."), one, other)
        for one, other in _ways(firsts, seconds)
    ]
    fewest, _, one, other = min(tried)
    same = sorted({(trial[2], trial[3]) for trial in tried if trial[:2] == min(tried)[:2]} - {(one, other)})
    shared = _common(firsts, seconds, one, other) if fewest else []
    pairs = {name: (firsts[one + name], seconds[other + name]) for name in shared}
    paired = [{names[side] for names in pairs.values()} for side in (0, 1)]
    return Matching(
        pairs=pairs,
        only_first=tuple(name for name in first if name not in paired[0]),
        only_second=tuple(name for name in second if name not in paired[1]),
        prefixes=(one, other),
        assumed=tuple(_assumed(pairs, one, other, same)),
    )


def _without(names: Collection[str]) -> dict[str, str]:
    """By what is left without wrappers; the names as they are where two would become one."""
    found = {without_wrappers(name): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def _ways(firsts: Mapping[str, str], seconds: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What to leave out on either side: nothing, if that pairs all layers of one; both only where names are few."""
    yield "", ""
    if len(_common(firsts, seconds, "", "")) < min(len(firsts), len(seconds)):
        few = len(firsts) + len(seconds) < _FEW
        ways = product(_starts(firsts), _starts(seconds))
        yield from ((one, other) for one, other in ways if (one or other) and (few or not (one and other)))


def _starts(names: Mapping[str, str]) -> list[str]:
    """What names may have before those of the other file: nothing, or leading components, the most frequent ones."""
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[:-1][:_DEEPEST]
        found.update("".join(f"{part}." for part in parts[: index + 1]) for index in range(len(parts)))
    return ["", *(start for start, _ in found.most_common(_MOST_TRIED))]


def _common(firsts: Mapping[str, str], seconds: Mapping[str, str], one: str, other: str) -> list[str]:
    return [name[len(one) :] for name in firsts if name.startswith(one) and other + name[len(one) :] in seconds]


def _assumed(pairs: Mapping[str, tuple[str, str]], one: str, other: str, same: Sequence[tuple[str, str]]) -> list[str]:
    said = []
    example = next(iter(pairs.items()), None)
    if example is not None and (one or other):
        gone = " and ".join(
            f"{start!r} of the {which} file" for start, which in ((one, "first"), (other, "second")) if start
        )
        said.append(f"Names match without {gone}: {example[1][0]!r} is taken for {example[1][1]!r}.")
    elif example is not None and any(here != there for here, there in pairs.values()):
        here, there = next((here, there) for here, there in pairs.values() if here != there)
        said.append(f"Names match without what wrappers add: {here!r} is taken for {there!r}.")
    if pairs and same:
        ways = ", ".join(f"{here or 'nothing'!r} and {there or 'nothing'!r}" for here, there in same[:3])
        said.append(f"As many layers would match without {ways}: choose with --modules what is meant.")
    return said
