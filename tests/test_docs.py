"""The reference lists everything that is public; what the pages show runs, and what they say of it is so."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import pytorch_lightning

import lightning_bn
import lightning_bn.functional
from lightning_bn.functional import MEASURES, SelectionError, batch_norm_layers
from tests.pages import blocks, callbacks_of, check, configurations, lines, recorded, run

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
RESULTS = PAGES["results.md"]
PAGE = DOCS / "reference" / "functional.md"
CALLBACKS = DOCS / "reference" / "callbacks.md"
#: Pages whose numbers are compared too: they depend on nothing but torch's random numbers.
EXACT = ("batchnorm_state.md", "glossary.md")
LINK = re.compile(r"\]\((\w+\.md(?:#[\w-]+)?)\)")


def documented(page):
    """Full names of what a reference page asks for."""
    return re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)


def found(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_reference_lists_exactly_what_the_ground_floor_exports():
    assert sorted(path.rpartition(".")[2] for path in documented(PAGE)) == sorted(lightning_bn.functional.__all__)


def test_reference_lists_all_that_the_package_exports():
    listed = {path for path in documented(CALLBACKS) if path.count(".") == 1}
    assert listed == {f"lightning_bn.{name}" for name in set(lightning_bn.__all__) - {"__version__"}}


@pytest.mark.parametrize("page", [PAGE, CALLBACKS], ids=lambda page: page.stem)
def test_reference_names_no_private_module_and_nothing_twice(page):
    paths = documented(page)
    assert [path for path in paths if "._" in path] == []
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert found(path) is not None
        # the name alone, and no entry for a whole module, whose docstring would stand in the middle of the page
        assert not inspect.ismodule(found(path))


@pytest.mark.parametrize(
    ("page", "block"),
    [pytest.param(page, block, id=f"{page}-{block.line}") for page, text in PAGES.items() for block in blocks(text)],
)
def test_block_runs_and_prints_what_the_page_says(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    check(block, DOCS / page)


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page}-{block.line}")
        for page in EXACT
        for block in blocks(PAGES[page])
        if block.printed is not None and block.reason is None
    ],
)
def test_block_prints_every_number_of_the_page(page, block):
    with recorded() as stream:
        run(block, DOCS / page)
    assert [line.rstrip() for line in stream.getvalue().strip("\n").splitlines()] == block.printed.splitlines()


@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param(one, id=f"{page}-{i}")
        for page, text in PAGES.items()
        for i, one in enumerate(configurations(text))
        if page != "quickstart.md"  # whose file is given to a command: tests/test_quickstart.py
    ],
)
def test_configuration_is_accepted_by_the_command_line(configuration, tmp_path):
    assert callbacks_of(configuration, tmp_path, pytorch_lightning)


def selections(text):
    """(arguments, what the second column says) of each row of the table of selections."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return [(eval(f"dict({arguments[1:-1]})"), meant) for arguments, meant in rows]


@pytest.mark.parametrize(("arguments", "meant"), selections(PAGES["selection.md"]), ids=str)
def test_the_table_of_selections_is_right(arguments, meant):
    [block] = blocks(PAGES["selection.md"])
    model = run(block, "selection.md")["model"]
    if meant.startswith("an error: "):
        with pytest.raises(SelectionError, match=re.escape(meant.removeprefix("an error: "))):
            batch_norm_layers(model, **arguments)
    else:
        names = [f"model.{name}" for name in re.findall(r"`([^`]*)`", meant)]
        assert list(batch_norm_layers(model, **arguments)) == names


@pytest.mark.parametrize(
    ("page", "callback"),
    [("freezer.md", "BatchNormFreezer"), ("precise.md", "PreciseBatchNorm"), ("monitor.md", "BatchNormMonitor")],
)
def test_a_card_lists_every_parameter(page, callback):
    section = PAGES[page].split("## Parameters")[1].split("\n## ")[0]
    first_cells = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    code = getattr(lightning_bn, callback).__init__.__code__
    parameters = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    assert sorted(re.findall(r"`(\w+)`", first_cells)) == sorted(parameters)


