"""The page for beginners says what pyproject.toml, the README and a run of its own code say."""

import re
import shlex
import sys
from pathlib import Path

from lightning_bn._cli.main import main
from tests.pages import blocks, configurations, lines, run

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "quickstart.md"
TEXT = PAGE.read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FOR_CONTRIBUTORS = {"examples", "test", "lint", "docs", "bench"}
FIT = next(block for block in blocks(TEXT) if "Trainer(" in block.code)


def stated(package):
    """The lowest version of a package that pyproject.toml allows."""
    [version] = re.findall(rf'^    "{package}>=([\d.]+)"', PROJECT, re.M)
    return version


def test_versions_are_those_of_the_project():
    [python] = re.findall(r'^requires-python = ">=([\d.]+)"', PROJECT, re.M)
    needed = (
        f"Python {python} or newer, torch {stated('torch')} or newer and "
        f"PyTorch Lightning {stated('pytorch-lightning')} or newer"
    )
    assert needed in re.sub(r"\s+", " ", TEXT)


def test_every_extra_of_a_user_is_listed():
    section = PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.M)) - FOR_CONTRIBUTORS
    assert extras == {"cli", "lightning", "plot", "safetensors"}
    assert re.findall(r"^\| `(\w+)` \| [^|]+ \|$", TEXT.split("| extra |")[1].split("\n\n")[0], re.M) == sorted(extras)


def test_the_twelve_lines_are_those_of_the_readme():
    assert FIT.code in README
    assert len([line for line in FIT.code.splitlines() if line.strip()]) == 12


def test_what_each_row_explains_was_printed():
    explained = re.findall(r'^\| "([^"]+)" \| ', TEXT.split("| what it prints |")[1].split("\n\n")[0], re.M)
    printed = " ".join(lines(FIT.printed))
    assert len(explained) == 6
    for part in (part for row in explained for part in row.split(" ... ")):
        [said] = lines(part)
        assert said in printed, part


#: What the page has the reader call, and what it says that this prints.
COMMANDS = re.findall(r"^```sh\n(lightning-bn \w[^\n]*)\n```\n+```text\n(.*?)^```", TEXT, re.M | re.S)


def test_the_command_says_of_the_run_what_the_page_says(tmp_path, monkeypatch, capsys):
    command, printed = COMMANDS[0]
    monkeypatch.chdir(tmp_path)
    run(FIT, PAGE)
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "80")
    assert main(shlex.split(command)[1:]) == 0
    said = capsys.readouterr().out
    assert not set(lines(printed)) - set(lines(said)), said


def test_the_bad_file_is_found_and_corrected_as_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.syspath_prepend(tmp_path)
    network = next(block for block in blocks(TEXT) if block.code.startswith("# net.py\n"))
    [configuration] = configurations(TEXT)
    Path("net.py").write_text(network.code, encoding="utf-8")
    Path("train.yaml").write_text(configuration, encoding="utf-8")
    run(network, PAGE)
    capsys.readouterr()
    for (command, printed), code in zip(COMMANDS[1:], (1, 0), strict=True):
        assert main(shlex.split(command)[1:]) == code
        said = " ".join(lines(capsys.readouterr().out))  # where a line ends depends on how long the seconds are
        assert " ".join(lines(printed)) in said
    assert main(["inspect", "good.ckpt"]) == 0
    sys.modules.pop("net", None)


def test_what_the_rows_advise_can_be_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run(FIT, PAGE)
    plan, keep = re.findall(r"`(BatchNormFreezer\(.*?\.plan\(model\)|model\.layer.*?)`", TEXT)
    assert str(eval(plan, namespace)) in FIT.printed
    exec(keep, namespace)
    assert (
        sum(parameter.requires_grad for parameter in namespace["backbone"].parameters()) == 2
    )  # of its BatchNorm layer
