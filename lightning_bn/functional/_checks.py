"""Arguments looked at before anything is done: each error names the argument, the value found and what is wanted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def check_whole(name: str, value: Any, least: int | None = None, *, none: str = "") -> None:
    """Raise unless ``value`` is a whole number.

    Args:
        name: Of the argument.
        value: What was given.
        least: The smallest that is allowed; None for any.
        none: What None means, where None is allowed too.

    Raises:
        ValueError: With the name, the value and what is wanted.
    """
    if value is None and none:
        return
    # bool is an int to Python, and a mistake here.
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        start = "" if least is None else f", {least} or more"
        raise ValueError(f"{name}={value!r} must be a whole number{start}{none and f', or None {none}'}.")


def check_positive(name: str, value: Any, *, none: str = "") -> None:
    """Raise unless ``value`` is a number above 0.

    Raises:
        ValueError: With the name, the value and what is wanted.
    """
    if value is None and none:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name}={value!r} must be a positive number{none and f', or None {none}'}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Raises:
        ValueError: With the name, the value and what is wanted.
    """
    listed = tuple(choices)
    if not isinstance(value, str) or value not in listed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(listed)}.")


def check_flag(name: str, value: Any, *, none: str = "") -> None:
    """Raise unless ``value`` is True or False.

    Raises:
        ValueError: With the name, the value and what is wanted.
    """
    if not isinstance(value, bool) and not (value is None and none):
        raise ValueError(f"{name}={value!r} must be True or False{none and f', or None {none}'}.")


def check_text(name: str, value: Any, *, none: str = "", empty: bool = False) -> None:
    """Raise unless ``value`` is a string, and unless ``empty`` says so not an empty one.

    Raises:
        ValueError: With the name, the value and what is wanted.
    """
    if not (isinstance(value, str) and (value or empty)) and not (value is None and none):
        what = "a string" if empty else "a string that is not empty"
        raise ValueError(f"{name}={value!r} must be {what}{none and f', or None {none}'}.")
