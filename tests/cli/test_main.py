"""The command itself: help, subcommands, exit codes, and what it imports."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_bn import __version__
from lightning_bn._cli.main import SUBCOMMANDS, main
from lightning_bn.functional import inspect_checkpoint

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["diff", "--help"], []])
def test_help_loads_neither_torch_nor_rich(arguments):
    code = (
        "import sys\nfrom lightning_bn._cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'rich', 'numpy', 'pytorch_lightning') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) > 1


def test_the_command_is_installed_and_is_a_module():
    assert 'lightning-bn = "lightning_bn._cli.main:main"' in (ROOT / "pyproject.toml").read_text()
    command = [sys.executable, "-m", "lightning_bn", "inspect", "nowhere.ckpt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "lightning-bn inspect: nowhere.ckpt: no such file or directory.\n"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in SUBCOMMANDS)])
def test_help_teaches_with_examples_and_fits_80_columns(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    said = capsys.readouterr().out
    assert len(re.findall(r"^  lightning-bn \w+", said, re.M)) >= 3
    assert "exit code" in said.lower()
    assert max(map(len, said.splitlines())) <= 80


def test_help_lists_all_subcommands(capsys):
    assert main([]) == 2
    said = capsys.readouterr().out
    for name in SUBCOMMANDS:
        assert re.search(rf"^    {name}\s", said, re.M)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightning-bn {__version__}\n"


@pytest.mark.parametrize("arguments", [["inspekt"], ["inspect"], ["inspect", "a", "--nothing"], ["diff", "a"]])
def test_wrong_arguments_are_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("usage: lightning-bn")
    assert main([*arguments, "--json"]) == 2
    again = capsys.readouterr()
    assert again.err == said.err
    assert said.err.endswith(f": {json.loads(again.out)['error']}\n")


@pytest.mark.parametrize(
    "arguments", [["inspect", "a", "--js"], ["inspect", "a", "--stri"], ["diff", "a", "b", "--al"]]
)
def test_an_abbreviation_is_no_option(arguments, capsys):
    assert main(arguments) == 2
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", ""],
        ["diff", "a.pt", ""],
        ["tasks", ""],
        ["inspect", "a.pt", "--html", ""],
        ["recalibrate", "--config", "a.yaml", "--ckpt_path", "", "--out", "b.ckpt"],
    ],
)
def test_the_name_of_an_unset_variable_is_none(arguments, capsys):
    assert main(arguments) == 2
    assert "the name of the file is empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the name of the file is empty"):
        inspect_checkpoint("")


RAISES = """
class Ends(BaseException):
    pass
def generator(): raise GeneratorExit
def own(): raise Ends("enough")
"""


@pytest.mark.parametrize(("name", "why"), [("generator", "GeneratorExit"), ("own", "Ends('enough')")])
def test_whatever_the_users_code_raises_is_one_line(name, why, tmp_path, monkeypatch, capsys):
    (tmp_path / f"raises_{name}.py").write_text(RAISES)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["doctor", "--model", f"raises_{name}:{name}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert why in line
    assert "file" not in line


HEALTHY_FILE = """
import torch
from torch import nn
layers = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(2000)))
for layer in layers:
    layer.running_mean.fill_(0.5)
    layer.num_batches_tracked.fill_(100)
torch.save(layers.state_dict(), "well.pt")
layers[3].reset_running_stats()
torch.save(layers.state_dict(), "ill.pt")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    subprocess.run([sys.executable, "-c", HEALTHY_FILE], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "reader"),
    [
        ("inspect well.pt --all", 0, "head -n 1"),
        ("inspect ill.pt --json", 1, "head -n 1"),
        ("diff well.pt ill.pt --all --fail-above 0", 1, "head -n 1"),
        ("inspect none.pt 2>&1", 2, "head -n 1"),
        ("doctor --model torch.nn:Identity", 0, "head -n 1"),
        ("inspect --help", 0, "head -n 1"),
    ],
)
def test_a_reader_that_stops_early_changes_neither_the_exit_code_nor_the_words(arguments, code, reader, files):
    command = f"{sys.executable} -m lightning_bn {arguments} | {reader} >/dev/null; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command], cwd=files, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr == ""


def shell(command, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m lightning_bn {command}"
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", ["inspect well.pt", "inspect none.pt --json", "--help"])
def test_a_full_disk_is_exit_code_2_and_a_line(arguments, files):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = shell(f"{arguments} > /dev/full", files)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "lightning-bn: the output cannot be written (No space left on device)."
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("inspect ill.pt --json >&-", 1, ""),
        ("inspect none.pt >&-", 2, "lightning-bn inspect: none.pt: no such file or directory.\n"),
        ("inspect ill.pt >&- 2>&-", 1, ""),
    ],
)
def test_a_closed_stream_changes_no_exit_code(arguments, code, said, files):
    done = shell(arguments, files)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_what_was_read_before_it_stopped_is_the_beginning(files):
    command = f"{sys.executable} -m lightning_bn inspect {files / 'ill.pt'} --json | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_threads_and_garbage_collection_are_as_before(tmp_path, capsys):
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / "file.pt")
    before = torch.get_num_threads()
    assert main(["inspect", str(tmp_path / "file.pt")]) == 1
    assert torch.get_num_threads() == before
    assert gc.isenabled()


@pytest.mark.parametrize(("arguments", "collects"), [(["inspect", "no.pt"], False), (["doctor"], True)])
def test_a_short_run_in_a_process_of_its_own_collects_no_garbage(arguments, collects):
    code = "import gc\nfrom lightning_bn._cli.main import main\nmain()\nprint(gc.isenabled())"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{collects}\n"
