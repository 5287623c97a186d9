"""All callbacks, in both of Lightning's namespaces: alone and in lists, in Trainers and in both LightningCLIs."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_bn
from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm, TaskBatchNorm
from tests.callbacks.fits import LAYERS, Net, samples, train_loader, val_loader
from tests.models import fill_statistics, seeded

NAMESPACES = {"pytorch_lightning": pytorch_lightning, "lightning.pytorch": lightning.pytorch}

CALLBACKS: dict[str, Callable[[], Any]] = {
    "BatchNormFreezer": lambda: BatchNormFreezer(["net.features"]),
    "BatchNormMonitor": lambda: BatchNormMonitor(every_n_steps=1),
    "PreciseBatchNorm": lambda: PreciseBatchNorm(num_batches=2),
    "TaskBatchNorm": lambda: TaskBatchNorm(["one"], unlabelled="one"),
}


class Common:
    """What a module of either namespace does."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = fill_statistics(seeded(Net))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)  # type: ignore[attr-defined]


class OldModule(Common, pytorch_lightning.LightningModule):
    """For `pytorch_lightning`."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)


class NewModule(Common, lightning.pytorch.LightningModule):
    """For `lightning.pytorch`."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)


class CommonData:
    """What a datamodule of either namespace does."""

    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader(samples())

    def val_dataloader(self) -> DataLoader[Any]:
        return val_loader()


class OldData(CommonData, pytorch_lightning.LightningDataModule):
    """For `pytorch_lightning`."""


class NewData(CommonData, lightning.pytorch.LightningDataModule):
    """For `lightning.pytorch`."""


PARTS = {"pytorch_lightning": (OldModule, OldData), "lightning.pytorch": (NewModule, NewData)}

QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def assert_it_worked(callback: Any) -> None:
    if isinstance(callback, BatchNormFreezer):
        assert callback.report.identical
        assert callback.report.layers == LAYERS[:1]
    elif isinstance(callback, BatchNormMonitor):
        assert len(callback.history) > 0
    elif isinstance(callback, TaskBatchNorm):
        assert [task for task, _ in callback.bank.parts()] == ["one"]
    else:
        assert callback.last.num_batches == 2


def test_every_public_callback_is_tested_here():
    public = {name for name in lightning_bn.__all__ if name[0].isupper()}
    assert {name for name in public if issubclass(getattr(lightning_bn, name), pytorch_lightning.Callback)} == set(
        CALLBACKS
    )


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", CALLBACKS)
def test_callback_is_accepted_alone(name, namespace):
    callback = CALLBACKS[name]()
    module, data = PARTS[namespace]
    NAMESPACES[namespace].Trainer(callbacks=callback, **QUIET).fit(module(), data())
    assert_it_worked(callback)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_callbacks_are_accepted_together(namespace, order):
    callbacks = [make() for make in CALLBACKS.values()][::order]
    module, data = PARTS[namespace]
    NAMESPACES[namespace].Trainer(callbacks=callbacks, **QUIET).fit(module(), data())
    for callback in callbacks:
        assert_it_worked(callback)


@pytest.mark.parametrize("name", CALLBACKS)
def test_callback_is_one_of_both_namespaces(name):
    callback = CALLBACKS[name]()
    assert isinstance(callback, pytorch_lightning.Callback)
    assert isinstance(callback, lightning.pytorch.Callback)


def config(callbacks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"trainer": {**QUIET, "callbacks": callbacks}, "model": {"lr": 0.05}}


IN_YAML = [
    {"class_path": "lightning_bn.BatchNormFreezer", "init_args": {"modules": ["net.features", "net.head"]}},
    {
        "class_path": "lightning_bn.BatchNormMonitor",
        "init_args": {"every_n_steps": 1, "measure": "wasserstein", "exclude": "net.**.1"},
    },
    {
        "class_path": "lightning_bn.PreciseBatchNorm",
        "init_args": {"num_batches": 2, "step": "training_step", "modules": "bn", "root": "net"},
    },
    {
        "class_path": "lightning_bn.TaskBatchNorm",
        "init_args": {"tasks": ["one"], "unlabelled": "one", "modules": ["head"], "root": "net", "val_tasks": ["one"]},
    },
]


