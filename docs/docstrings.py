"""For mkdocstrings: docstrings as its Markdown needs them."""

import importlib
import re
from typing import Any

from griffe import Extension, Object

#: Sphinx roles, and full names in single backticks, as in what the command line shows of callbacks.
ROLE = re.compile(r":(?:func|class|meth):`~?([\w.]+)`|(?<!`)`(lightning_bn\.[\w.]+)`(?!`)")
EXAMPLE = re.compile(r"^( *)Example:$", re.M)


class ReadableDocstrings(Extension):
    """Turns Sphinx roles into links, and has examples shown as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for everything that is documented."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", ROLE.sub(_link, obj.docstring.value))


def _link(role: re.Match[str]) -> str:
    module, _, name = (role[1] or role[2]).rpartition(".")
    code = f"<code>{name}</code>"
    try:
        found = getattr(importlib.import_module(module), name)
        identifier = f"{_home(found)}.{found.__qualname__}"
    except (ImportError, AttributeError, TypeError, ValueError):
        return code
    return f'<autoref identifier="{identifier}" optional>{code}</autoref>'


def _home(found: Any) -> str:
    """The module that the reference pages name."""
    for module in ("lightning_bn", "lightning_bn.functional"):
        if getattr(importlib.import_module(module), found.__qualname__, None) is found:
            return module
    return str(found.__module__)
