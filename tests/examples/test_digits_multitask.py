"""The main example: its YAML files run through the LightningCLI and show what its README says."""

import importlib
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "digits_multitask"
CALLBACKS = ("lightning_bn.BatchNormFreezer", "lightning_bn.BatchNormMonitor", "lightning_bn.PreciseBatchNorm")


@pytest.fixture(scope="module")
def example():
    """Imports a module of the example by name; it sees its neighbours as it does when run as a script."""
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLE))
    for path in EXAMPLE.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def forgetting(example):
    return example("forgetting")


@pytest.fixture(scope="module")
def outcomes(forgetting, tmp_path_factory):
    """Experiment 1 with one seed: pre-training, then config.yaml with each choice of callbacks."""
    return forgetting.run(0, tmp_path_factory.mktemp("fits"), announce=lambda text: None)


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
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(forgetting.table([outcomes, outcomes]))
    assert "…" not in console.export_text()
