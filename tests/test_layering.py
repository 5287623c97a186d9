"""Arrows point down only: the linter holds it, every rule can fail, and only who uses Lightning pays for it."""

import ast
import importlib
import pkgutil
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

FLOOR = "lightning_bn.functional"

#: The rooms of the ground floor, and those that each of them must not import.
ROOMS = {
    "layers": ("statistics", "distributed", "freezing", "inspection", "recalibration", "monitoring", "tasks", "doctor"),
    "statistics": ("distributed", "freezing", "inspection", "recalibration", "monitoring", "tasks", "doctor"),
    "distributed": ("freezing", "inspection", "recalibration", "monitoring", "tasks", "doctor"),
    "freezing": ("inspection", "recalibration", "monitoring", "tasks", "doctor"),
    "inspection": ("distributed", "freezing", "recalibration", "monitoring", "tasks", "doctor"),
    "recalibration": ("freezing", "inspection", "monitoring", "tasks", "doctor"),
    "monitoring": ("freezing", "inspection", "recalibration", "tasks", "doctor"),
    "tasks": ("freezing", "inspection", "recalibration", "monitoring", "doctor"),
    "doctor": ("distributed", "freezing", "inspection", "recalibration", "monitoring", "tasks"),
}


def forms(rooms):
    """The ways to import from rooms: the package, a file of it, a name of a file, each room in each way."""
    for room in rooms:
        yield f"import {FLOOR}.{room}"
        yield f"import {FLOOR}.{room}.planted as planted"
        yield f"from {FLOOR} import {room}"
        yield f"from {FLOOR}.{room} import planted"
        yield f"from {FLOOR}.{room}.planted import name"
        yield f"def f():\n    from {FLOOR}.{room}.planted import name"


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
    # its __init__.py is no exception, as that of the package is
    ("lightning_bn/functional/__init__.py", "import pytorch_lightning"),
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
    # rooms do not know each other, the lower ones none above them
    *((f"lightning_bn/functional/{room}/planted.py", line) for room, others in ROOMS.items() for line in forms(others)),
    *(
        (f"lightning_bn/functional/{room}/__init__.py", f"from {FLOOR}.{others[0]} import x")
        for room, others in ROOMS.items()
    ),
    # imports are absolute
    (FUNCTIONAL, "from .layers import batch_norm_layers"),
    (FREEZER, "from . import monitor"),
    (REPORT, "from .functional import describe"),
    ("tests/test_planted.py", "from .helpers import model"),
]