def run_cli(namespace: str, args: list[str]) -> Any:
    cli = importlib.import_module(f"{namespace}.cli").LightningCLI
    module, data = PARTS[namespace]
    return cli(module, data, args=args, save_config_callback=None, seed_everything_default=False)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(IN_YAML)))
    return path


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_yaml_runs_through_the_command_line(namespace, yaml_file):
    cli = run_cli(namespace, ["fit", "--config", str(yaml_file)])
    found = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    assert found["BatchNormFreezer"].report.layers == ("net.features.1", "net.head.1")
    assert found["BatchNormFreezer"].report.identical
    assert found["BatchNormMonitor"].measure == "wasserstein"
    assert any(key.startswith("bn/wasserstein") for key in cli.trainer.callback_metrics)
    assert found["PreciseBatchNorm"].last.layers == ("net.bn",)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_printed_config_holds_every_argument_and_runs_again(namespace, yaml_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_cli(namespace, ["fit", "--config", str(yaml_file), "--print_config"])
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    callbacks = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == list(CALLBACKS)
    arguments = {name for callback in callbacks for name in callback["init_args"]}
    assert {"stats", "affine", "act_above", "reference", "every_n_validations", "num_batches", "step"} <= arguments
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    cli = run_cli(namespace, ["fit", "--config", str(again)])
    assert [c.last.layers for c in cli.trainer.callbacks if isinstance(c, PreciseBatchNorm)] == [("net.bn",)]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_callback_and_its_arguments_can_be_given_on_the_command_line(namespace):
    quiet = [f"--trainer.{name}={value}" for name, value in QUIET.items()]
    cli = run_cli(
        namespace,
        [
            "fit",
            *quiet,
            "--trainer.callbacks+=lightning_bn.PreciseBatchNorm",
            "--trainer.callbacks.num_batches=2",
            "--trainer.callbacks.modules=[net.bn, net.head]",
        ],
    )
    [callback] = [callback for callback in cli.trainer.callbacks if isinstance(callback, PreciseBatchNorm)]
    assert callback.last.layers == ("net.bn", "net.head.1")


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    ("callback", "argument", "value"),
    [
        ("BatchNormMonitor", "measure", "jefreys"),
        ("BatchNormMonitor", "action", "explode"),
        ("PreciseBatchNorm", "num_batches", "many"),
        ("BatchNormFreezer", "modulse", "net"),
    ],
)
def test_argument_that_cannot_be_is_refused_with_its_name(namespace, callback, argument, value, tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(
        yaml.safe_dump(config([{"class_path": f"lightning_bn.{callback}", "init_args": {argument: value}}]))
    )
    with pytest.raises(SystemExit) as ended:
        run_cli(namespace, ["fit", "--config", str(path)])
    assert ended.value.code not in (0, None)
    assert argument in capsys.readouterr().err


@pytest.mark.parametrize("name", CALLBACKS)
def test_help_shows_what_each_argument_is_for(name, capsys):
    with pytest.raises(SystemExit):
        run_cli("lightning.pytorch", ["fit", f"--trainer.callbacks.help=lightning_bn.{name}"])
    shown = capsys.readouterr().out
    assert "Which BatchNorm layers" in shown
    assert "--trainer.callbacks.root" in shown or "root ROOT" in shown


@pytest.mark.processes
@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_import_leaves_the_logger_of_the_users_lightning(namespace):
    code = (
        f"import {namespace}; from lightning_utilities.core import rank_zero; before = rank_zero.log; "
        f"import lightning_bn; lightning_bn.PreciseBatchNorm; assert rank_zero.log is before, rank_zero.log"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
