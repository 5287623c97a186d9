"""What a monitor shows at the end never ends a fit, and what it says of several uses and of resumed fits is true."""

import copy
import inspect
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F

from lightning_bn import BatchNormMonitor
from lightning_bn.functional.monitoring.session import MonitorSession
from tests.callbacks.fits import Classifier, quiet, train_loader, val_loader
from tests.callbacks.monitoring_fits import monitor, warned
from tests.models import bits


def run(watching: Any, logger: Any = False, module: Any = None, **options: Any) -> pl.Trainer:
    pl.seed_everything(3, verbose=False)
    trainer = quiet(callbacks=[watching, *options.pop("callbacks", [])], logger=logger, log_every_n_steps=1, **options)
    trainer.fit(module or Classifier(), train_loader(), val_loader())
    return trainer


# Tables and figures


class Elsewhere(TensorBoardLogger):
    """Whose folder is another one for whoever wants to write a figure."""

    place = "/dev/null/deeper"

    @property
    def log_dir(self) -> str:
        return self.place if inspect.stack()[1].function == "_folder_of" else super().log_dir


class Full(Elsewhere):
    place = "/dev/full"


@pytest.mark.parametrize("kind", [Elsewhere, Full])
def test_log_directory_that_cannot_be_written_to_is_one_warning(kind: Any, tmp_path: Path) -> None:
    told = warned(lambda: run(monitor(report=True), kind(tmp_path)))
    assert len([line for line in told if "BatchNormMonitor: the figure could not be made" in line]) == 1


