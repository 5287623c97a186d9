"""For mkdocstrings: docstrings as its Markdown needs them."""

import importlib
import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|meth):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.M)


class ReadableDocstrings(Extension):
    """Turns Sphinx roles into links, and has examples shown as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for everything that is documented."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", ROLE.sub(_link, obj.docstring.value))


def _link(role: re.Match[str]) -> str:
    module, _, name = role[1].rpartition(".")
    code = f"<code>{name}</code>"
    try:
        found = getattr(importlib.import_module(module), name)
        identifier = f"{found.__module__}.{found.__qualname__}"
    except (ImportError, AttributeError, TypeError, ValueError):
        return code
    return f'<autoref identifier="{identifier}" optional>{code}</autoref>'
