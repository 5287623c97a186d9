"""What the page on versions says is what pyproject.toml and constraints.txt say."""

import re
from pathlib import Path

from packaging.version import Version

from tests.lowest import lowest

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
STATED = lowest(PYPROJECT)
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if re.match(r"\| [\w-]+ \| \d", line) and (cells := [cell.strip() for cell in line.strip("|").split("|")])
}


def test_the_lowest_versions_are_those_stated() -> None:
    runtime = PYPROJECT.split("\ndependencies = [")[1].split("\nexamples = [")[0]  # and what users' extras bring
    assert set(lowest(runtime)) == set(ROWS) - {"Python"}
    for name, (oldest, _, _) in ROWS.items():
        assert Version(oldest) == Version(STATED.get(name, "3.10")), name
    assert 'requires-python = ">=3.10"' in PYPROJECT


def test_the_pinned_versions_are_those_of_the_constraints() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").replace("_", "-")
    for name, (_, pinned, newest) in ROWS.items():
        found = re.findall(rf"^{name}==([\d.]+)", constraints, re.M)
        assert name == "Python" or pinned in found
        assert Version(pinned) <= Version(newest)


def test_requirements_are_read_with_extras_and_markers() -> None:
    text = '["a-b>=2.5", "c[d,e]>=4 ; python_version < \'3\'", "f", "g>=0.1"]'
    assert lowest(text) == {"a-b": "2.5", "c": "4", "g": "0.1"}
