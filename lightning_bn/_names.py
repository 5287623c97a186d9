"""Names of layers and sentences that fit a width, never broken in the middle of a word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile

from rich.cells import cell_len, chop_cells

ENOUGH = 20
"""Cells in which a layer's name is told from others with ease; shorter ones are left whole."""

_LONGEST = 500
"""Characters of a component that are looked at; no console shows more."""


def shared_prefix(names: Sequence[str]) -> str:
    """The leading components that all names have in common, with the dot behind them.

    Args:
        names: Of layers. That of a single one that is short is left whole.

    Example:
        >>> shared_prefix(["model.layer1.0.bn", "model.layer1.1.bn", "model.layer1"])
        'model.'
    """
    if len(names) == 1 and cell_len(names[0]) <= ENOUGH:
        return ""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{part[0]}." for part in takewhile(lambda part: len(set(part)) == 1, parts))


def shortened(names: Sequence[str], width: int, ellipsis: str = "…") -> list[str]:
    """Names of at most a width: whole ones, or the last components behind an ellipsis.

    Where that would make one of two, the leading components that tell them apart stay too.

    Example:
        >>> shortened(["stage.blocks.0.bn1", "stem.bn"], 10)
        ['…0.bn1', 'stem.bn']
        >>> shortened(["stage1.blocks.0.bn", "stage2.blocks.0.bn"], 15)
        ['stage1.…0.bn', 'stage2.…0.bn']
    """
    short = [_cut(name, 0, width, ellipsis) for name in names]
    most = max((name.count(".") for name in names), default=0)
    for heads in range(1, min(most, width) + 1):  # more do not fit: each takes a cell
        same = _repeated(short)
        if not same:
            break
        tried = [
            _cut(name, heads, width, ellipsis) if one in same else one for name, one in zip(names, short, strict=True)
        ]
        if len(set(tried)) > len(set(short)):
            short = tried
    return short


def least_width(names: Sequence[str], most: int | None = None) -> int:
    """The smallest width, though not below what is read with ease, in which :func:`shortened` keeps names apart.

    Args:
        names: Of layers.
        most: Beyond it nobody asks: it is what is returned instead of anything above.
    """
    widest = max(map(cell_len, names), default=0)
    end = widest if most is None else min(widest, most)
    for width in range(min(ENOUGH, end), end):
        short = shortened(names, width)
        if not _repeated(short) and all(map(_is_whole, names, short)):
            return width
    return end


def wrapped(sentence: str, width: int) -> list[str]:
    """The sentence in lines of at most a width; a word that is longer breaks behind a dot, a dash or an underscore.

    Example:
        >>> wrapped("model.backbone.layer1.bn: is frozen", 16)
        ['model.backbone.', 'layer1.bn: is', 'frozen']
    """
    lines = [""]
    for word in sentence.split():
        for index, piece in enumerate(_pieces(word, width)):
            glue = " " if lines[-1] and not index else ""
            if cell_len(lines[-1] + glue + piece) <= width:
                lines[-1] += glue + piece
            else:
                lines.append(piece)
    return lines


def _cut(name: str, heads: int, width: int, ellipsis: str) -> str:
    if cell_len(name) <= width:
        return name
    parts = name.split(".")
    head = "".join(f"{part}." for part in parts[:heads]) + ellipsis
    tail = ".".join(_last_that_fit(parts[heads + 1 :], width - cell_len(head), "."))
    if tail:
        return head + tail
    if heads:
        return _cut(name, 0, width, ellipsis)
    # Not even the last component: as many of its words as fit, then as many of its characters.
    room = width - cell_len(ellipsis)
    words = [piece for piece in re.split(r"(?<=[_-])", parts[-1][-_LONGEST:]) if piece] or [""]
    tail = "".join(_last_that_fit(words[1:], room)) or "".join(_last_that_fit(words[-1], room))
    return (ellipsis + tail)[: max(width, 1)]


def _last_that_fit(pieces: Sequence[str], room: int, between: str = "") -> Sequence[str]:
    """The last pieces, as many as there is room for with what stands between them."""
    start, left = len(pieces), room
    while start:
        left -= cell_len(pieces[start - 1]) + (len(between) if start < len(pieces) else 0)
        if left < 0:
            break
        start -= 1
    return pieces[start:]


def _is_whole(name: str, short: str) -> bool:
    """Whether its last component is still all there."""
    return short.endswith(name.rpartition(".")[2])


def _repeated(names: Sequence[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]


def _pieces(word: str, width: int, breaks: Sequence[str] = (".,/", "_-")) -> Iterator[str]:
    """Parts of a word that fit, split behind dots, then behind underscores, then anywhere."""
    if cell_len(word) <= width:
        yield word
    elif not breaks:
        yield from chop_cells(word, max(width, 1))
    else:
        for piece in re.split(rf"(?<=[{breaks[0]}])", word):
            yield from _pieces(piece, width, breaks[1:]) if piece else ()
