"""`lightning-bn recalibrate`: what is written, what is printed, and one line where it cannot be done."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.callbacks.cli_fits import DataFromYaml, FromYaml
from tests.checkpoints import differences, read, without_record
from tests.oracle import assert_all_statistics, layer_inputs

CLASSES = ("--model", "tests.callbacks.cli_fits:FromYaml", "--data", "tests.callbacks.cli_fits:DataFromYaml")
CHANGED = {f"/state_dict/net.{layer}.{value}" for layer in (1, 4) for value in ("running_mean", "running_var")}


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A YAML file of a training on eight processes, and in.ckpt."""
    torch.manual_seed(0)
    torch.save({"state_dict": FromYaml().state_dict(), "epoch": 3}, tmp_path / "in.ckpt")
    trainer = {"accelerator": "cpu", "devices": 8, "strategy": "ddp", "default_root_dir": str(tmp_path)}
    described = {
        "trainer": {**trainer, "enable_progress_bar": False},
        "model": {"class_path": "tests.callbacks.cli_fits.FromYaml"},
        "data": {"class_path": "tests.callbacks.cli_fits.DataFromYaml"},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(described))
    return "train.yaml"


def assert_precise(state: dict[str, Tensor], batches: int = 6) -> None:
    module = FromYaml()
    module.load_state_dict(state)
    used = list(DataFromYaml().inputs().split(16))[:batches]
    assert_all_statistics(module.net, layer_inputs(module.net.train(), used, ["1", "4"]))


def test_the_statistics_are_those_of_the_training_data_in_one_process(
    command: Any, config: str, tmp_path: Path
) -> None:
    code, said = command("recalibrate", "--config", config, "--ckpt_path", "in.ckpt", "--out", "out.ckpt")
    assert code == 0
    assert said.startswith("out.ckpt: weights as saved, 2 BatchNorm layers recalibrated from 96 samples")
    assert max(map(len, said.splitlines())) <= 80
    old, new = read(tmp_path / "in.ckpt"), read(tmp_path / "out.ckpt")
    assert set(differences(old, without_record(new))) == CHANGED
    assert_precise(new["state_dict"])
    assert {path.name for path in tmp_path.iterdir()} == {"in.ckpt", "out.ckpt", "train.yaml"}


def test_classes_that_the_file_does_not_name_are_given(command: Any, tmp_path: Path, config: str) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu"}, "model": {"width": 8}}))
    named = ("recalibrate", "--config", "own.yaml", "--ckpt_path", "in.ckpt", "--out", "out.ckpt")
    code, said = command(*named)
    assert code == 2
    assert "--model import.path:Class" in said
    assert not (tmp_path / "out.ckpt").exists()
    code, said = command(*named, *CLASSES, "--num_batches", "2", "--json")
    assert code == 0
    result = json.loads(said)
    assert result["batches"] == 2
    assert result["layers"] == ["net.1", "net.4"]
    assert_precise(read(tmp_path / "out.ckpt")["state_dict"], batches=2)


def test_several_files_are_averaged(command: Any, config: str, tmp_path: Path) -> None:
    other = read(tmp_path / "in.ckpt")
    other["state_dict"] = {name: value + 1 for name, value in other["state_dict"].items()}
    torch.save(other, tmp_path / "other.ckpt")
    named = ("recalibrate", "--config", config, "--ckpt_path", "in.ckpt", "--out", "soup.ckpt")
    code, said = command(*named, "--average_with", "other.ckpt", "other.ckpt")
    assert (code, said.partition(",")[0]) == (0, "soup.ckpt: average of 3 files")
    weight, soup = (read(tmp_path / name)["state_dict"]["net.0.weight"] for name in ("in.ckpt", "soup.ckpt"))
    torch.testing.assert_close(soup, weight + 2 / 3)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--ckpt_path", "in.ckpt", "--out", "in.ckpt"), "in.ckpt exists: choose another --out, or add --overwrite"),
        (("--ckpt_path", "train.yaml", "--out", "out.ckpt"), "cannot be read as a file of torch.save"),
        (("--ckpt_path", "none.ckpt", "--out", "out.ckpt"), "none.ckpt"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--step", "nope"), "FromYaml has no method of that name"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--step", "fails"), "ZeroDivisionError"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--modules", "head"), "head"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--num_batches", "0"), "num_batches=0"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--model", "no.such:Thing"), "--model no.such:Thing"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(
    command: Any, config: str, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    before = (tmp_path / "in.ckpt").read_bytes()
    code, said = command("recalibrate", "--config", config, *arguments)
    assert code == 2
    assert why in said
    assert said.startswith("lightning-bn recalibrate: ")
    assert len(said.splitlines()) == 1
    assert "Traceback" not in said
    assert (tmp_path / "in.ckpt").read_bytes() == before
    assert not (tmp_path / "out.ckpt").exists()
