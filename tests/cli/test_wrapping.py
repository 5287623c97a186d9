"""Text and code are broken to the width of a console, and code means the same."""

import ast
from typing import Any

import pytest
import yaml

from lightning_bn._cli.wrapping import cells, of_python, of_yaml, wrapped
from lightning_bn.functional.doctor.remedies import callback_yaml, set_attribute

NAMES = [
    "backbone.layer1.0.bn1",
    "a name, with blanks  and \x1b and 'quotes' that goes on for a while",
    "\u5c64\u5c64.bn",
]
CODE = [
    f"Trainer(callbacks=[BatchNormFreezer({NAMES!r})])",
    f"task_statistics(model, {NAMES!r}, 'backbone')",
    "self.unfreeze_and_add_param_group([module_a, module_b], optimizer)",
    "groups = [{'params': matrices}, {'params': others, 'weight_decay': 0.0}]",
    "matrices = [p for p in self.parameters() if p.ndim > 1]",
    "model.get_submodule(name).register_parameter('bias', None)",
    "model.load_state_dict(torch.load(path))",
]


@pytest.mark.parametrize("width", [36, 40, 56, 200])
@pytest.mark.parametrize("line", CODE)
def test_python_is_the_same(line: str, width: int) -> None:
    rows = of_python(line, width)
    assert max(map(cells, rows)) <= width
    assert ast.dump(ast.parse("\n".join(rows))) == ast.dump(ast.parse(line))


@pytest.mark.parametrize("width", [36, 56])
def test_a_block_of_python_is_the_same(width: int) -> None:
    code = set_attribute(NAMES, "track_running_stats", True)
    rows = [row for line in code.splitlines() for row in of_python(line, width)]
    assert max(map(cells, rows)) <= width
    assert ast.dump(ast.parse("\n".join(rows))) == ast.dump(ast.parse(code))


@pytest.mark.parametrize("width", [24, 30, 36, 56, 200])
def test_yaml_is_the_same(width: int) -> None:
    given: dict[str, Any] = {"modules": NAMES, "tasks": ["a", "b"], "containers_in_eval": True, "momentum": 0.25}
    code = callback_yaml("BatchNormFreezer", **given)
    rows = [row for line in code.splitlines() for row in of_yaml(line, width)]
    assert max(map(cells, rows)) <= max(width, 30)
    assert yaml.safe_load("\n".join(rows)) == yaml.safe_load(code)


@pytest.mark.parametrize(
    "text", ["words of some length, and more of them", "\u5c64" * 30, "a " + "b" * 50 + " c", "", "a"]
)
@pytest.mark.parametrize("width", [8, 20, 80])
def test_text_is_all_there_and_no_wider(text: str, width: int) -> None:
    rows = wrapped(text, width, "  ", "    ")
    assert max(map(cells, rows)) <= width
    assert "".join("".join(rows).split()) == "".join(text.split())
    assert all(row.startswith("    ") for row in rows[1:])


def test_words_are_whole_where_they_fit() -> None:
    assert wrapped("one two three four", 9) == ["one two", "three", "four"]
