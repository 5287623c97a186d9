"""Every package that is imported is declared where somebody installs it."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN = {"lightning_bn", "tests"}
#: Of packages that another command than `make test` installs.
DISTRIBUTION = {"griffe": "griffelib"}


def declared(*extras: str) -> set[str]:
    """Distributions that are installed with these extras, and with the extras that they name."""
    found: set[str] = set()
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]:
        requirement = Requirement(line)
        if requirement.name == "lightning-bn":
            found |= declared(*requirement.extras)
        else:
            found.add(requirement.name.lower().replace("_", "-"))
    return found


def imported(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Top-level packages that files import, with the file."""
    neighbors = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*/*.py")]
    local = {file.stem for file in [*files, *neighbors]}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - OWN - local:
                if name not in {*sys.stdlib_module_names, "tomllib"}:  # which Python 3.10 has not
                    yield name, str(file.relative_to(ROOT))


def undeclared(files: list[Path], known: set[str]) -> dict[str, str]:
    distributions = packages_distributions()
    found = {}
    for name, file in imported(files):
        names = {one.lower().replace("_", "-") for one in distributions.get(name, [DISTRIBUTION.get(name, name)])}
        if not names & known:
            found[name] = file
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("lightning_bn", ("cli", "plot", "lightning", "safetensors")),
        ("examples", ("examples",)),
        ("benchmarks", ("bench",)),
        ("tests", ("test", "bench")),
        ("docs", ("docs", "examples")),  # its figures are drawn from the main example
    ],
)
def test_every_imported_package_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert undeclared(files, declared(*extras)) == {}


def test_a_package_that_nobody_declared_is_seen(tmp_path: Path) -> None:
    file = ROOT / "tests" / "test_dependencies.py"
    assert "packaging" in undeclared([file], declared())
    assert "packaging" not in undeclared([file], declared("test"))
