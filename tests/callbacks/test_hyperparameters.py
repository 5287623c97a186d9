"""Settings of callbacks stand among the hyperparameters of a run's loggers, and what the user logs stays as it was."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm, TaskBatchNorm
from tests.callbacks.fits import Classifier, quiet, train_loader, val_loader

MADE: dict[str, Any] = {
    "BatchNormFreezer": lambda **options: BatchNormFreezer(["features"], root="net", start_epoch=5, **options),
    "BatchNormMonitor": lambda **options: BatchNormMonitor(act_above=2.0, report=False, **options),
    "PreciseBatchNorm": lambda **options: PreciseBatchNorm(2, **options),
    "TaskBatchNorm": lambda **options: TaskBatchNorm(["a"], "net.bn", unlabelled="a", **options),
}


class WithSettings(Classifier):
    """Saves what it was made with, as most modules do."""

    def __init__(self, lr: float = 0.1, depth: int = 3) -> None:
        super().__init__(lr=lr)
        self.depth = depth
        self.save_hyperparameters()


def fit(logger: Any, *callbacks: Any, module: Any = None, **trainer: Any) -> pl.Trainer:
    run = quiet(logger=logger, callbacks=list(callbacks), max_epochs=1, limit_train_batches=1, **trainer)
    run.fit(module or WithSettings(), train_loader(), val_loader())
    return run


def written(logger: Any) -> dict[str, Any]:
    return yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_every_argument_is_among_them_beside_those_of_the_module(logger: Any, kind: str, tmp_path: Path) -> None:
    callback, its = MADE[kind](), logger(tmp_path)
    fit(its, callback)
    found = written(its)
    assert {name: found.pop(name) for name in ("lr", "depth")} == {"lr": 0.1, "depth": 3}
    assert {name for name in found if name.startswith(kind)} == {
        f"{kind}/{name}" for name in inspect.signature(type(callback)).parameters
    }
    assert all(value is None or isinstance(value, bool | int | float | str) for value in found.values())


def test_what_is_no_plain_value_is_text(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(logger, *(make() for make in MADE.values()))
    found = written(logger)
    assert found["BatchNormFreezer/modules"] == "['features']"
    assert (found["BatchNormFreezer/start_epoch"], found["BatchNormFreezer/stop_epoch"]) == (5, None)
    assert (found["BatchNormMonitor/act_above"], found["BatchNormMonitor/report"]) == (2.0, False)
    assert (found["PreciseBatchNorm/num_batches"], found["PreciseBatchNorm/source"]) == (2, "train")
    assert found["TaskBatchNorm/tasks"] == "['a']"


def test_two_of_a_kind_are_told_apart_by_their_names(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(logger, BatchNormMonitor(report=False), BatchNormMonitor(7, report=False, name="a [b]", prefix="b"))
    found = written(logger)
    assert (found["BatchNormMonitor/every_n_steps"], found["BatchNormMonitor/a _b_/every_n_steps"]) == (50, 7)


def test_they_are_there_without_hyperparameters_of_the_module(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(logger, BatchNormMonitor(report=False), module=Classifier())
    assert {name.split("/")[0] for name in written(logger)} == {"BatchNormMonitor"}


def events(folder: str) -> EventAccumulator:
    found = EventAccumulator(folder)
    found.Reload()
    return found


@pytest.mark.parametrize("module", [WithSettings, Classifier])
def test_what_tensorboard_shows_is_as_without_a_callback(module: Any, tmp_path: Path) -> None:
    shown = []
    for folder, callbacks in (("plain", []), ("watched", [PreciseBatchNorm(2)])):
        logger = TensorBoardLogger(tmp_path, name=folder)
        fit(logger, *callbacks, module=module())
        found = events(logger.log_dir)
        plugin = found.PluginTagToContent("hparams") if "hparams" in found.ActivePlugins() else {}
        begun = plugin.get("_hparams_/session_start_info", b"")
        # Behind it stands the time.
        names = {name for name in (b"lr", b"depth", b"PreciseBatchNorm") if name in begun}
        shown.append((names, {tag for tag in found.Tags()["tensors"] if "precise" not in tag}))
    assert shown[0] == shown[1]
    assert shown[0][0] == ({b"lr", b"depth"} if module is WithSettings else set())


class Bare(CSVLogger):
    """A logger without hyperparameters, as some of users' own are, or one that refuses them."""

    def __init__(self, folder: Path, refuses: bool) -> None:
        super().__init__(folder)
        self.refuses = refuses

    def log_hyperparams(self, params: Any = None) -> None:
        if self.refuses and any(name.startswith("Batch") for name in params):
            raise RuntimeError("changing a parameter is not allowed")


def test_a_logger_that_refuses_them_is_one_warning_and_no_end_of_a_fit(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="BatchNormMonitor: Bare could not log its settings .changing a parameter"):
        trainer = fit(Bare(tmp_path, refuses=True), BatchNormMonitor(report=False))
    assert trainer.global_step == 1
    fit(Bare(tmp_path, refuses=False), BatchNormMonitor(report=False))


class Least(Logger):
    """What a logger has to have and nothing else."""

    name = version = "least"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.params = {**getattr(self, "params", {}), **params}


def test_a_logger_of_ones_own_gets_them_like_others() -> None:
    logger = Least()
    fit(logger, BatchNormMonitor(3, report=False))
    assert (logger.params["BatchNormMonitor/every_n_steps"], logger.params["lr"]) == (3, 0.1)


@pytest.mark.parametrize("option", [{"fast_dev_run": True}, {"logger": False}], ids=str)
def test_without_a_logger_nothing_is_done(option: dict[str, Any]) -> None:
    module = Classifier()
    run = quiet(callbacks=[BatchNormMonitor(report=False)], max_steps=1, **option)
    run.fit(module, train_loader(), val_loader())
    assert run.global_step == 1


def test_the_trainer_can_be_told_to_log_no_hyperparameters(tmp_path: Path) -> None:
    if "enable_autolog_hparams" not in inspect.signature(pl.Trainer).parameters:
        pytest.skip("the Trainer has no such argument")
    logger = CSVLogger(tmp_path)
    fit(logger, BatchNormMonitor(report=False), enable_autolog_hparams=False)
    assert not (Path(logger.log_dir) / "hparams.yaml").exists()


class Derived(BatchNormMonitor):
    """One with arguments of its own."""

    def __init__(self, extra: int = 1, **options: Any) -> None:
        super().__init__(report=False, **options)
        self.extra = extra


def test_a_derived_callback_has_the_settings_of_its_base(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(logger, Derived(every_n_steps=4))
    assert written(logger)["Derived/every_n_steps"] == 4


def test_the_other_namespace_has_them_too(tmp_path: Path) -> None:
    class Boring(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.bn = Classifier().net.bn

    logger = lightning.pytorch.loggers.CSVLogger(str(tmp_path))
    trainer = lightning.pytorch.Trainer(
        accelerator="cpu",
        logger=logger,
        max_steps=1,
        limit_val_batches=0,
        callbacks=[BatchNormFreezer("bn", start_epoch=5)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Boring())
    assert written(logger)["BatchNormFreezer/modules"] == "bn"
