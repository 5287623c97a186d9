"""`lightning-bn doctor`: exit codes, what is printed, and one line where it cannot be done."""

import ast
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.cells import cell_len

from lightning_bn._cli.main import main
from tests.averages import EMAWeightAveraging

CODE = """
from collections import OrderedDict
import torch, pytorch_lightning as pl
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Planted(pl.LightningModule):
    def __init__(self, half: bool = False, lr: float = 0.1, fails: bool = False, says: bool = False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        if half:
            self.net[1].requires_grad_(False)
        if says:
            print("made")
        self.lr, self.fails = lr, fails

    def training_step(self, batch, batch_idx):
        if self.fails:
            raise RuntimeError("no camera")
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 16, shift: float = 0.0):
        super().__init__()
        self.batch_size, self.shift = batch_size, shift

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 4, generator=generator)
        x[:16] += self.shift
        self.data = TensorDataset(x, torch.arange(64) % 2)

    def train_dataloader(self):
        return DataLoader(self.data, self.batch_size)


class InSetup(Planted):
    def __init__(self, fails_there: bool = False):
        super().__init__(half=True)
        self.net, self.made, self.fails_there = None, self.net, fails_there

    def setup(self, stage):
        if self.fails_there:
            raise LookupError("no vocabulary")
        assert self.net is None
        assert len(self.trainer.datamodule.data) == 64
        self.__dict__["shown"], self.net = stage, self.made


class InConfigureModel(Planted):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        assert self.net is None
        self.net = Planted(half=True).net


class Leaves(BaseException):
    pass


class LeavesIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x):
        raise Leaves("for good")


def build():
    return Planted().net


def leaves():
    raise Leaves("for good")


def generator_exit():
    raise GeneratorExit("early")


def meta():
    return build().to("meta")


def colored():
    net = nn.Sequential()
    net.add_module("\x1b[31mred\x07", nn.BatchNorm1d(4))
    return net.requires_grad_(False)


def wide():
    return nn.Sequential(OrderedDict({"\u5c64" * 30: nn.BatchNorm1d(4)})).requires_grad_(False)


class SaysInColor(LeavesIn):
    def forward(self, x):
        raise RuntimeError("\x1b[31mred\x07")


def prints():
    import os, subprocess, sys
    print("of Python")
    sys.__stdout__.write("of Python below")
    os.system("echo of a shell")
    os.write(1, b"of the system")
    subprocess.run([sys.executable, "-c", "print('of a process')"])
    return build()


def broken():
    raise RuntimeError("no weights")


def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the user's own code; what was imported from it is forgotten."""
    (tmp_path / "planted_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("planted_code", None)


def ran(*arguments: str) -> int:
    """The exit code of the subcommand with these arguments."""
    return main(["doctor", *arguments])


def configuration(folder: Path, *, model: Any = None, data: Any = None, **trainer: Any) -> str:
    """The path of a YAML as `fit --config` takes it."""
    path = folder / "train.yaml"
    written = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, **trainer},
        "model": {"class_path": "planted_code.Planted", "init_args": model or {}},
        "data": {"class_path": "planted_code.Data", "init_args": data or {}},
    }
    path.write_text(yaml.safe_dump(written))
    return str(path)


def test_a_healthy_configuration_is_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--config", configuration(folder)) == 0
    assert capsys.readouterr().out == "1 BatchNorm layer: 0 faults, 0 pieces of advice.\n"


def pasted(out: str, title: str) -> str:
    """The rows below a title, as somebody copies them."""
    rows = out.split(f"  {title}\n")[1].splitlines()
    return textwrap.dedent("\n".join(itertools.takewhile(lambda row: row.startswith("    "), rows)))


