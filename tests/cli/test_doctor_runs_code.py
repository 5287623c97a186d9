"""What the user's own code makes, prints and raises while `lightning-bn doctor` runs it."""

import json
import os
from pathlib import Path

import pytest

from tests.cli.doctors_code import configuration, ran


@pytest.fixture
def folder(doctors_folder: Path) -> Path:
    return doctors_folder


def test_what_ends_the_process_in_a_forward_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--model", "planted_code:LeavesIn", "--input", "8,4") == 2
    assert "a forward (it ends the process: Leaves('for good'))" in " ".join(capsys.readouterr().out.split())


def test_names_and_errors_are_printed_without_control_characters(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran("--model", "planted_code:colored") == 1
    assert ran("--model", "planted_code:SaysInColor", "--input", "8,4") == 2
    out = capsys.readouterr().out
    assert "\\x1b[31mred\\x07" in out
    assert "(RuntimeError: \\x1b[31mred\\x07)" in out
    assert not [one for one in out if not one.isprintable() and one != "\n"]


def test_what_the_users_code_writes_to_stdout_is_not_in_the_result(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ran("--model", "planted_code:prints", "--json") == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["layers"] == 1
    for who in ("Python", "Python below", "a shell", "the system", "a process"):
        assert f"of {who}" in said.err
    print("afterwards", flush=True)
    os.system("echo also of a shell")
    assert capfd.readouterr().out == "afterwards\nalso of a shell\n"


@pytest.mark.parametrize("name", ["InSetup", "InConfigureModel"])
def test_a_model_that_is_made_before_a_fit_is_looked_at(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(configuration(folder))
    path.write_text(path.read_text().replace("planted_code.Planted", f"planted_code.{name}"))
    assert ran("--config", str(path)) == 1
    out = capsys.readouterr().out
    assert "1 BatchNorm layer: 1 fault, 0 pieces of advice.\n" in out
    assert "FAULT frozen-by-requires-grad" in out


def test_a_model_that_cannot_be_made_before_a_fit_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(configuration(folder, model={"fails_there": True}))
    path.write_text(path.read_text().replace("planted_code.Planted", "planted_code.InSetup"))
    assert ran("--config", str(path), "--batches", "0") == 1  # of what the module has already
    assert "in setup or configure_model (LookupError: no vocabulary)" in " ".join(capsys.readouterr().out.split())


def test_code_that_closes_stdout_closes_neither_that_nor_stderr(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ran("--model", "planted_code:closes") == 0
    assert ran("--model", "planted_code:broken") == 2
    said = capfd.readouterr()
    assert said.out.startswith("1 BatchNorm layer: 0 faults")
    assert "no weights" in said.err
