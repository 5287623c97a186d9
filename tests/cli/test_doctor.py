"""`lightning-bn doctor`: exit codes, what is printed, and one line where it cannot be done."""

import ast
import itertools
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.cells import cell_len

from tests.averages import EMAWeightAveraging
from tests.cli.doctors_code import configuration, ran


@pytest.fixture
def folder(doctors_folder: Path) -> Path:
    return doctors_folder


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
