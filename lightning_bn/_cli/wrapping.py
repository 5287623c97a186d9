"""Text and code in lines no wider than the console, counted in its cells: some characters take two of them."""

from __future__ import annotations

import io
import re
import shutil
import tokenize
from collections.abc import Iterable, Iterator

_OPEN, _CLOSED = ("(", "[", "{"), (")", "]", "}")
NARROWEST = 20
"""Cells; a console that says that it has fewer is written to as if it had so many."""


def console_width() -> int:
    """How many cells a line of the console has."""
    return max(shutil.get_terminal_size().columns, NARROWEST)


def cells(text: str) -> int:
    """How many cells a text takes.

    Example:
        >>> cells("bn1"), cells("\u5c42")
        (3, 2)
    """
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def wrapped(text: str, width: int, first: str = "", further: str = "") -> list[str]:
    """Return a text in lines of a width, broken between words, and inside of those that are wider.

    Args:
        text: Without control characters.
        width: In cells.
        first: What the first line begins with.
        further: What the others begin with.
    """
    lines, line = [], first
    has_word = False
    for word in text.split():
        if has_word and cells(line) + 1 + cells(word) <= width:
            line += " " + word
            continue
        if has_word:
            lines.append(line)
            line = further
        pieces = [*_pieces(word, width - cells(line), width - cells(further))]
        for piece in pieces[:-1]:
            lines.append(line + piece)
            line = further
        line, has_word = line + pieces[-1], True
    return [*lines, line]


def comment(line: str, width: int) -> list[str]:
    """Return a comment in lines of a width, which are comments as well."""
    return wrapped(line, width, "", "# ")


def of_python(line: str, width: int) -> list[str]:
    """Return a line of Python in rows of a width, which are still Python unless a name is wider.

    Example:
        >>> for row in of_python("freeze_batch_norm(model, ['backbone', 'head'])", 36):
        ...     print(row)
        freeze_batch_norm(model, [
            'backbone', 'head'])
    """
    if cells(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    further = indent + "    " if width >= 36 else indent + " "
    row, rows = indent, []
    for part, in_brackets in _parts_of(line.strip()):
        for piece in _literals(part, width - cells(further)) if in_brackets else [part]:
            # What comes next may need a backslash behind this, which goes on outside of brackets.
            if row.strip() and cells(row + piece.rstrip()) > width - 2:
                rows.append(row.rstrip() + ("" if in_brackets else " \\"))
                row = further
            row += piece
    return [*rows, row.rstrip()]


def of_yaml(line: str, width: int) -> list[str]:
    """Return a line of YAML in rows of a width, which mean the same unless a key is wider.

    Example:
        >>> for row in of_yaml("- class_path: lightning_bn.BatchNormFreezer", 36):
        ...     print(row)
        - class_path:
           lightning_bn.BatchNormFreezer
    """
    found = re.fullmatch(r"(\s*(?:- )?)((?:\w+:)?) ?(.*)", line)
    if cells(line) <= width or not found or not found[3]:
        return [line]
    before, key, value = found.groups()
    further = " " * (len(before) + 1)
    if key and cells(further + value) <= width:
        return [before + key, further + value]
    text = value[1:-1] if value.startswith('"') else value
    # In double quotes a backslash at the end of a line goes on, and what begins the next one does not count.
    head = f"{before}{key} " if key and cells(before + key) + 6 <= width else before
    rows = [before + key] if key and head == before else []
    start = further if rows else head
    pieces = [*_pieces(text, width - cells(start) - 2, width - cells(further) - 2, _ESCAPED)]
    return [*rows, *_quoted(pieces, start, further)]


_ESCAPED = re.compile(r"\\u[0-9a-f]{4}|\\.|.", re.DOTALL)
"""A character of a JSON string, however it is written."""
_OF_LITERAL = re.compile(r"\\x..|\\u.{4}|\\U.{8}|\\.|.", re.DOTALL)
"""The same of a string of Python."""


def _quoted(pieces: list[str], start: str, further: str) -> Iterator[str]:
    for index, piece in enumerate(pieces):
        # A blank at the beginning would be dropped with those before it.
        kept = f"\\{piece}" if index and piece.startswith(" ") else piece
        yield f"{further if index else start + chr(34)}{kept}{chr(34) if index == len(pieces) - 1 else chr(92)}"


def indented(rows: Iterable[str], before: str, width: int) -> Iterator[str]:
    """Yield rows behind what they begin with; what is too wide is broken anywhere."""
    for row in rows:
        yield from (before + piece for piece in _pieces(row, width - cells(before), width - cells(before)))


def _pieces(text: str, first: int, further: int, unit: re.Pattern[str] = re.compile(".", re.DOTALL)) -> Iterator[str]:
    """A text in pieces of so many cells; at least a character in each."""
    piece, room = "", first
    for one in unit.findall(text):
        if piece and cells(piece + one) > room:
            yield piece
            piece, room = "", further
        piece += one
    yield piece


def _parts_of(line: str) -> Iterator[tuple[str, bool]]:
    """The parts of a line of Python between which it may be broken, each with the blanks after it; if in brackets."""
    try:
        tokens = [*tokenize.generate_tokens(io.StringIO(line + ("\n    pass" if line.endswith(":") else "")).readline)]
    except (tokenize.TokenError, IndentationError):
        yield line, False
        return
    places = [token for token in tokens if token.start[0] == 1 and token.string.strip()]
    depth, begin, inside = 0, 0, False
    for token, following in zip(places, [*places[1:], None], strict=True):
        depth += (token.string in _OPEN) - (token.string in _CLOSED)
        if following is None or not _belong_together(token, following):
            end = len(line) if following is None else following.start[1]
            yield line[begin:end], inside
            begin, inside = end, depth > 0


def _belong_together(one: tokenize.TokenInfo, other: tokenize.TokenInfo) -> bool:
    """Whether a line is not to be broken between two tokens."""
    of_name = other.string in ("(", "[") and (one.type == tokenize.NAME or one.string in _CLOSED)
    return of_name or one.string == "." or other.string in (*_CLOSED, ",", ":", "=")


def _literals(part: str, width: int) -> Iterator[str]:
    """A string in brackets as several, which mean the same one after the other; anything else as it is."""
    found = re.fullmatch(r"(['\"])(.*)\1(.*)", part, re.DOTALL)
    if not found or cells(part) <= width:
        yield part
        return
    quote, text, rest = found.groups()
    room = max(width - 4, 4)
    pieces = [*_pieces(text, room, room, _OF_LITERAL)]
    for index, piece in enumerate(pieces):
        yield f"{quote}{piece}{quote}{rest if index == len(pieces) - 1 else ' '}"
