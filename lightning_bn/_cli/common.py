"""What subcommands share: exit codes, errors as one line, results as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, NoReturn

HEALTHY, FOUND, NO = 0, 1, 2
"""Exit codes."""
FORMAT = 1
"""Of the JSON; a later one may have more, and the same names mean the same."""
_MOST = 600


class WrongOptionError(ValueError):
    """The command was called with options that it has not."""

    def __init__(self, parser: argparse.ArgumentParser, why: str) -> None:
        super().__init__(why)
        self.command, self.usage = parser.prog, parser.format_usage()


class Parser(argparse.ArgumentParser):
    """Of the command or a subcommand: no abbreviations, which mean another option tomorrow, and errors are raised."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the process, so that a program gets its answer.

        Raises:
            WrongOptionError: Always.
        """
        raise WrongOptionError(self, message)


def file_name(text: str) -> str:
    """Return a path that is not empty, as that of an unset variable is, which would mean the working folder.

    Raises:
        ArgumentTypeError: If it is.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the name of the file is empty: is a variable of the shell unset?")
    return text


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option that all subcommands have."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead, for programs")


def add_parser_to(subparsers: Any, name: str, about: str, more: str) -> argparse.ArgumentParser:
    """Add and return the parser of a subcommand, whose help has these texts as they are written."""
    form = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = subparsers.add_parser(name, description=about, epilog=more, formatter_class=form)
    return parser


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch uses one thread: for so few values others cost more time than they save."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def print_parts(parts: Iterable[Any]) -> None:
    """Print what rich can print, with a line between any two."""
    from rich.console import Console

    console = Console(highlight=False)
    for index, part in enumerate(parts):
        if index:
            console.print()
        console.print(part, crop=False)


def print_text(text: str) -> None:
    """Print a paragraph, no wider than the console."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for line in Text(text).wrap(console, console.width):
        print(line.plain.rstrip())


def as_json(value: Mapping[str, Any]) -> str:
    """Return a result as one JSON object; what JSON has no number for is "nan", "inf" or "-inf"."""
    return json.dumps({"format": FORMAT, **_plain(value)}, indent=2, allow_nan=False)


def said(error: BaseException) -> str:
    """Return what an error says, in one line.

    Example:
        >>> said(PermissionError(13, "Permission denied", "last.ckpt"))
        'last.ckpt: permission denied.'
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}."
    elif isinstance(error, ValueError | OSError | ImportError) or type(error).__name__ == "UnpicklingError":
        text = str(error)
    elif isinstance(error, MemoryError):
        text = "there is not enough memory."
    else:
        text = f"it cannot be done ({type(error).__name__}{': ' * bool(str(error))}{error})."
    return printable(text)


def printable(text: str) -> str:
    """Return a text in one line, without control characters and not too long."""
    line = " ".join(text.split())
    line = line if len(line) <= _MOST else line[:_MOST] + " ..."
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, PurePath) else value
