"""What the README shows runs as it stands there."""

import traceback
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import yaml

from tests.pages import Block, blocks, callbacks_of, check, configurations, lines, run

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


@pytest.mark.parametrize("block", blocks(TEXT), ids=lambda block: f"line{block.line}")
def test_block_runs_and_prints_what_the_page_says(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    check(block, README)


def test_what_each_example_prints_is_on_the_page():
    assert [bool(block.printed) for block in blocks(TEXT)] == [True, True]  # or it would not be compared


def test_the_trainer_example_has_twelve_lines():
    example = next(block for block in blocks(TEXT) if "Trainer" in block.code)
    assert len([line for line in example.code.splitlines() if line.strip()]) == 12


@pytest.mark.parametrize("pl", [pytorch_lightning, lightning.pytorch], ids=lambda pl: pl.__name__)
@pytest.mark.parametrize("configuration", configurations(TEXT))
def test_the_configuration_makes_callbacks_with_its_settings(configuration, pl, tmp_path):
    callbacks = callbacks_of(configuration, tmp_path, pl)
    entries = yaml.safe_load(configuration)["trainer"]["callbacks"]
    assert len(callbacks) == 3
    for callback, entry in zip(callbacks, entries, strict=True):
        for name, value in entry["init_args"].items():
            assert getattr(callback, name) == value


def test_readme_names_the_two_commands():
    assert "make demo" in TEXT
    assert "make test" in TEXT


def test_pictures_and_pages_that_the_readme_links_to_exist():
    links = [part.split(")")[0].split("#")[0] for part in TEXT.split("](")[1:]]
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert links
    assert not missing


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


def test_what_a_page_says_and_a_block_does_not_print_is_seen():
    [block] = blocks("```python\nprint('mean 0.25 sigma')\n```\n\nIt prints:\n\n```text\nmean -1.5e-3 sigma\n```\n")
    check(block, "page.md")
    with pytest.raises(AssertionError, match="does not print"):
        check(Block(block.line, block.code, None, "variance 1\n"), "page.md")


def test_lines_are_compared_without_numbers_and_widths():
    assert lines("a  1,024 rows in 0.5 s\n\n") == lines("a 3 rows   in -2e-5 s")
    assert lines("layer frozen") != lines("layer free")


def test_a_block_with_a_callback_that_lightning_lacks_is_skipped(monkeypatch):
    [block] = blocks("```python\nfrom pytorch_lightning.callbacks import EMAWeightAveraging\n```\n")
    monkeypatch.delattr(pytorch_lightning.callbacks, "EMAWeightAveraging", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"EMAWeightAveraging needs pytorch-lightning 2\.6 or newer"):
        check(block, "page.md")
