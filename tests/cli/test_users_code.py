"""Whatever the user's own code raises, and wherever: one line, exit code 2, no traceback and nothing written."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_bn._cli.main import main

CODE = """
import os, sys, time
import torch, pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WHERE, WHAT = os.environ.get("WHERE", ""), os.environ.get("WHAT", "")


def here(place):
    if place == WHERE:
        if WHAT == "exit":
            sys.exit()
        if WHAT == "interrupt":
            raise KeyboardInterrupt
        if WHAT == "shell":
            os.system("echo of a shell")
            return
        if WHAT == "sleep":
            print("asleep", file=sys.stderr, flush=True)
            time.sleep(60)
        raise LookupError("two\\nlines")


here("import")


class Raises(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        here("init")
        self.net = nn.Sequential(nn.Linear(4, width, bias=False), nn.BatchNorm1d(width), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        here("training_step")
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        here("configure_optimizers")
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(pl.LightningDataModule):
    def prepare_data(self):
        here("prepare_data")

    def setup(self, stage):
        here("setup")
        self.data = TensorDataset(torch.randn(64, 4))

    def train_dataloader(self):
        here("train_dataloader")
        return DataLoader(self.data, 16)
"""
PLACES = ["import", "init", "prepare_data", "setup", "train_dataloader", "configure_optimizers", "training_step"]
DOCTOR = ("doctor", "--config", "train.yaml")
RECALIBRATE = ("recalibrate", "--config", "train.yaml", "--ckpt_path", "in.ckpt", "--out", "out.ckpt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the user's own code, a configuration and a checkpoint."""
    (tmp_path / "raising_code.py").write_text(CODE)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))
    torch.save({"state_dict": {f"net.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "in.ckpt")
    configuration(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("WHERE", raising=False)
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path
    # Lightning ignores further ones, in this process and in those that it starts.
    signal.signal(signal.SIGINT, handler)
    sys.modules.pop("raising_code", None)


def configuration(folder: Path, **described: Any) -> None:
    own = {"model": {"class_path": "raising_code.Raises"}, "data": {"class_path": "raising_code.Data"}}
    trainer = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False}
    (folder / "train.yaml").write_text(yaml.safe_dump({"trainer": trainer, **own, **described}))


@pytest.mark.parametrize("arguments", [DOCTOR, RECALIBRATE])
def test_code_that_raises_nothing_is_done(arguments: tuple[str, ...], folder: Path, command: Any) -> None:
    assert command(*arguments)[0] == 0


@pytest.mark.parametrize("what", ["raise", "exit"])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("arguments", [DOCTOR, RECALIBRATE])
def test_what_the_users_code_raises_is_said(
    arguments: tuple[str, ...], where: str, what: str, folder: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", where)
    monkeypatch.setenv("WHAT", what)
    code, said = command(*arguments)
    assert code == 2
    assert "Traceback" not in said
    assert ("SystemExit(" if what == "exit" else "two lines") in " ".join(said.split())
    if arguments is RECALIBRATE or where in ("import", "init"):
        assert len(said.splitlines()) == 1
    else:
        assert "Not looked at: " in said
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"raising_code.py", "train.yaml", "in.ckpt"}


@pytest.mark.parametrize("where", ["import", "training_step"])
@pytest.mark.parametrize("arguments", [DOCTOR, RECALIBRATE])
def test_what_a_process_of_the_users_code_prints_is_not_in_the_result(
    arguments: tuple[str, ...],
    where: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WHERE", where)
    monkeypatch.setenv("WHAT", "shell")
    assert main([*arguments, "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["format"] == 1
    assert "of a shell" in said.err


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("arguments", [DOCTOR, RECALIBRATE])
def test_an_interrupt_is_130_and_nothing_is_written(
    arguments: tuple[str, ...], where: str, folder: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", where)
    monkeypatch.setenv("WHAT", "interrupt")
    assert command(*arguments) == (130, "")
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"raising_code.py", "train.yaml", "in.ckpt"}


def test_an_interrupt_while_the_file_is_written_leaves_no_part_of_it(
    folder: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def interrupted(content: Any, path: Any, *args: Any) -> None:
        save(content, path, *args)
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    before = (folder / "in.ckpt").read_bytes()
    assert command(*RECALIBRATE, "--overwrite")[0] == 130
    assert command(*RECALIBRATE[:-1], "in.ckpt", "--overwrite")[0] == 130
    assert (folder / "in.ckpt").read_bytes() == before
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"raising_code.py", "train.yaml", "in.ckpt"}


def test_control_c_ends_a_running_recalibration_without_a_file(folder: Path) -> None:
    # Python installs no handler where the signal is ignored, as it is below a job in the background.
    line = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    line += "from lightning_bn._cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", line, *RECALIBRATE],
        cwd=folder,
        env={**os.environ, "WHERE": "training_step", "WHAT": "sleep", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = next(row for row in process.stderr if "asleep" in row)
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said + out + rest
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"raising_code.py", "train.yaml", "in.ckpt"}


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ({"model": {"class_path": "no_such.Net"}}, "train.yaml, model: Problem with given class_path 'no_such.Net'"),
        ({"model": {"class_path": "raising_code.Nt"}}, "module 'raising_code' has no attribute 'Nt'"),
        (
            {"model": {"class_path": "raising_code.Raises", "init_args": {"widht": 3}}},
            r"train.yaml, model: Problem with given .*'raising_code.Raises': .*'widht' is not (accepted|expected)",
        ),
        ({"trainer": {"max_epoch": 3}}, "max_epoch"),
        ({"trainer": {"callbacks": [{"class_path": "no_such.C"}]}}, "train.yaml, trainer.callbacks: Problem with"),
    ],
)
@pytest.mark.parametrize("arguments", [DOCTOR, RECALIBRATE])
def test_what_is_wrong_with_a_configuration_is_said_without_all_that_might_be(
    arguments: tuple[str, ...], described: dict[str, Any], says: str, folder: Path, command: Any
) -> None:
    configuration(folder, **described)
    code, said = command(*arguments)
    assert code == 2
    assert re.search(says, said)
    assert len(said.splitlines()) == 1
    assert "Union" not in said


HINT = "run this in the folder where training is started, or set PYTHONPATH to that folder."


def test_a_module_that_is_not_found_comes_with_where_to_run(folder: Path, command: Any) -> None:
    configuration(folder, model={"class_path": "no_such.Net"})
    for arguments in (DOCTOR, RECALIBRATE, (*DOCTOR, "--model", "no_such:Net"), ("doctor", "--model", "no_such:Net")):
        code, said = command(*arguments)
        assert (code, said.rstrip().endswith(f"If 'no_such' is code of your own: {HINT}")) == (2, True)
    # what is found and has not the name is no matter of folders
    assert HINT not in command("doctor", "--model", "raising_code:Nt")[1]