def test_the_table_of_measures_lists_them_all():
    section = PAGES["monitor.md"].split("## Measures")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", section, re.M) == list(MEASURES)


@pytest.mark.parametrize("page", PAGES)
def test_what_callbacks_say_is_what_they_say_in_the_readme(page):
    # where it is compared with what a run prints
    said = re.compile(r"^(?:BatchNormFreezer|BatchNormMonitor|PreciseBatchNorm): .*$", re.M)
    assert set(lines("\n".join(said.findall(PAGES[page])))) <= set(lines(README))


def test_accuracies_in_the_readme_are_those_of_the_results():
    section = README.split("## What it changes")[1].split("\n## ")[0]
    rows = [re.findall(r"\b\d+\.\d\b", line) for line in section.splitlines() if line.startswith("| ")]
    measured = set(re.findall(r"\b\d+\.\d\b", RESULTS.split("## A network with ImageNet weights")[0]))
    assert [len(row) for row in rows if row] == [2] * 5
    assert {number for row in rows for number in row} <= measured


def test_accuracies_on_the_cards_are_those_of_the_results():
    measured = [re.findall(r"\b\d+\.\d\b", line) for line in RESULTS.splitlines()]
    section = PAGES["precise.md"].split("## Use")[0]
    rows = [found for line in section.splitlines() if len(found := re.findall(r"\b\d+\.\d\b", line)) == 4]
    assert len(rows) == 6
    for row in rows:
        assert any(row == found[-4:] for found in measured)
    for page in ("freezer.md", "precise.md"):
        sentences = re.sub(r"\s+", " ", re.sub(r"^\|.*$", "", PAGES[page], flags=re.M))
        for number in re.findall(r"\b(\d+\.\d) %", sentences):
            assert number in RESULTS


@pytest.mark.parametrize("sought", ["quickstart", "install", "safetensors", "progress bar", "multi-task", "fabric"])
def test_who_searches_finds_a_page(sought):
    assert any(sought in re.sub(r"\s+", " ", text).lower() for text in PAGES.values())


def test_every_page_can_be_reached():
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\n\n")[0]
    listed = re.findall(r": ([\w/]+\.md)$", nav, re.M)
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(pages)
    assert set(PAGES) - {"index.md"} <= {link.split("#")[0] for text in PAGES.values() for link in LINK.findall(text)}


def test_the_glossary_has_ten_words():
    words = re.findall(r"^\| \*\*([\w, ]+)\*\* \|", PAGES["glossary.md"], re.M)
    assert len(words) == len(set(words)) == 10


def test_pictures_of_the_pages_are_drawn_by_somebody():
    shown = {name for text in PAGES.values() for name in re.findall(r"\]\(images/(\w+)\.png\)", text)}
    scripts = [DOCS / "figures.py", *(DOCS.parent / "examples").glob("*/*.py")]
    assert shown == {image.stem for image in (DOCS / "images").glob("*.png")}
    drawn = "".join(script.read_text(encoding="utf-8") for script in scripts)
    assert {name for name in shown if name not in drawn} == set()


def test_every_number_of_the_multi_task_guide_was_printed_by_a_command():
    printed = (
        RESULTS
        + PAGES["tasks.md"]
        + (DOCS.parent / "examples" / "digits_multitask" / "README.md").read_text(encoding="utf-8")
    )
    page = re.sub(r"^```.*?^```", "", PAGES["multi_task.md"], flags=re.M | re.S)
    rows = [re.findall(r"\b\d+\.\d\b", line) for line in page.splitlines() if line.startswith("|")]
    assert sum(len(row) >= 2 for row in rows) == 8
    for number in {*re.findall(r"\b[\d,]+\.\d\b", page), *re.findall(r"\b\d{1,3}(?:,\d{3})+\b", page)}:
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d,])", printed), number
