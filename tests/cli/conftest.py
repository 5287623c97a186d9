"""A network that was trained for a moment, and what the command says of a file."""

import json
import sys

import pytest
import torch

from lightning_bn._cli.main import main
from tests.cli.doctors_code import CODE
from tests.models import SmallResNet, images, seeded


@pytest.fixture(scope="session")
def trained():
    """State of a network that is well, with 60 updates of every layer."""
    model = seeded(SmallResNet)
    for step in range(60):
        model(images(seed=step))
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def state(trained):
    """The same, to be changed."""
    return {name: value.clone() for name, value in trained.items()}


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Run the command in a folder of its own; return the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        code = main([*map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture
def found(capsys):
    """Run the command with --json; return the exit code and what a program gets."""

    def run(*arguments):
        code = main([*map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def save(tmp_path):
    """Save something under a name."""

    def saved(content, name="file.ckpt"):
        path = tmp_path / name
        torch.save(content, path)
        return path

    return saved


@pytest.fixture
def doctors_folder(tmp_path, monkeypatch):
    """A working folder with the user's own code; what was imported from it is forgotten."""
    (tmp_path / "planted_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("planted_code", None)
