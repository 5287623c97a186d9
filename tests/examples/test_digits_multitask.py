"""The main example: its YAML files run through the LightningCLI and show what its README says."""

import importlib
import io
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "digits_multitask"
CALLBACKS = ("BatchNormFreezer", "BatchNormMonitor", "PreciseBatchNorm")

# What the monitor says of a backbone that is not frozen is what the example is about.
pytestmark = pytest.mark.filterwarnings("ignore:BatchNormMonitor")


def callback_named(trainer, name):
    return next(callback for callback in trainer.callbacks if type(callback).__name__ == name)


def load(path):
    """The state dict of a checkpoint."""
    return torch.load(path, weights_only=True)["state_dict"]


def classes(text):
    """Names of the callbacks in a YAML text, in order."""
    return [callback["class_path"].split(".")[-1] for callback in yaml.safe_load(text)["trainer"]["callbacks"]]


def print_config(cli, path, capsys):
    """What ``cli.py fit --config <path> --print_config`` prints."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", f"--config={path}", "--print_config"])
    assert not stopped.value.code
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def example():
    """Imports a module of the example by name; it sees its neighbors as it does when run as a script."""
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLE))
    for path in EXAMPLE.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def forgetting(example):
    return example("forgetting")


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Where the fits of ``outcomes`` leave logs and checkpoints."""
    return tmp_path_factory.mktemp("fits")


@pytest.fixture(scope="module")
def outcomes(forgetting, fits):
    """Experiment 1 with one seed: pre-training, then config.yaml with each choice of callbacks."""
    return forgetting.run(0, fits, announce=lambda text: None)


def test_frozen_backbone_is_bit_identical_and_keeps_the_old_task(outcomes):
    for row in ("freezing", "both"):
        assert outcomes[row].weights_kept
        assert outcomes[row].statistics_kept
        assert outcomes[row].drift.max == 0
        assert outcomes[row].old[-1] == outcomes[row].old_before


def test_without_freezing_statistics_drift_and_the_old_task_dies(outcomes):
    for row in ("no callbacks", "recalibration"):
        assert outcomes[row].weights_kept
        assert not outcomes[row].statistics_kept
        assert outcomes[row].drift.max > 1
        assert outcomes[row].old[-1] < outcomes[row].old_before - 30


def test_new_task_is_learned_in_every_row(outcomes):
    for outcome in outcomes.values():
        assert outcome.new[-1] > 90


def test_table_fits_80_columns_without_cutting_anything(forgetting, outcomes):
    console = Console(width=80, file=io.StringIO())
    console.print(forgetting.table([outcomes, outcomes]))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 5 + 2 * len(forgetting.ROWS)
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("file", ["config.yaml", "pretrain.yaml"])
def test_print_config_gives_a_config_that_means_the_same(file, example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = print_config(example("cli"), EXAMPLE / file, capsys)
    (tmp_path / "printed.yaml").write_text(printed)
    assert print_config(example("cli"), tmp_path / "printed.yaml", capsys) == printed
    assert classes(printed) == classes((EXAMPLE / file).read_text())


def test_config_as_it_stands_freezes_monitors_recalibrates_and_saves(example, forgetting, outcomes, fits, tmp_path):
    pretrained = fits / "pretrained" / "digits.ckpt"
    arguments = {
        "trainer.max_epochs": 2,
        "trainer.logger.init_args.save_dir": tmp_path,
        "trainer.enable_progress_bar": False,
        "model.pretrained": pretrained,
    }
    command = [f"--{name}={value}" for name, value in arguments.items()]
    trainer = example("cli").main(["fit", f"--config={EXAMPLE / 'config.yaml'}", *command]).trainer
    freezer, monitor, precise = (callback_named(trainer, name) for name in CALLBACKS)
    assert freezer.report.identical
    assert len(freezer.report.layers) == 3
    assert trainer.callback_metrics["bn/jeffreys_max"] == 0
    assert len(monitor.history) > 10
    assert precise.last.layers == ("network.heads.parity.1",)
    before, after = (load(path) for path in (pretrained, trainer.checkpoint_callback.best_model_path))
    frozen = [name for name in before if name.startswith("network.backbone.")]
    assert len(frozen) == 3 * 6
    assert all(torch.equal(before[name], after[name]) for name in frozen)