@pytest.mark.parametrize("columns", ["40", "60", "80"])
def test_what_is_printed_can_be_copied(
    columns: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    path = Path(configuration(folder, model={"half": True}, data={"batch_size": 4}))
    assert ran("--config", str(path)) == 1
    out = capsys.readouterr().out
    for part in out.split("FAULT ")[1:]:
        assert "Trainer(" in ast.unparse(ast.parse(pasted(part, "do:")))
    described = yaml.safe_load(path.read_text())
    described["trainer"] |= yaml.safe_load(pasted(out, "do, in a YAML:"))["trainer"]
    path.write_text(yaml.safe_dump(described))
    # frozen statistics need no larger batch either
    assert ran("--config", str(path), "--batches", "0") == 1
    assert "FAULT initial-statistics-frozen" in capsys.readouterr().out


def test_a_model_alone_has_no_yaml(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--model", "planted_code:build", "--input", "4,4") == 1
    assert "YAML" not in capsys.readouterr().out


def test_a_fault_is_1_and_names_layers_reason_and_remedy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--config", configuration(folder, model={"half": True})) == 1
    out = capsys.readouterr().out
    assert "FAULT frozen-by-requires-grad\n" in out
    assert "  layers: net.1\n" in out
    assert "  why:    Running statistics are buffers" in out
    assert "BatchNormFreezer(['net'])" in out


def test_advice_alone_is_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--config", configuration(folder, sync_batchnorm=True)) == 0
    assert "ADVICE synchronized-alone\n" in capsys.readouterr().out


def test_callbacks_of_the_configuration_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EMAWeightAveraging()  # skips the test where there is none
    averaging = {"class_path": "pytorch_lightning.callbacks.EMAWeightAveraging"}
    assert ran("--config", configuration(folder, callbacks=[averaging])) == 1
    assert "averaged-without-recalibration" in capsys.readouterr().out
    precise = {"class_path": "lightning_bn.PreciseBatchNorm"}
    assert ran("--config", configuration(folder, callbacks=[averaging, precise])) == 0


def test_several_batches_are_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the first batch of the epoch is of another source than the others
    path = configuration(folder, data={"shift": 30.0})
    assert ran("--config", path, "--batches", "1") == 0
    assert ran("--config", path) == 1
    assert "unlike-inputs" in capsys.readouterr().out


def test_processes_that_this_machine_has_not_are_those_of_the_file(folder: Path, capsys: Any) -> None:
    path = configuration(folder, data={"batch_size": 2}, accelerator="gpu", devices=8, num_nodes=2, strategy="ddp")
    assert ran("--config", path) == 1
    assert "the 2 samples of each of 16 processes" in " ".join(capsys.readouterr().out.split())


def test_json_is_all_that_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--config", configuration(folder, model={"half": True, "says": True}), "--json") == 1
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert "made" in printed.err
    assert told["layers"] == 1
    assert told["not_looked_at"] == {}
    [finding] = told["findings"]
    assert set(finding) == {"rule", "severity", "layers", "what", "why", "remedy", "yaml"}
    assert (finding["rule"], finding["layers"]) == ("frozen-by-requires-grad", ["net.1"])


def test_a_step_that_fails_is_2_and_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--config", configuration(folder, model={"fails": True})) == 2
    out = capsys.readouterr().out
    assert out.startswith("1 BatchNorm layer: 0 faults, 0 pieces of advice, 1 not looked at.\n")
    assert "Not looked at: a forward (RuntimeError: no camera" in out


def test_faults_that_need_no_batch_are_found_all_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--config", configuration(folder, model={"fails": True, "half": True})) == 1
    assert "frozen-by-requires-grad" in capsys.readouterr().out


def test_a_configuration_saved_by_a_fit_is_taken(folder: Path) -> None:
    path = Path(configuration(folder, model={"half": True}))
    path.write_text(yaml.safe_dump({"fit": {**yaml.safe_load(path.read_text()), "ckpt_path": None}}))
    assert ran("--config", str(path)) == 1


@pytest.mark.parametrize("name", ["planted_code:build", "planted_code.build", "planted_code:Planted"])
def test_a_model_by_its_import_path(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--model", name) == 0
    assert "1 BatchNorm layer: 0 faults" in capsys.readouterr().out


def test_a_model_is_run_on_an_input_of_a_shape(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--model", "planted_code:build", "--input", "4,4") == 1
    assert "few-values" in capsys.readouterr().out
    assert ran("--model", "planted_code:build", "--input", "64,4") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "planted_code:broken"), "--model planted_code:broken: RuntimeError: no weights"),
        (("--model", "planted_code:number"), "makes a int, which is not a torch.nn.Module"),
        (("--model", "planted_code:nothing"), "AttributeError"),
        (("--model", "no_such_module:build"), "No module named 'no_such_module'"),
        (("--model", "planted_code:build", "--input", "4,x"), "--input 4,x: give whole numbers"),
        (("--model", "planted_code:build", "--input", ""), "--input : give whole numbers"),
        (("--model", "planted_code:build", "--input", "0,4"), "--input 0,4: give whole numbers"),
        (("--model", "planted_code:build", "--input=-1,4"), "--input -1,4: give whole numbers"),
        (("--model", "planted_code:build", "--input", "99999999,99999999"), "99999999: there is not enough memory"),
        (("--model", "planted_code:build", "--input", f"{10**30}"), "0: there is not enough memory"),
        (("--model", "planted_code:build", "--batches", "-3"), "--batches -3: give how many"),
        (("--model", "planted_code:leaves"), "--model planted_code:leaves: it ends the process: Leaves('for good')"),
        (("--model", "planted_code:generator_exit"), "it ends the process: GeneratorExit('early')"),
        (("--model", "planted_code:meta"), "module '0' is on the meta device"),
        (("--config", "/dev/zero"), "/dev/zero is not a file"),
        (("--config", "."), ". is not a file"),
        (("--config", "large.yaml"), "large.yaml has 5,000,000 bytes"),
        (("--config", "none.yaml"), "none.yaml"),
        (("--config", "planted_code.py"), "is not YAML"),
        (("--config", "empty.yaml"), "has no key 'model'"),
        (("--config", "own.yaml"), "Name the class with --model import.path:Class"),
        (("--config", "data.yaml"), "Name the class with --data import.path:Class"),
        ((), "give --config FILE or --model"),
        (("--config", "wrong.yaml", "--input", "4,4"), "--input goes with --model alone"),
        (("--model", "planted_code:build", "--data", "planted_code:Data"), "--data goes with --config"),
        (("--config", "wrong.yaml"), "wrong.yaml, model: Import path"),
    ],
)
def test_what_cannot_be_done_is_one_error_that_says_why(
    arguments: tuple[str, ...], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.yaml").write_text("")
    (folder / "large.yaml").write_text("#" * 5_000_000)
    (folder / "own.yaml").write_text("model: {width: 3}")
    (folder / "data.yaml").write_text("model: {class_path: planted_code.Planted}\ndata: {shift: 3}")
    (folder / "wrong.yaml").write_text("model: {class_path: planted_code.Data}")
    assert ran(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lightning-bn doctor: ")
    assert len(printed.err.splitlines()) == 1
    assert says in printed.err


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


@pytest.mark.parametrize("columns", [20, 27, 40, 60])
def test_no_line_is_wider_than_the_console(
    columns: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ran("--config", configuration(folder, model={"half": True}, data={"batch_size": 4}, sync_batchnorm=True))
    ran("--model", "planted_code:wide")
    ran("--model", "planted_code:SaysInColor", "--input", "8,4")
    ran("--config", configuration(folder, model={"fails": True}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10
    assert max(map(cell_len, lines)) <= columns


def test_classes_that_the_file_does_not_name_are_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.yaml").write_text("model: {half: true}\ndata: {batch_size: 4}\ntrainer: {accelerator: cpu}")
    assert ran("--config", "own.yaml", "--model", "planted_code:Planted", "--data", "planted_code:Data") == 1
    out = capsys.readouterr().out
    assert "frozen-by-requires-grad" in out
    assert "few-values" in out


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the example on digits, whose modules are forgotten afterwards."""
    folder = Path(__file__).parents[2] / "examples" / "digits_multitask"
    monkeypatch.chdir(folder.parents[1])
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    modules = set(sys.modules)
    yield folder
    for name in sys.modules.keys() - modules:
        del sys.modules[name]


CLASSES = ("--model", "model:DigitsModule", "--data", "data:DigitsData")


@pytest.mark.parametrize("name", ["pretrain", "tasks"])
def test_the_example_is_healthy(name: str, example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("--config", str(example / f"{name}.yaml"), *CLASSES) == 0
    assert "0 faults" in capsys.readouterr().out


def test_the_example_without_statistics_per_task_is_not(
    example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = yaml.safe_load((example / "tasks.yaml").read_text())
    described["trainer"]["callbacks"] = []
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(described))
    assert ran("--config", str(tmp_path / "shared.yaml"), *CLASSES) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "FAULT unlike-inputs" in out
    assert "TaskBatchNorm(" in out
