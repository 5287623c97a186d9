"""The user's own code, imported and called by a subcommand: where it is found, and what it says."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bn.callbacks._lightning.configured_fit import ConfiguredFit


class UsersCodeError(ValueError):
    """What stands in the way, in one sentence."""


def imported(option: str, path: str) -> Any:
    """What an import path leads to."""
    module, _, name = path.partition(":")
    if not name:
        module, _, name = path.rpartition(".")
    see_working_folder()
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's own code raises
        raise UsersCodeError(with_hint(f"{option} {path}: {in_words(error)}")) from error
    return found


def configured(options: argparse.Namespace, *, one_process: bool = False) -> ConfiguredFit:
    """The fit that ``--config`` describes, with the classes that ``--model`` and ``--data`` name.

    Raises:
        UsersCodeError: If it cannot be made.
    """
    from lightning_bn.callbacks._lightning.configured_fit import ConfigurationError, configured_fit

    see_working_folder()
    given = {"model": options.model, "data": options.data}
    classes = {key: imported(f"--{key}", path) for key, path in given.items() if path is not None}
    try:
        return configured_fit(options.config, **classes, one_process=one_process)
    except ConfigurationError as error:
        cause = error.__cause__
        ends = cause is not None and not isinstance(cause, Exception)
        why = f"{options.config}: {in_words(cause or error)}" if ends else _first_cause(str(error))
        raise UsersCodeError(with_hint(why)) from error


def in_words(error: BaseException) -> str:
    """What the user's own code raised."""
    from lightning_bn.functional._text import raised

    return raised(error)


def with_hint(text: str) -> str:
    """A text with what to do where it says that there is no such module."""
    missing = re.search(r"No module named '([^']+)'", text)
    if not missing:
        return text
    return (
        f"{text.rstrip('.')}. If {missing[1]!r} is code of your own: run this in the folder where training is "
        f"started, or set PYTHONPATH to that folder."
    )


def _first_cause(text: str) -> str:
    """Of what jsonargparse says of a value the key and the first of the reasons; all where it is of another form."""
    said = text.partition("Errors:")[2].partition("Given value type:")[0]
    reasons = [" ".join(one.split()) for one in re.split(r"\n\s*- ", said)]
    # Older versions begin with what a value might have been too: nothing.
    reason = next((one for one in reasons if one and "NoneType" not in one), "")
    if not reason:
        return text
    key = re.search(r'Parser key "([^"]+)"', text)
    return f"{text.partition(': ')[0]}{f', {key[1]}' if key else ''}: {reason}"


def see_working_folder() -> None:
    """Have modules in the working folder found, as `python train.py` finds them; a console command does not."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, what the user's code prints goes to stderr, and libraries say nothing of themselves.

    Raises:
        UsersCodeError: In the place of what would end the process past all handlers, but for an interrupt.
    """
    before = logging.root.manager.disable
    # Lightning sets the level of its own logger when it is imported, which happens inside.
    logging.disable(logging.WARNING)
    try:
        with _stdout_to_stderr(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UsersCodeError(in_words(error)) from error
    finally:
        logging.disable(before)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Inside, stdout is stderr: Python's stream, and the file descriptor, to which C code and other processes write."""
    with redirect_stdout(sys.stderr), ExitStack() as at_the_end:
        _flush()
        with suppress(OSError):  # one of the two is closed
            kept = os.dup(1)
            at_the_end.callback(os.close, kept)
            os.dup2(2, 1)
            at_the_end.callback(os.dup2, kept, 1)
        at_the_end.callback(_flush)
        yield


def _flush() -> None:
    """Write out what lies in buffers, of Python and of C, so that it goes where it was written to."""
    for stream in (sys.__stdout__, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # none there, or closed
            stream.flush()  # type: ignore[union-attr]
    with suppress(AttributeError, OSError, TypeError):  # no such library
        ctypes.CDLL(None).fflush(None)
