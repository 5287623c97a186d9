"""Every public signature as text, one a line; `python -m tests.public_api` writes `tests/public_api.txt` anew."""

import inspect
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import lightning_bn
from lightning_bn import functional, report

FILE = Path(__file__).with_suffix(".txt")

MODULES = {"lightning_bn": lightning_bn, "lightning_bn.functional": functional, "lightning_bn.report": report}


def signatures() -> list[str]:
    """What can be imported from each public module, with its parameters, their defaults and types."""
    return [line for module, names in MODULES.items() for line in _of_module(module, names)]


def _of_module(module: str, holder: Any) -> Iterator[str]:
    for name in sorted(holder.__all__):
        yield from _of(f"{module}.{name}", getattr(holder, name))


def _of(path: str, value: Any) -> Iterator[str]:
    if inspect.ismodule(value) or path.endswith(".__version__"):
        yield path
    elif inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {path}({bases})"
        if not issubclass(value, BaseException | Enum):  # an enum's is Python's own, another one in each version
            yield f"{path}{inspect.signature(value)}"
        yield from _of_class(path, value)
    elif inspect.isfunction(value):
        yield f"{path}{inspect.signature(value)}"
    else:
        yield f"{path} = {value!r}"


def _of_class(path: str, kind: type) -> Iterator[str]:
    """Its own public methods and properties; the hooks of a callback are Lightning's and left out."""
    for name, member in sorted(vars(kind).items()):
        if name.startswith(("_", "on_")) or name == "setup":
            continue
        if isinstance(member, property):
            yield f"{path}.{name} -> {inspect.signature(member.fget).return_annotation}"  # type: ignore[arg-type]
        elif isinstance(member, staticmethod | classmethod):
            yield f"{path}.{name}{inspect.signature(getattr(kind, name))}"
        elif inspect.isfunction(member):
            yield f"{path}.{name}{inspect.signature(member)}"


def text() -> str:
    """The contents of the file."""
    return "\n".join(signatures()) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
