"""The commands on the page of the command line print what the page says."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from lightning_bn._cli.main import main
from lightning_bn.functional.inspection.rules import FileFault, FileNote
from tests.pages import blocks, lines, run

PAGE = Path(__file__).parent.parent.parent / "docs" / "command_line.md"
TEXT = PAGE.read_text(encoding="utf-8")
SHOWN = re.findall(r"^```sh\n(lightning-bn [^\n]*)\n```\n+```text\n(.*?)^```", TEXT, re.M | re.S)


@pytest.mark.parametrize(("command", "printed"), SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_prints_what_the_page_says(command, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    [files] = [block for block in blocks(TEXT) if "before.pt" in block.code]
    run(files, PAGE)
    main(shlex.split(command)[1:])
    said = capsys.readouterr().out
    assert not set(lines(printed)) - set(lines(said)), said


def test_commands_are_shown():
    assert [shlex.split(command)[1] for command, _ in SHOWN] == ["inspect", "diff", "diff"]


def test_the_tables_list_every_fault_and_every_note():
    rows = re.findall(r"^\| ([\w ]+) \| [^|]+ \|$", TEXT, re.M)
    assert [row for row in rows if row in get_args(FileFault)] == list(get_args(FileFault))
    assert [row for row in rows if row in get_args(FileNote)] == list(get_args(FileNote))
