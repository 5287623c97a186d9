"""Arrows point down only: the linter holds it, every rule can fail, and only who uses Lightning pays for it."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_bn"


@pytest.fixture
def copy(tmp_path):
    """The project's ruff configuration in the package's folder structure, without any code."""
    for config in [ROOT / "pyproject.toml", *PACKAGE.rglob("ruff.toml")]:
        target = tmp_path / config.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(config, target)
    return tmp_path


def lint(root, path, line):
    """What ruff says of the imports of a file with this source, in the copied structure: exit status and text."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(line + "\n")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "--select=TID"]
    done = subprocess.run([*command, str(target)], cwd=root, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


FUNCTIONAL = "lightning_bn/functional/planted.py"
FREEZER = "lightning_bn/callbacks/freezer.py"
MONITOR = "lightning_bn/callbacks/monitor.py"
REPORT = "lightning_bn/report.py"

BANNED = [
    # the ground floor knows no framework and nothing above it
    (FUNCTIONAL, "import pytorch_lightning"),
    (FUNCTIONAL, "import pytorch_lightning.callbacks"),
    (FUNCTIONAL, "from pytorch_lightning.utilities import rank_zero_warn"),
    (FUNCTIONAL, "import lightning.pytorch as pl"),
    (FUNCTIONAL, "import lightning_fabric"),
    (FUNCTIONAL, "from lightning_utilities.core import imports"),
    (FUNCTIONAL, "from torchmetrics import Metric"),
    (FUNCTIONAL, "import numpy as np"),
    (FUNCTIONAL, "from rich.table import Table"),
    (FUNCTIONAL, "import matplotlib.pyplot as plt"),
    (FUNCTIONAL, "from jsonargparse import ArgumentParser"),
    (FUNCTIONAL, "from lightning_bn.callbacks.freezer import BatchNormFreezer"),
    (FUNCTIONAL, "from lightning_bn import callbacks"),
    (FUNCTIONAL, "from lightning_bn import BatchNormFreezer"),
    (FUNCTIONAL, "from lightning_bn import BatchNormMonitor"),
    (FUNCTIONAL, "from lightning_bn import BatchNormDrift"),
    (FUNCTIONAL, "from lightning_bn import PreciseBatchNorm"),
    (FUNCTIONAL, "from lightning_bn.report import behavior_table"),
    (FUNCTIONAL, "from lightning_bn import plotting"),
    (FUNCTIONAL, "import lightning_bn.metrics"),
    # neither inside a function nor for type checkers only
    (FUNCTIONAL, "def f():\n    import pytorch_lightning"),
    (FUNCTIONAL, "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pytorch_lightning"),
    # folders below a folder with rules are under them too
    ("lightning_bn/functional/deeper/planted.py", "import pytorch_lightning"),
    ("lightning_bn/callbacks/deeper/planted.py", "import pytorch_lightning"),
    # Lightning is imported in one file
    (FREEZER, "import pytorch_lightning as pl"),
    (FREEZER, "from lightning.pytorch.callbacks import Callback"),
    (FREEZER, "from lightning_fabric.utilities import rank_zero_only"),
    (FREEZER, "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pytorch_lightning"),
    ("lightning_bn/callbacks/_task_of.py", "import pytorch_lightning"),
    (REPORT, "import pytorch_lightning"),
    ("lightning_bn/plotting.py", "import lightning.pytorch"),
    ("lightning_bn/metrics.py", "import lightning_fabric"),
    ("lightning_bn/cli.py", "from pytorch_lightning.cli import LightningCLI"),
    # callbacks do not know each other
    (FREEZER, "from lightning_bn.callbacks.monitor import BatchNormMonitor"),
    (FREEZER, "import lightning_bn.callbacks.precise"),
    (MONITOR, "from lightning_bn.callbacks import freezer"),
    (MONITOR, "from lightning_bn.callbacks import BatchNormFreezer"),
    (FREEZER, "from lightning_bn.callbacks import BatchNormMonitor"),
    (FREEZER, "from lightning_bn.callbacks import PreciseBatchNorm"),
    (MONITOR, "from lightning_bn import BatchNormFreezer"),
    (FREEZER, "from lightning_bn import BatchNormMonitor"),
    (FREEZER, "from lightning_bn import PreciseBatchNorm"),
    # nothing below imports what is above
    (REPORT, "from lightning_bn.callbacks.freezer import BatchNormFreezer"),
    (REPORT, "from lightning_bn import BatchNormFreezer"),
    (REPORT, "from lightning_bn import BatchNormMonitor"),
    (REPORT, "from lightning_bn import PreciseBatchNorm"),
    # imports are absolute
    (FUNCTIONAL, "from .layers import batch_norm_layers"),
    (FREEZER, "from . import monitor"),
    (REPORT, "from .functional import describe"),
    ("tests/test_planted.py", "from .helpers import model"),
]

ALLOWED = [
    (FUNCTIONAL, "import math\nimport torch\nfrom lightning_bn.functional.layers.selection import batch_norm_layers"),
    (FREEZER, "from lightning_bn.callbacks import _lightning\nfrom lightning_bn.callbacks._task_of import task_of"),
    (
        FREEZER,
        "from lightning_bn.functional import describe\nfrom lightning_bn.functional.layers.status import is_frozen",
    ),
    (MONITOR, "import torch\nfrom lightning_bn import plotting, report"),
    (REPORT, "from rich.table import Table\nfrom lightning_bn.functional import LayerBehavior"),
    ("lightning_bn/metrics.py", "from torchmetrics import Metric\nfrom lightning_bn.functional import drift"),
    ("lightning_bn/callbacks/_lightning/namespaces.py", "import pytorch_lightning"),
    ("lightning_bn/callbacks/__init__.py", "from lightning_bn.callbacks.freezer import BatchNormFreezer"),
    ("lightning_bn/__init__.py", "from lightning_bn.callbacks.freezer import BatchNormFreezer"),
    ("tests/test_planted.py", "import pytorch_lightning\nfrom lightning_bn import BatchNormFreezer"),
    ("examples/planted/run.py", "import lightning.pytorch as pl\nfrom lightning_bn import PreciseBatchNorm"),
]


@pytest.mark.parametrize(("path", "line"), BANNED)
def test_linter_refuses_an_import_up_or_sideways(copy, path, line):
    status, said = lint(copy, path, line)
    assert status == 1, said
    assert "TID25" in said


@pytest.mark.parametrize(("path", "line"), ALLOWED)
def test_linter_lets_an_import_down_pass(copy, path, line):
    status, said = lint(copy, path, line)
    assert status == 0, said


def banned_names():
    """(folder, name) of every import that a ruff.toml of the package bans."""
    for config in PACKAGE.rglob("ruff.toml"):
        for row in config.read_text().splitlines():
            if ".msg = " in row:
                yield config.parent.relative_to(ROOT).as_posix(), row.split('"')[1]


def imported(source):
    """Every dotted name that a source file imports, ``a`` and ``a.b`` for ``from a import b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_banned_name_is_planted_above():
    planted = {(Path(path).parent.as_posix(), name) for path, line in BANNED for name in imported(line) if name}
    missing = {
        (folder, name)
        for folder, name in banned_names()
        if not any(path == folder and (found + ".").startswith(name + ".") for path, found in planted)
    }
    assert not missing


def strangers(source):
    """What a file of the ground floor imports besides torch, the standard library and the ground floor."""
    # typing_extensions is what torch itself requires, and the standard library's typing on older Pythons.
    known = {"torch", "typing_extensions", *sys.stdlib_module_names}
    floor = "lightning_bn.functional."
    return {name for name in imported(source) if name.split(".")[0] not in known and not (name + ".").startswith(floor)}


def test_ground_floor_imports_torch_the_standard_library_and_itself():
    files = sorted((PACKAGE / "functional").rglob("*.py"))
    assert files
    assert {file.name: found for file in files if (found := strangers(file.read_text()))} == {}


@pytest.mark.parametrize("line", ["import scipy.stats", "from lightning_bn import report", "if 1:\n    import numpy"])
def test_a_stranger_on_the_ground_floor_is_seen(line):
    clean = "import math, torch\nfrom lightning_bn.functional import drift\n"
    assert not strangers(clean)
    assert strangers(clean + line)


HEAVY = {"jsonargparse", "lightning", "lightning_fabric", "matplotlib", "pytorch_lightning", "rich", "torchmetrics"}


def loaded_by(statement):
    """Top-level modules in ``sys.modules`` of a fresh process after this statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_ground_floor_loads_no_framework():
    loaded = loaded_by("import lightning_bn.functional")
    assert {"lightning_bn", "torch"} <= loaded
    assert not loaded & HEAVY


def test_the_metric_loads_no_lightning():
    loaded = loaded_by("from lightning_bn import BatchNormDrift")
    assert "torchmetrics" in loaded
    assert not loaded & {"lightning", "lightning_fabric", "pytorch_lightning"}


def test_package_alone_loads_neither_lightning_nor_torch():
    loaded = loaded_by("import lightning_bn; dir(lightning_bn); lightning_bn.__version__")
    assert "lightning_bn" in loaded
    assert not loaded & {*HEAVY, "torch"}


def test_a_loaded_framework_is_seen():
    assert "rich" in loaded_by("import lightning_bn.functional, rich")


def test_callbacks_are_found_in_the_package():
    import lightning_bn

    names = {"BatchNormFreezer", "BatchNormMonitor", "PreciseBatchNorm"}
    assert names <= set(dir(lightning_bn))
    for name in names:
        assert getattr(lightning_bn, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'BatchNormFreezr'"):
        lightning_bn.BatchNormFreezr  # noqa: B018
