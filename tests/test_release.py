"""What is built for a release: the long description, the wheel in an empty environment, the tests from the sdist."""

import os
import re
import subprocess
import sys
import tarfile
import venv
from email import message_from_string
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

from hatch_build import without_relative_links
from tests.pages import blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.compile(r"\]\(([^)\s]*)")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; its end is an assertion."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the unpacked sdist."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    [packed] = folder.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder


def unpacked(built: Path) -> Path:
    [folder] = (path for path in built.iterdir() if path.is_dir())
    return folder


def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_the_first_screen_says_how_to_install() -> None:
    assert "pip install lightning-bn" in "\n".join(README.splitlines()[:25])


def test_the_long_description_is_the_readme_without_relative_links(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    described = metadata(wheel)
    text = described.get_payload()
    assert isinstance(text, str)
    assert described["Description-Content-Type"] == "text/markdown"
    assert [block.code for block in blocks(text)] == [block.code for block in blocks(README)]
    assert any("://" not in link for link in LINKS.findall(README))  # there is something to take out
    assert [link for link in LINKS.findall(text) if not link.startswith("https://")] == []
    assert "[`BatchNormFreezer`]" not in text
    assert "- `BatchNormFreezer` keeps running statistics" in text


def test_pictures_go_and_addresses_stay() -> None:
    page = (
        "A [page](docs/a.md#b), [many\nlines](../b.md), [there](https://x.org).\n\n![a\nb](c.png)\n\nEnd, x[0](1, 2)."
    )
    assert without_relative_links(page) == "A page, many\nlines, [there](https://x.org).\n\nEnd, x[0](1, 2)."


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lightning_bn").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    with ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == package


def test_the_wheel_of_the_sdist_is_the_wheel(built: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=unpacked(built))
    [ours], [theirs] = built.glob("*.whl"), tmp_path.glob("*.whl")
    with ZipFile(ours) as one, ZipFile(theirs) as other:
        assert one.namelist() == other.namelist()
        assert all(one.read(name) == other.read(name) for name in one.namelist())


def test_the_sdist_holds_all_that_is_in_the_repository(built: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("what is in the repository is not known here")
    files = run("git", "ls-files", cwd=ROOT).splitlines()
    assert [name for name in files if (ROOT / name).exists() and not (unpacked(built) / name).exists()] == []


def test_tests_that_read_other_files_of_the_project_pass_from_the_sdist(built: Path) -> None:
    files = [f"tests/{name}.py" for name in ("test_project", "test_layering")]
    some = ("-k", "test_project or room_repeats or has_rules", "-p", "no:cacheprovider")  # ruff takes its time
    said = run(sys.executable, "-m", "pytest", "-q", *some, *files, cwd=unpacked(built))
    assert re.search(r"^\d\d passed", said.splitlines()[-1])


#: What extras bring.
EXTRAS = {
    "matplotlib",
    "mpl_toolkits",
    "safetensors",
    "jsonargparse",
    "docstring_parser",
    "typeshed_client",
    "lightning",
}


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel and no extra; torch and all else are those that run the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    [wheel] = built.glob("*.whl")
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    run(*pip, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    installed = {path for path in sys.path if path.endswith("site-packages")}
    for entry in (entry for path in installed for entry in Path(path).iterdir()):
        left_out = re.split(r"[.-]", entry.name)[0] in {*EXTRAS, "lightning_bn"} or entry.suffix == ".pth"
        if not left_out and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    where = run(python, "-c", "import lightning_bn; print(lightning_bn.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(site)
    return folder


def test_the_readmes_first_example_runs_where_the_wheel_is_installed(environment: Path, tmp_path: Path) -> None:
    [example] = (block for block in blocks(README) if "Trainer(" in block.code)
    said = run(environment / "bin" / "python", "-c", example.code, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert "did not move: layer.0 (1 layer)" in said


WITHOUT_EXTRAS = """
import torch
from torch import nn

import lightning_bn
from lightning_bn import functional, plotting, report

for name in lightning_bn.__all__:
    getattr(lightning_bn, name)

net = nn.Sequential(nn.BatchNorm1d(2))
bank = functional.task_statistics(net, ["a", "b"])
for task in ("a", "b"):
    with bank.task(task):
        net(torch.randn(8, 2))
report.print_behavior(net)
header = b"{}"
open("a.safetensors", "wb").write(len(header).to_bytes(8, "little") + header)
for action in (
    lambda: plotting.task_drift_figure(functional.task_drift(bank)),
    lambda: lightning_bn.BatchNormDrift(net).plot(),
    lambda: functional.inspect_checkpoint("a.safetensors"),
):
    try:
        action()
    except ModuleNotFoundError as error:
        print("asks for:", error)
"""


def test_without_extras_all_can_be_imported_and_who_needs_one_is_told_which(environment: Path, tmp_path: Path) -> None:
    said = run(environment / "bin" / "python", "-c", WITHOUT_EXTRAS, cwd=tmp_path)
    asked = [line for line in said.splitlines() if line.startswith("asks for:")]
    assert [re.findall(r"lightning-bn\[(\w+)\]", line) for line in asked] == [["plot"], ["plot"], ["safetensors"]]


def test_the_command_runs_where_the_wheel_is_installed(environment: Path, tmp_path: Path) -> None:
    save = "import torch; torch.save(torch.nn.BatchNorm1d(3).state_dict(), 'a.pt')"
    run(environment / "bin" / "python", "-c", save, cwd=tmp_path)
    done = subprocess.run(
        [environment / "bin" / "lightning-bn", "inspect", "a.pt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("a.pt: 1 fault in 1 BatchNorm layer")
