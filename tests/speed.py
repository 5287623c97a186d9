"""Which tests `make test-fast` leaves out: those that start processes, compile, or take more than a moment."""

import re
from collections.abc import Iterator
from types import CodeType, FunctionType

import pytest

#: Names that a test, a fixture or a helper of it mentions when it starts a process, or compiles.
MENTIONED = {"processes": {"num_workers", "results_of", "subprocess"}, "compile": {"compile"}}

#: The same for what a test is called and how the case is named; and what takes several fits or much data.
NAMED = {
    "processes": re.compile(r"worker|persistent|process"),
    "compile": re.compile(r"compile"),
    "slow": re.compile(
        r"resumed|hindsight|averag|frozen_in_these_steps|curves_and_the_figure|training_is_bit_identical"
    ),
}

#: Files whose tests take more than a moment, for the same reason.
SLOW = (
    "tests/callbacks/second_run/test_loaders.py",
    "tests/callbacks/test_freezer_averages.py",
    "tests/callbacks/test_monitor_faults.py",
    "tests/callbacks/test_namespaces.py",
    "tests/examples/test_digits_multitask.py",
    "tests/examples/test_pretrained_backbone.py",
    "tests/functional/doctor/test_healthy_models.py",
    "tests/functional/recalibration/test_architectures.py",
    "tests/test_alternatives.py",
    "tests/test_figures.py",
    "tests/test_plotting.py",
    "tests/test_recipes.py",
    "tests/test_release.py",
)


def names_in(code: CodeType) -> Iterator[str]:
    """What a piece of code and the functions in it mention: globals, attributes and names of arguments."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
        elif isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (name for name in constant if isinstance(name, str))


def mentioned(function: FunctionType) -> set[str]:
    """What a function mentions, and what those of its own module mention that it uses."""
    found: set[str] = set()
    seen: set[FunctionType] = set()
    waiting = [function]
    while waiting:
        one = waiting.pop()
        seen.add(one)
        names = set(names_in(one.__code__))
        found |= names
        used = (one.__globals__.get(name) for name in names)
        waiting += [
            other
            for other in used
            if isinstance(other, FunctionType) and other not in seen and other.__module__ == function.__module__
        ]
    return found


def marks(item: pytest.Item) -> set[str]:
    """Which of ``processes``, ``compile`` and ``slow`` a test is."""
    found = {mark for mark, pattern in NAMED.items() if pattern.search(item.name)}
    if item.nodeid.startswith(SLOW):
        found.add("slow")
    if isinstance(item, pytest.Function):
        fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]
        functions = [item.function, *fixtures]
        names = set().union(*(mentioned(one) for one in functions if isinstance(one, FunctionType)))
        found |= {mark for mark, some in MENTIONED.items() if names & some}
    return found
