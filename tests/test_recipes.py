"""Every recipe runs: its Python, its YAML through the command line that the page gives, and what it says it prints."""

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.cli import LightningCLI

from tests.pages import Block, blocks, check, configurations, recorded, skip_without_callbacks_of

RECIPES = Path(__file__).parent.parent / "docs" / "recipes"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(RECIPES.glob("*.md"))}
FILE = re.compile(r"# (?P<name>\w+\.(?:py|yaml))\n")
SHELL = re.compile(r"^```sh *\n(?P<text>.*?)^```[ \t]*$", re.M | re.S)


def files(text: str) -> dict[str, str]:
    """What a page has the reader save: blocks that begin with the name of a file."""
    codes = [*(block.code for block in blocks(text)), *configurations(text)]
    return {found["name"]: code for code in codes if (found := FILE.match(code))}


def scripts(text: str) -> dict[str, Block]:
    """What a page has the reader run, by line."""
    return {f"line {block.line}": block for block in blocks(text) if not FILE.match(block.code)}


def with_files(page: str, text: str) -> str:
    """A script or a command, and all files of its page that it uses, also through others."""
    parts, left = [text], files(PAGES[page])
    while named := [name for name in left if re.search(rf"\b{Path(name).stem}\b", "\n".join(parts))]:
        parts += [left.pop(name) for name in named]
    return "\n".join(parts)


def commands(text: str) -> dict[str, str]:
    """What a page has the reader give to a shell, by its last word."""
    return {found["text"].split()[-1]: found["text"] for found in SHELL.finditer(text)}


def each(kind: Any) -> pytest.MarkDecorator:
    """A test for each script, or each command, of each page."""
    found = [(page, name, one) for page, text in PAGES.items() for name, one in kind(text).items()]
    ids = [f"{page}-{name}" for page, name, _ in found]
    return pytest.mark.parametrize(("page", "one"), [(page, one) for page, _, one in found], ids=ids)


@pytest.fixture(autouse=True)
def folder(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a reader of a page works: what it has them save lies there, and can be imported."""
    saved = {**files(PAGES["index.md"]), **files(PAGES[page])}
    for name, code in saved.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in saved:
        sys.modules.pop(Path(name).stem, None)


@each(scripts)
def test_script_prints_what_the_page_says(page: str, one: Block) -> None:
    skip_without_callbacks_of(with_files(page, one.code))
    check(one, RECIPES / page)


def fit_only(cli: Any, module: Any) -> None:
    """LightningCLI for ``fit`` alone: most of its time goes into the parsers of the other subcommands."""
    INIT(cli, module, run=False, save_config_callback=None)
    cli.trainer.fit(cli.model)


INIT = LightningCLI.__init__


@each(commands)
def test_command_ends_well(page: str, one: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_callbacks_of(with_files(page, one))
    if len(one.splitlines()) == 1:
        monkeypatch.setattr(LightningCLI, "__init__", fit_only)
        one = one.replace(" fit ", " ")
    for line in one.splitlines():
        python, script, *arguments = shlex.split(line)
        assert python == "python"
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with recorded() as stream:
            runpy.run_path(script, run_name="__main__")
        if "--out" in arguments:
            assert (folder / arguments[arguments.index("--out") + 1]).exists()
        else:
            asked = (folder / arguments[arguments.index("--config") + 1]).read_text()
            for callback in re.findall(r"class_path: lightning_bn\.(\w+)", asked):
                assert f"{callback}: " in stream.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_a_page_is_used_by_a_command_or_a_script(page: str) -> None:
    used = " ".join([*commands(PAGES[page]).values(), *(block.code for block in scripts(PAGES[page]).values())])
    for name in files(PAGES[page]):
        assert page == "index.md" or name in used or f"from {Path(name).stem} import" in used


@pytest.mark.parametrize("page", ["fine_tuning.md"])
def test_a_wrong_output_is_seen(page: str) -> None:
    block = next(iter(scripts(PAGES[page]).values()))
    with pytest.raises(AssertionError, match="does not print"):
        check(block._replace(printed="3 frozen layers, of which one moved"), RECIPES / page)
