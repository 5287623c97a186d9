"""The main example: its YAML files run through the LightningCLI and show what its README says."""

import importlib
import io
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from lightning_bn.functional import export_task

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "digits_multitask"
CALLBACKS = ("BatchNormFreezer", "BatchNormMonitor", "PreciseBatchNorm")

pytestmark = [
    # What the monitor says of a backbone that is not frozen is what the example is about.
    pytest.mark.filterwarnings("ignore:BatchNormMonitor"),
    # Phase B trains on one of two tasks alone.
    pytest.mark.filterwarnings("ignore:TaskBatchNorm. tasks names 'digit'"),
]


def callback_named(trainer, name):
    return next(callback for callback in trainer.callbacks if type(callback).__name__ == name)


def load(path):
    """The state dict of a checkpoint."""
    return torch.load(path, weights_only=True)["state_dict"]


def same_state(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


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
def alternating(example):
    return example("alternating")


@pytest.fixture(scope="module")
def alternated(alternating):
    """Experiment 3 with one seed."""
    return alternating.run(0, announce=lambda text: None)


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Where the fits of ``outcomes`` leave logs and checkpoints."""
    return tmp_path_factory.mktemp("fits")


@pytest.fixture(scope="module")
def outcomes(forgetting, fits):
    """Experiment 1 with one seed: pre-training, then config.yaml with each choice of callbacks."""
    return forgetting.run(0, fits, announce=lambda text: None)


def test_backbone_whose_statistics_are_kept_is_bit_identical_and_keeps_the_old_task(outcomes):
    for row in ("freezing", "both", "per-task statistics"):
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


def test_new_task_pays_nothing_for_statistics_of_its_own(outcomes):
    assert outcomes["per-task statistics"].new[-1] >= outcomes["no callbacks"].new[-1] - 0.5


def test_statistics_for_each_task_make_both_work_with_the_same_weights(alternating, alternated):
    shared, own = (alternated.accuracies[row] for row in (alternating.SHARED, alternating.OWN))
    assert alternated.same_training == (True, True)
    assert own["digit"] > shared["digit"] + 20
    assert own["parity"] > shared["parity"] + 5


def test_the_stem_alone_needs_them_and_is_suggested(alternating, alternated):
    own, suggested = (alternated.accuracies[row] for row in (alternating.OWN, alternating.SUGGESTED))
    assert alternated.suggested == ("network.backbone.stem",)
    assert all(abs(own[task] - suggested[task]) <= 1 for task in alternating.TASKS)
    assert "suggest() names network.backbone.stem in 2 of 2 fits" in alternating.reading([alternated, alternated])


def test_tables_fit_80_columns_without_cutting_anything(forgetting, outcomes, alternating, alternated):
    tables = [(forgetting, outcomes, 5), (alternating, alternated, 3)]
    for experiment, result, heading in tables:
        console = Console(width=80, file=io.StringIO())
        console.print(experiment.table([result, result]))
        lines = console.file.getvalue().splitlines()
        assert len(lines) == heading + 2 * len(experiment.ROWS)
        assert not any("…" in line for line in lines)


@pytest.mark.parametrize("file", ["config.yaml", "pretrain.yaml", "tasks.yaml"])
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


def test_tasks_yaml_as_it_stands_leaves_a_checkpoint_from_which_each_task_is_exported(example, tmp_path):
    arguments = {
        "trainer.max_epochs": 2,
        "trainer.logger.init_args.save_dir": tmp_path,
        "trainer.callbacks.dirpath": tmp_path,  # of the last one in the list
        "trainer.enable_progress_bar": False,
    }
    command = [f"--{name}={value}" for name, value in arguments.items()]
    run = example("cli").main(["fit", f"--config={EXAMPLE / 'tasks.yaml'}", *command])
    for task in ("digit", "parity"):
        export_task(tmp_path / "both.ckpt", task, tmp_path / f"{task}.ckpt")
        alone = example("model").DigitsModule(pretrained=tmp_path / f"{task}.ckpt").eval()
        accuracy = example("alternating").accuracy(alone.network, run.datamodule, task)
        assert accuracy == pytest.approx(float(run.trainer.callback_metrics[f"{task}_accuracy"]))
    assert not same_state(load(tmp_path / "digit.ckpt"), load(tmp_path / "parity.ckpt"))
    assert same_state(load(tmp_path / "digit.ckpt"), load(tmp_path / "both.ckpt"))
