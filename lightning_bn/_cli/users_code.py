"""The user's own code, imported and called by a subcommand: where it is found, and what it says."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any


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
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise UsersCodeError(f"{option} {path}: {type(error).__name__}: {error}") from error
    return found


def see_working_folder() -> None:
    """Have modules in the working folder found, as `python train.py` finds them; a console command does not."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, what the user's code prints goes to stderr, and libraries say nothing of themselves."""
    before = logging.root.manager.disable
    # Lightning sets the level of its own logger when it is imported, which happens inside.
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
