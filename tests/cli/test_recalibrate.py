"""`lightning-bn recalibrate`: what is written, what is printed, and one line where it cannot be done."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.cells import cell_len
from torch import Tensor, nn

from lightning_bn.functional import recalibrate
from lightning_bn.functional.recalibration.result import error_in_words
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


def test_lines_are_no_wider_than_the_console_in_any_script(
    command: Any, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    code, said = command(
        "recalibrate", "--config", config, "--ckpt_path", "in.ckpt", "--out", f"{'重新校准' * 10}.ckpt"
    )
    assert code == 0
    assert 20 < max(map(cell_len, said.splitlines())) <= 30
    assert "weights as saved" in said


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
        (("--ckpt_path", "in.ckpt", "--out", "in.ckpt"), "in.ckpt is the checkpoint itself: choose another --out"),
        (("--ckpt_path", "in.ckpt", "--out", "sub/../in.ckpt"), "in.ckpt is the checkpoint itself: choose another"),
        (
            ("--ckpt_path", "none.ckpt", "--out", "train.yaml"),
            "train.yaml exists: choose another --out, or pass --over",
        ),
        (("--ckpt_path", "in.ckpt", "--out", "sub"), "sub is a folder: name the file to write, for"),
        (("--ckpt_path", "in.ckpt", "--out", "./"), ". is a folder: name the file to write, for"),
        (("--ckpt_path", "in.ckpt", "--out", "new/"), "new is a folder: name the file to write, for"),
        (("--ckpt_path", "pipe", "--out", "out.ckpt"), "pipe is not a regular file but a pipe, a socket or a device"),
        (("--ckpt_path", "in.ckpt", "--out", "in.ckpt/out.ckpt"), "in.ckpt is not a folder: choose another --out"),
        (("--ckpt_path", "in.ckpt", "--out", "dangling/out.ckpt"), "dangling is not a folder: choose another --out"),
        (("--ckpt_path", "in.ckpt", "--out", "/proc/none/out.ckpt"), "nothing can be written to /proc ("),
        (("--ckpt_path", "in.ckpt", "--out", "pipe", "--overwrite"), "pipe is not a regular file but a device"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--key", "ema"), "no state dict under --key 'ema'"),
        (("--ckpt_path", "train.yaml", "--out", "out.ckpt"), "train.yaml is not a checkpoint: it does not begin"),
        (("--ckpt_path", "none.ckpt", "--out", "out.ckpt"), ": none.ckpt: no such file or directory."),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--step", "nope"), "FromYaml has no method of that name"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--step", "fails"), "ZeroDivisionError"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--modules", "head"), "head"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--num_batches", "0"), "--num_batches 0"),
        (("--ckpt_path", "in.ckpt", "--out", "out.ckpt", "--model", "no.such:Thing"), "--model no.such:Thing"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(
    command: Any, config: str, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    before = (tmp_path / "in.ckpt").read_bytes()
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    code, said = command("recalibrate", "--config", config, *arguments)
    assert code == 2
    assert why in said
    assert said.startswith("lightning-bn recalibrate: ")
    assert len(said.splitlines()) == 1
    assert "Traceback" not in said
    assert (tmp_path / "in.ckpt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"in.ckpt", "train.yaml", "sub", "pipe", "dangling"}
    assert list((tmp_path / "sub").iterdir()) == []
    assert not (tmp_path / "out.ckpt").exists()


def test_a_place_that_cannot_be_written_to_is_said_before_the_users_code_runs(
    command: Any, config: str, tmp_path: Path
) -> None:
    (tmp_path / "train.yaml").write_text("model: {class_path: no_such.Net}")
    for out in ("in.ckpt/out.ckpt", "/proc/out.ckpt", "in.ckpt"):
        _, said = command("recalibrate", "--config", config, "--ckpt_path", "in.ckpt", "--out", out)
        assert "no_such" not in said


def test_folders_that_are_not_there_are_made(command: Any, config: str, tmp_path: Path) -> None:
    code, _ = command("recalibrate", "--config", config, "--ckpt_path", "in.ckpt", "--out", "new/folder/out.ckpt")
    assert code == 0
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["out.ckpt"]


def test_the_checkpoint_itself_is_replaced_where_that_is_asked_for(command: Any, config: str, tmp_path: Path) -> None:
    code, _ = command("recalibrate", "--config", config, "--ckpt_path", "in.ckpt", "--out", "in.ckpt", "--overwrite")
    assert code == 0
    assert_precise(read(tmp_path / "in.ckpt")["state_dict"])
    assert {path.name for path in tmp_path.iterdir()} == {"in.ckpt", "train.yaml"}


def test_what_the_standard_error_means_is_said(command: Any, config: str) -> None:
    named = ("recalibrate", "--config", config, "--ckpt_path", "in.ckpt", "--overwrite", "--out", "out.ckpt")
    _, said = command(*named)
    number = said.split("standard error ")[1].split(";")[0]
    sentence = f"Standard error {number}: by chance, the worst channel may be off by {number} standard deviations."
    assert sentence in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80
    # of one batch nobody knows it
    _, said = command(*named, "--num_batches", "1")
    assert "tandard error" not in said


def test_a_trainer_without_batches_is_said_without_the_name_of_an_exception(
    command: Any, config: str, tmp_path: Path
) -> None:
    described = yaml.safe_load((tmp_path / config).read_text())
    described["trainer"]["limit_train_batches"] = 0
    (tmp_path / config).write_text(yaml.safe_dump(described))
    code, said = command("recalibrate", "--config", config, "--ckpt_path", "in.ckpt", "--out", "out.ckpt")
    assert code == 2
    assert said.startswith("lightning-bn recalibrate: recalibrate: the Trainer has no batch to train on")


def test_shards_are_read_by_their_folder(command: Any, config: str, tmp_path: Path) -> None:
    state = read(tmp_path / "in.ckpt")["state_dict"]
    (tmp_path / "saved").mkdir()
    for index, name in enumerate(state):
        torch.save({name: state[name]}, tmp_path / "saved" / f"{index}.bin")
    places = {name: f"{index}.bin" for index, name in enumerate(state)}
    (tmp_path / "saved" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    named = ("recalibrate", "--config", config, "--ckpt_path", "saved", "--out")
    code, said = command(*named, "out")
    assert code == 2
    assert "written as one file: choose an --out that ends with .ckpt" in said
    code, said = command(*named, "out.safetensors", "--json")
    assert code == 0
    assert json.loads(said)["shards"] == len(state)


def test_noise_of_containers_is_named_with_the_option_that_turns_it_off(command: Any, config: str) -> None:
    named = ("recalibrate", "--config", config, "--ckpt_path", "in.ckpt", "--overwrite", "--out", "out.ckpt")
    _, said = command(*named)
    # the step itself draws random numbers
    assert "--containers_in_eval turns it off" in " ".join(said.split())
    assert "--no-containers_in_eval ends this message" in " ".join(said.split())
    for option in ("--containers_in_eval", "--no-containers_in_eval"):
        code, said = command(*named, option)
        assert (code, "random" in said) == (0, False)


def test_a_standard_error_is_good_or_not_or_unknown() -> None:
    result = recalibrate(nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(8, 2), torch.randn(8, 2)])
    assert error_in_words(replace(result, standard_error=0.05)).endswith("0.05 standard deviations. That is good.")
    assert error_in_words(replace(result, standard_error=0.051)).endswith("0.05 is good; with more data it is smaller.")
    assert error_in_words(replace(result, standard_error=float("inf"))) == ""
    # as the sentence of the result itself
    assert error_in_words(replace(result, nonfinite={"0": 1})) == ""


def test_one_sample_is_one_sample() -> None:
    result = recalibrate(nn.Sequential(nn.BatchNorm2d(2)), [torch.randn(1, 2, 4, 4)])
    assert "recalibrated from 1 sample in" in str(result)
    counted = replace(result, num_samples=None, skipped_batches=1, before=replace(result.before, mean=NAN, var=NAN))
    assert "recalibrated from 1 batch in" in str(counted)
    assert "; 1 batch skipped that had only one value per channel" in str(counted)
    assert "not finite in 1 channel, first in 0" in str(counted)


NAN = torch.tensor([torch.nan, 1.0])
