"""The reference lists everything that is public, under the module it lives in."""

import importlib
import re
from pathlib import Path

import lightning_bn.functional

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "functional.md"
ENTRY = re.compile(r"^::: (?P<module>\S+)\n    options:\n      members: \[(?P<members>[^\]]*)\]$", re.M)


def documented(text):
    """(module, name) of every member that a reference page asks for."""
    return [(entry["module"], name) for entry in ENTRY.finditer(text) for name in entry["members"].split(", ")]


def test_reference_lists_exactly_what_the_ground_floor_exports():
    assert sorted(name for _, name in documented(PAGE.read_text())) == sorted(lightning_bn.functional.__all__)


def test_reference_names_the_module_each_function_lives_in():
    for module, name in documented(PAGE.read_text()):
        assert getattr(importlib.import_module(module), name) is getattr(lightning_bn.functional, name)
