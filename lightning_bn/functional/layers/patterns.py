"""The grammar of selection: module paths, globs over components and regular expressions, all relative to a root."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

Patterns: TypeAlias = str | Sequence[str] | None


class SelectionError(ValueError):
    """A selection that means no BatchNorm layer, or one that cannot be used for what was asked."""


class Pattern:
    """One pattern as a predicate on full module names.

    Args:
        text: A path, a glob (``*``, ``?``, ``[`` inside a component, ``**`` for any number of components) or
            ``"re:"`` and a regular expression. Paths and globs mean what they match and everything below it, a regular
            expression the whole name.
        argument: Where it came from, for the error.

    Raises:
        SelectionError: If it is empty or no regular expression.

    Example:
        >>> Pattern("layer1").matches("layer1.0.bn"), Pattern("layer1").matches("layer10.bn")
        (True, False)
        >>> Pattern("**.bn?").matches("model.stage.bn1", root="model")
        True
    """

    def __init__(self, text: str, argument: str = "modules") -> None:
        self.text = text
        if not text.removeprefix("re:"):
            raise SelectionError(f"{argument} has an empty pattern {text!r}: name a module path, a glob or 're:...'.")
        self._components = tuple(text.strip(".").split("."))
        self._expression: re.Pattern[str] | None = None
        if text.startswith("re:"):
            try:
                self._expression = re.compile(text[3:])
            except re.error as error:
                raise SelectionError(f"{argument}: {text!r} is not a regular expression: {error}.") from error

    def matches(self, name: str, root: str = "") -> bool:
        """Whether the module called ``name`` is meant, the pattern being relative to ``root``."""
        if not is_below(name, root):
            return False
        relative = name[len(root) :].lstrip(".")
        if self._expression is not None:
            return self._expression.fullmatch(relative) is not None
        # A name may have a glob's characters in it.
        literal = bool(relative) and is_below(relative, self.text.strip("."))
        return literal or _at_or_below(tuple(relative.split(".")) if relative else (), self._components)


def as_patterns(patterns: Patterns, argument: str) -> list[Pattern]:
    """Return the patterns of one argument; None is the one that means everything below the root.

    Raises:
        SelectionError: If there is none, or one is empty or malformed.
        TypeError: If one is not a string.
    """
    if patterns is None:
        return [Pattern("**", argument)]
    if not isinstance(patterns, str | Sequence):
        raise TypeError(f"{argument} takes a string or a list of strings, found a {type(patterns).__name__}.")
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    if not listed:
        raise SelectionError(f"{argument}=[] selects nothing: leave it out (None) to select every BatchNorm layer.")
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} takes strings, found {pattern!r} of type {type(pattern).__name__}.")
    return [Pattern(pattern, argument) for pattern in listed]


def is_below(name: str, path: str) -> bool:
    """Whether ``name`` is ``path`` or below it, by whole components."""
    return not path or name == path or name.startswith(path + ".")


def shortest_paths(chosen: Collection[str], everything: Collection[str]) -> list[str]:
    """The shortest paths that mean some layers and no other, those of the fewest components first.

    Args:
        chosen: Names of the layers.
        everything: Names of all layers, these among them.

    Example:
        >>> shortest_paths(["a.0", "a.1", "b.bn"], ["a.0", "a.1", "b.bn", "b.norm"])
        ['a', 'b.bn']
    """
    return sorted(_paths("", chosen, everything), key=lambda path: (path.count("."), path))


def _paths(path: str, chosen: Collection[str], everything: Collection[str]) -> list[str]:
    """The shortest paths below ``path`` that mean chosen layers alone."""
    below = [name for name in everything if is_below(name, path)]
    if not any(name in chosen for name in below):
        return []
    if path and all(name in chosen for name in below):
        return [path]
    deeper = {name[: _end(name, len(path) + bool(path))] for name in below if name != path}
    found = [part for start in sorted(deeper) for part in _paths(start, chosen, everything)]
    return found + [path] * (path in chosen)


def _end(name: str, start: int) -> int:
    """Where the component of a name that begins at ``start`` ends."""
    end = name.find(".", start)
    return len(name) if end < 0 else end


def _at_or_below(components: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether some leading components are what the pattern describes."""
    if not pattern:
        return True
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return any(_at_or_below(components[skipped:], rest) for skipped in range(len(components) + 1))
    return bool(components) and fnmatchcase(components[0], first) and _at_or_below(components[1:], rest)
