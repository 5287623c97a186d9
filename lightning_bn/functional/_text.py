"""Names and numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence


def named(name: str) -> str:
    """A layer's name as a reader wants it in an error; the model itself has none."""
    return repr(name) if name else "(the model itself)"


def quoted(names: Sequence[str], most: int = 5) -> str:
    """``names`` as a reader wants them in an error: quoted, the first few, and how many more."""
    shown = ", ".join(map(named, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def raised(error: BaseException) -> str:
    """What code of the user's own raised.

    Example:
        >>> raised(KeyError("loss")), raised(SystemExit(3))
        ("KeyError: 'loss'", 'it ends the process: SystemExit(3)')
    """
    return f"{type(error).__name__}: {error}" if isinstance(error, Exception) else f"it ends the process: {error!r}"


def counted(count: int, thing: str, things: str = "") -> str:
    """A number of things, in the singular where there is one.

    Example:
        >>> counted(1, "layer"), counted(1200, "layer")
        ('1 layer', '1,200 layers')
    """
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {things or thing + 's'}"
