"""What the README shows runs as it stands there."""

import re
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).parent.parent / "README.md"
FENCE = re.compile(
    r"^(?:<!-- not executed: (?P<reason>[^\n]+?) -->\n+)?```python *\n(?P<code>.*?)^```[ \t]*$", re.M | re.S
)


class Block(NamedTuple):
    line: int
    code: str
    reason: str | None


def blocks(text):
    """The ```python blocks of a page in their order, with the line each begins at and why it is not executed, if so."""
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["code"], found["reason"])
        for found in FENCE.finditer(text)
    ]


def run(block, page):
    """Executes a block in a namespace of its own, with the page's line numbers in tracebacks."""
    exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", blocks(README.read_text(encoding="utf-8")), ids=lambda block: f"line{block.line}")
def test_block_runs(block, tmp_path, monkeypatch):
    if block.reason:
        pytest.skip(block.reason)
    monkeypatch.chdir(tmp_path)
    run(block, README)


def test_readme_names_the_two_commands():
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text


PAGE = """# Title
```python
x = 1
```
<!-- not executed: needs a cluster -->
```python
raise RuntimeError
```
```
not python
```
```python
x + 1
```
"""


def test_a_block_that_fails_is_seen_at_its_line():
    first, second, third = blocks(PAGE)
    run(first, "page.md")
    assert second.reason == "needs a cluster"
    with pytest.raises(NameError) as raised:  # a fresh namespace: x was another block's
        run(third, "page.md")
    last = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == ("page.md", 13)