ALLOWED = [
    *(
        (f"lightning_bn/functional/{room}/planted.py", f"import torch\nfrom {FLOOR}.{other}.planted import name")
        for room, others in ROOMS.items()
        for other in ROOMS
        if other not in others
    ),
    *((f"lightning_bn/functional/{room}/planted.py", f"from {FLOOR} import _bits, _checks") for room in ROOMS),
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
    ("lightning_bn/_cli/doctor.py", "from lightning_bn.callbacks.diagnosis import diagnose"),
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


def bans(folder):
    """Every import that the ruff.toml of this folder bans, with what it says."""
    rows = (folder / "ruff.toml").read_text().splitlines()
    return {row.split('"')[1]: row.split('"')[3] for row in rows if ".msg = " in row}


def banned_names():
    """(folder, name) of every import that a ruff.toml of the package bans; a room's own bans only."""
    of_the_floor = bans(PACKAGE / "functional")
    for config in PACKAGE.rglob("ruff.toml"):
        folder = config.parent
        repeated = of_the_floor if folder.parent == PACKAGE / "functional" else {}
        yield from ((folder.relative_to(ROOT).as_posix(), name) for name in bans(folder) if name not in repeated)


def test_every_room_of_the_ground_floor_has_rules():
    assert {file.parent.name for file in (PACKAGE / "functional").glob("*/__init__.py")} == set(ROOMS)
    assert {file.parent.name for file in (PACKAGE / "functional").glob("*/ruff.toml")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_repeats_the_bans_of_the_ground_floor(room):
    # ruff takes the nearest table as it stands, without those that it extends
    of_the_floor = bans(PACKAGE / "functional")
    assert of_the_floor.items() <= bans(PACKAGE / "functional" / room).items()


@pytest.mark.parametrize("room", ROOMS)
def test_linter_refuses_in_a_room_what_the_ground_floor_must_not_import(copy, room):
    lines = [line for path, line in BANNED if path == FUNCTIONAL and "\n" not in line]
    status, said = lint(copy, f"lightning_bn/functional/{room}/planted.py", "\n".join(lines))
    found = {int(row.split(":")[1]) for row in said.splitlines() if "TID25" in row}
    assert status == 1, said
    assert found == set(range(1, len(lines) + 1)), said
    assert len(lines) > 15


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
    found = {file.name: names for file in files if (names := strangers(file.read_text()))}
    # The library of a file format, an extra that is imported where such a file is met.
    formats = {name for name in found.pop("files.py") if name.split(".")[0] != "safetensors"}
    assert formats == set()
    assert found == {}


@pytest.mark.parametrize("line", ["import scipy.stats", "from lightning_bn import report", "if 1:\n    import numpy"])
def test_a_stranger_on_the_ground_floor_is_seen(line):
    clean = "import math, torch\nfrom lightning_bn.functional import drift\n"
    assert not strangers(clean)
    assert strangers(clean + line)


def through_a_package(source):
    """What a file imports from the ground floor or a room of it as a whole: a name that is no file and no room."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module + ".").startswith(FLOOR + "."):
            folder = ROOT.joinpath(*node.module.split("."))
            if folder.is_dir():
                names = [alias.name for alias in node.names]
                yield from (
                    name for name in names if not {name, f"{name}.py"} & {file.name for file in folder.iterdir()}
                )


def test_ground_floor_imports_names_from_the_files_they_are_in():
    # Through functional/__init__.py a room would reach every other one.
    floor = PACKAGE / "functional" / "__init__.py"  # which lists what its rooms list
    files = sorted(file for file in (PACKAGE / "functional").rglob("*.py") if file != floor)
    assert {file.name: found for file in files if (found := [*through_a_package(file.read_text())])} == {}


@pytest.mark.parametrize("line", ["from {0} import recalibrate", "from {0}.layers import tracked_layers"])
def test_an_import_through_a_package_is_seen(line):
    clean = f"from {FLOOR} import _bits, layers\nfrom {FLOOR}.layers import selection\nimport torch\n"
    clean += f"from {FLOOR}.layers.selection import tracked_layers\n"
    assert not [*through_a_package(clean)]
    assert [*through_a_package(clean + line.format(FLOOR))]


def rooms_in(source):
    """The rooms that a file imports from."""
    return {room for name in imported(source) for room in ROOMS if (name + ".").startswith(f"{FLOOR}.{room}.")}


def test_files_beside_the_rooms_import_none_of_them():
    files = sorted((PACKAGE / "functional").glob("_[a-z]*.py"))
    assert files
    assert {file.name: found for file in files if (found := rooms_in(file.read_text()))} == {}


def test_a_room_beside_is_seen():
    assert not rooms_in(f"from {FLOOR}._bits import same_bits\nimport {FLOOR}._text\n")
    assert rooms_in(f"from {FLOOR}.layers.selection import LayerSelection") == {"layers"}
    assert rooms_in(f"from {FLOOR} import freezing") == {"freezing"}


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


DICTIONARIES = {"_buffers", "_modules", "_parameters"}

#: The one file that knows torch's private dictionaries.
TORCH_PRIVATE = "functional/layers/torch_private.py"


def private_dictionaries(source):
    """Which of torch's private dictionaries a source reaches: as an attribute or by its name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found & DICTIONARIES


def test_torchs_private_dictionaries_are_reached_in_one_file():
    files = {file.relative_to(PACKAGE).as_posix(): file for file in PACKAGE.rglob("*.py")}
    found = {name for name, file in files.items() if private_dictionaries(file.read_text(encoding="utf-8"))}
    assert TORCH_PRIVATE in found
    # A file that no longer does so is taken out of the set.
    assert found == {TORCH_PRIVATE}


@pytest.mark.parametrize(
    "line", ["layer._buffers['running_mean'] = x", "own = model._modules", "getattr(layer, '_parameters').clear()"]
)
def test_a_private_dictionary_is_seen(line):
    clean = "buffers = buffers_of(layer)\nself._buffer = _parameters = {}  # layer._buffers\n"
    assert not private_dictionaries(clean)
    assert private_dictionaries(clean + line)


PACKAGES = sorted(".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("__init__.py"))


def shadowed(package):
    """Submodules of a package that its own names hide: ``import package.name`` would give something else."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    return {name for name, module in modules.items() if getattr(package, name) is not module}


@pytest.mark.parametrize("name", PACKAGES)
def test_no_name_of_a_package_hides_a_module_of_it(name):
    assert shadowed(importlib.import_module(name)) == set()


def test_a_hidden_module_is_seen(tmp_path, monkeypatch):
    (tmp_path / "planted_package").mkdir()
    (tmp_path / "planted_package" / "drift.py").write_text("def drift(): ...\n")
    (tmp_path / "planted_package" / "other.py").write_text("")
    (tmp_path / "planted_package" / "__init__.py").write_text("from planted_package.drift import drift\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert shadowed(importlib.import_module("planted_package")) == {"drift"}
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "planted_package"]:
            del sys.modules[name]
