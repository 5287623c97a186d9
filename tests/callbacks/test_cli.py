"""`recalibrate` as a subcommand of a LightningCLI: model and data of the YAML file that trained the checkpoint."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_bn import RecalibrateCommand
from lightning_bn.callbacks._lightning.namespaces import MisconfigurationException
from tests.averages import EMAWeightAveraging
from tests.callbacks.cli_fits import DataFromYaml, FromYaml, OwnCLI
from tests.checkpoints import differences, read, without_record
from tests.oracle import assert_all_statistics, layer_inputs

STATISTICS = ("running_mean", "running_var")


def written(folder: Path, **trainer: Any) -> Path:
    """The YAML file of a short fit."""
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "default_root_dir": str(folder),
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "logs"}},
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        **trainer,
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 0, "trainer": settings, "model": {"lr": 0.02}}))
    return path


def run(*args: Any) -> OwnCLI:
    return OwnCLI(FromYaml, DataFromYaml, args=[str(arg) for arg in args])


def recalibrate(trained: Path, out: Path, *args: Any, config: Path | None = None) -> OwnCLI:
    config = config or trained / "train.yaml"
    return run("recalibrate", "--config", config, "--ckpt_path", trained / "in.ckpt", "--out", out, *args)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.yaml and in.ckpt, and what fit saved in logs."""
    folder = tmp_path_factory.mktemp("trained")
    cli = run("fit", "--config", written(folder))
    cli.trainer.save_checkpoint(folder / "in.ckpt")
    return folder


def assert_precise(state: dict[str, Tensor], batches: int = 6) -> None:
    """The layers hold the statistics of what they get of the first batches in training."""
    module = FromYaml()
    module.load_state_dict(state)
    used = list(DataFromYaml().inputs().split(16))[:batches]
    assert_all_statistics(module.net, layer_inputs(module.net.train(), used, ["1", "4"]))


def test_the_statistics_are_those_of_the_training_data_and_nothing_else_differs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    cli = run(
        "recalibrate",
        "--config",
        trained / "train.yaml",
        "--ckpt_path",
        trained / "in.ckpt",
        "--out",
        tmp_path / "out.ckpt",
    )
    old, new = read(trained / "in.ckpt"), read(tmp_path / "out.ckpt")
    changed = {f"/state_dict/net.{layer}.{value}" for layer in (1, 4) for value in STATISTICS}
    assert set(differences(old, without_record(new))) == changed
    assert_precise(new["state_dict"])
    said = capsys.readouterr().out
    assert "out.ckpt: weights as saved, 2 BatchNorm layers recalibrated from 96 samples" in said
    assert "\nStandard error 0." in said
    # No log, no checkpoint, no configuration: nothing was trained.
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    assert cli.model.steps == 0
    assert cli.trainer.global_step == 0


def test_the_configuration_that_fit_saved_serves_as_well(trained: Path, tmp_path: Path) -> None:
    saved = next(trained.rglob("config.yaml"))
    run(
        "recalibrate",
        "--config",
        saved,
        "--ckpt_path",
        trained / "in.ckpt",
        "--out",
        tmp_path / "out.ckpt",
        "--num_batches",
        3,
    )
    assert_precise(read(tmp_path / "out.ckpt")["state_dict"], batches=3)


def test_averaged_weights_are_what_is_recalibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EMAWeightAveraging(decay=0.9)  # skips the test where there is none
    averaging = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9}}
    config = written(tmp_path, callbacks=[averaging])
    run("fit", "--config", config).trainer.save_checkpoint(tmp_path / "in.ckpt")
    recalibrate(tmp_path, tmp_path / "out.ckpt")
    old, new = read(tmp_path / "in.ckpt"), read(tmp_path / "out.ckpt")
    assert_precise(new["state_dict"])
    assert all(difference.startswith("/state_dict/") for difference in differences(old, without_record(new)))
    assert "out.ckpt: averaged weights" in capsys.readouterr().out


def test_the_average_of_several_files_is_recalibrated(trained: Path, tmp_path: Path) -> None:
    other = read(trained / "in.ckpt")
    other["state_dict"] = {
        name: value + (value.is_floating_point() and 1) for name, value in other["state_dict"].items()
    }
    torch.save(other, tmp_path / "other.ckpt")
    recalibrate(trained, tmp_path / "soup.ckpt", "--average_with", tmp_path / "other.ckpt")
    weight, soup = (read(path)["state_dict"]["net.0.weight"] for path in (trained / "in.ckpt", tmp_path / "soup.ckpt"))
    torch.testing.assert_close(soup, weight + 0.5)
    assert_precise(read(tmp_path / "soup.ckpt")["state_dict"])


def test_what_cannot_be_done_is_refused_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    config, path, out = (
        ("--config", trained / "train.yaml"),
        ("--ckpt_path", trained / "in.ckpt"),
        ("--out", tmp_path / "o.ckpt"),
    )
    with pytest.raises(MisconfigurationException, match="name a file with --ckpt_path"):
        run("recalibrate", *config, *out)
    with pytest.raises(MisconfigurationException, match="name a file with --out"):
        run("recalibrate", *config, *path)
    with pytest.raises(MisconfigurationException, match=r"has 2: add --trainer\.devices=1"):
        run("recalibrate", *config, *path, *out, "--trainer.devices", 2)
    with pytest.raises(MisconfigurationException, match="no_such_step"):
        run("recalibrate", *config, *path, *out, "--step", "no_such_step")
    with pytest.raises(FileExistsError, match="exists"):
        run("recalibrate", *config, *path, "--out", trained / "in.ckpt")
    assert not (tmp_path / "o.ckpt").exists()


def test_a_trainer_that_a_function_builds_is_refused_by_name() -> None:
    with pytest.raises(MisconfigurationException, match="needs a trainer_class that is a class"):
        OwnCLI(FromYaml, DataFromYaml, trainer_class=lambda: None, args=["fit"])


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_it_is_a_subcommand_in_both_namespaces(namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli = importlib.import_module(f"{namespace}.cli").LightningCLI
    own = type("Own", (RecalibrateCommand, cli), {})
    with pytest.raises(SystemExit):
        own(args=["recalibrate", "--help"])
    ours = capsys.readouterr().out.partition("Write a copy of a checkpoint with the running statistics")[2]
    assert "--average_with" in ours
    assert not {":func:", "``"} & {*ours.split()}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_other_subcommands_do_what_they_did(trained: Path) -> None:
    cli = run("validate", "--config", trained / "train.yaml", "--ckpt_path", trained / "in.ckpt")
    assert "validated" in cli.trainer.callback_metrics


@pytest.mark.parametrize("setting", [{"max_epochs": 0}, {"max_steps": 0}, {"max_epochs": -1}, {"fast_dev_run": True}])
def test_how_long_the_file_trains_does_not_matter(trained: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    config = written(tmp_path, **setting)
    recalibrate(trained, tmp_path / "out.ckpt", config=config)
    assert_precise(read(tmp_path / "out.ckpt")["state_dict"], batches=1 if "fast_dev_run" in setting else 6)


def test_a_file_that_trains_on_no_batch_is_refused_by_name(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="limit_train_batches"):
        recalibrate(trained, tmp_path / "out.ckpt", config=written(tmp_path, limit_train_batches=0))
    assert not (tmp_path / "out.ckpt").exists()