def test_remote_log_directory_gets_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger = TensorBoardLogger("memory://runs", name="one", version=0)
    run(monitor(report=True), logger, default_root_dir="memory://runs")
    files = fsspec.filesystem("memory").find("/runs")
    assert [name for name in files if name.endswith("_drift.png")] == ["/runs/one/version_0/bn_jeffreys_drift.png"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_terminal_that_cannot_show_a_character_gets_the_table_without_it(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert warned(lambda: run(monitor(report=True))) == []
    sys.stdout.flush()
    assert "Running statistics of 3 BatchNorm layers" in written.getvalue().decode(encoding)


class Loses(Classifier):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net.bn = nn.Identity()


@pytest.mark.parametrize("modules", [None, "net"])
def test_layer_that_is_gone_when_the_table_is_made_is_not_in_it(
    modules: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    warned(lambda: run(monitor(report=True, modules=modules), module=Loses(), max_epochs=3))
    table = capsys.readouterr().out
    assert "Running statistics of 2 BatchNorm layers" in table
    assert [line.split()[0] for line in table.split("──\n")[1].splitlines()[:2]] == ["features.1", "head.1"]
    assert "\nbn " not in table


def test_only_layer_that_is_gone_is_one_warning() -> None:
    told = warned(lambda: run(monitor(report=True, modules="net.bn"), module=Loses(), max_epochs=3))
    assert len([line for line in told if "the table could not be made" in line]) == 1


def test_missing_matplotlib_is_said_once_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_bn.callbacks._lightning.figures.find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        run(monitor(report=True), CSVLogger(tmp_path))
    assert caplog.text.count("no figure without matplotlib: pip install 'lightning-bn[plot]'") == 1


# State that is loaded in mid-fit


class LoadsInMidFit(pl.Callback):
    """As tuners do that go back to where they began."""

    def __init__(self, at: int) -> None:
        self.at, self.saved = at, {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        watching = trainer.callbacks[0]  # type: ignore[attr-defined]
        if trainer.global_step == 1:
            self.saved = watching.state_dict()
        if trainer.global_step == self.at:
            watching.load_state_dict(self.saved)


@pytest.mark.parametrize("at", [2, 8])
@pytest.mark.parametrize("every", [1, 3, 50])
def test_state_loaded_in_mid_fit_goes_on_from_there(
    at: int, every: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watching = monitor(report=True, every_n_steps=every)
    with caplog.at_level("INFO"):
        assert warned(lambda: run(watching, CSVLogger(tmp_path), callbacks=[LoadsInMidFit(at)])) == []
    assert "-1 layer" not in caplog.text
    assert watching.history.steps == sorted(set(watching.history.steps))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("reference", ["fit_start", "previous_epoch"])
def test_history_of_a_resumed_fit_is_that_of_the_uninterrupted_one(
    epochs: int, every: int, reference: str, tmp_path: Path
) -> None:
    def fit(watching: Any, **options: Any) -> Any:
        pl.seed_everything(3, verbose=False)
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
        trainer = quiet(callbacks=[watching, saver], enable_checkpointing=True, max_epochs=3)
        trainer.fit(Classifier(dropout=0.0), train_loader(shuffle=False), val_loader(), **options)
        return watching.history

    whole = fit(monitor(every_n_steps=every, reference=reference))
    resumed = fit(monitor(every_n_steps=every, reference=reference), ckpt_path=tmp_path / f"step={4 * epochs}.ckpt")
    assert (resumed.steps, resumed.epochs, resumed.marks) == (whole.steps, whole.epochs, whole.marks)
    assert bits(resumed.values()) == bits(whole.values())


# Several uses of a layer in one step


class TwoUses(Classifier):
    """Both halves of a batch through the network, the second one moved."""

    def __init__(self, by: float) -> None:
        super().__init__(dropout=0.0)
        self.by = by

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (near, far), (one, other) = batch[0].chunk(2), batch[1].chunk(2)
        return F.cross_entropy(self.net(near), one) + F.cross_entropy(self.net(far + self.by), other)


@pytest.mark.parametrize(("by", "apart"), [(40.0, True), (-40.0, True), (0.0, False)])
def test_uses_of_one_step_are_told_apart_by_their_inputs(by: float, apart: bool) -> None:
    told = warned(lambda: run(monitor(every_n_steps=2), module=TwoUses(by)))
    [line] = [line for line in told if "times per" in line]
    if apart:
        assert "is used 2 times per step with inputs whose means lie" in line
        assert "two tasks or views share it" in line
    else:
        assert "is updated 2 times per batch: it is used more than once in a forward" in line


@pytest.mark.parametrize("by", [0.0, 40.0])
def test_looking_at_uses_disturbs_no_training_and_leaves_no_hook(by: float) -> None:
    found = []
    for callbacks in ([], [monitor(every_n_steps=1)]):
        pl.seed_everything(3, verbose=False)
        module = TwoUses(by)
        trainer = quiet(callbacks=list(callbacks))
        warned(lambda trainer=trainer, module=module: trainer.fit(module, train_loader(), val_loader()))  # type: ignore[misc]
        found.append({name: bits(value) for name, value in module.state_dict().items()})
        assert not any(part._forward_hooks for part in module.modules())
    assert found[0] == found[1]


def test_session_of_ones_own_says_the_same() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4)).train()
    session = MonitorSession({"0": net[0]}, every_n_steps=5)  # type: ignore[dict-item]
    said: list[str] = []
    for step in range(1, 11):
        session.before_batch()
        for shift in (0, 30):
            net(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)) + shift)
        if session.after_batch(torch.zeros(32, 4), step):
            sample = session.sample(step, right_after=True)
            assert sample is not None
            said += sample.messages
    assert any("0 is used 2 times per step with inputs whose means lie 30" in line for line in said)


# Outside of a fit


@pytest.mark.parametrize("hook", [name for name in dir(pl.Callback) if name.startswith("on_")])
def test_hooks_that_are_called_by_hand_outside_of_a_fit_do_no_harm(hook: str) -> None:
    watching: Callable[..., Any] = BatchNormMonitor()  # type: ignore[assignment]
    given: dict[str, Any] = {"trainer": quiet(callbacks=[watching]), "pl_module": Classifier(), "checkpoint": {}}
    given |= {"batch": next(iter(train_loader())), "outputs": {}, "exception": ValueError()}
    parameters = list(inspect.signature(getattr(pl.Callback, hook)).parameters)[1:]
    getattr(watching, hook)(*(given.get(name, 0) for name in parameters))


class WithInstanceNorm(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.features.append(nn.InstanceNorm2d(4, track_running_stats=True))


def test_what_is_not_measured_since_it_only_looks_like_batch_norm_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run(monitor(report=True), module=WithInstanceNorm())
    said = " ".join(capsys.readouterr().out.split())
    assert "Not listed, since they are not torch's BatchNorm: net.features.5 (InstanceNorm2d)." in said


def used(shifts: tuple[float, ...], momentum: float | None = 0.1) -> list[str]:
    """What a session says of a layer that a step uses once for each shift."""
    layer = nn.BatchNorm1d(4, momentum=momentum).train()
    session = MonitorSession({"bn": layer}, every_n_steps=5)
    said: list[str] = []
    for step in range(1, 11):
        session.before_batch()
        for use, shift in enumerate(shifts):
            layer(torch.randn(16, 4, generator=torch.Generator().manual_seed(10 * step + use)) + shift)
        if session.after_batch(torch.zeros(16 * len(shifts), 4), step):
            sample = session.sample(step, right_after=True)
            said += [] if sample is None else sample.messages
    return [line for line in said if "times per" in line]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shifts", [(0, 30), (0, 0, 30), (0, 30, 0), (30, 0, 0)])
def test_furthest_use_counts_however_many_there_are(shifts: tuple[float, ...], momentum: float | None) -> None:
    [line] = used(shifts, momentum)
    assert f"is used {len(shifts)} times per step with inputs whose means lie" in line
    [line] = used((0,) * len(shifts), momentum)
    assert "it is used more than once in a forward" in line


def test_copy_that_a_step_makes_of_the_model_takes_no_hook_along() -> None:
    layer = nn.BatchNorm1d(4).train()
    session = MonitorSession({"bn": layer}, every_n_steps=1)
    session.before_batch()
    twin, loaded = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for _ in range(5):
        twin(torch.randn(8, 4))
        loaded(torch.randn(8, 4))
    layer(torch.randn(8, 4))
    session.after_batch(torch.zeros(8, 4), 1)
    held = [hook._seen for other in (twin, loaded) for hook in other._forward_hooks.values()]  # type: ignore[attr-defined]
    assert held == [None, None]
    assert not layer._forward_hooks


@pytest.mark.parametrize(
    "arguments",
    [
        {"every_n_steps": 0},
        {"every_n_steps": True},
        {"measure": "x"},
        {"measure": []},
        {"warn_above": "a"},
        {"act_above": float("nan")},
        {"step": -1},
        {"step": 1.5},
        {"reference": "nowhere"},
    ],
    ids=str,
)
def test_session_refuses_arguments_by_their_names(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MonitorSession({"bn": nn.BatchNorm1d(4)}, **arguments)
