"""What `make test-fast` leaves out is what starts a process, compiles or takes long, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.speed import SLOW, marks, mentioned

ROOT = Path(__file__).parent.parent


def in_a_process():
    return subprocess.run([sys.executable, "-c", ""], check=True)


def by_a_helper():
    return [in_a_process() for _ in range(2)]


def compiled():
    def build():
        return torch.compile(nn.ReLU())

    return build()


def neither():
    return nn.ReLU()


@pytest.fixture
def started(request):
    return by_a_helper if request.config else None


def test_what_a_helper_mentions_is_found():
    assert "subprocess" in mentioned(in_a_process)
    assert "subprocess" in mentioned(by_a_helper)
    assert "compile" in mentioned(compiled)
    assert not mentioned(neither) & {"subprocess", "compile"}


def test_a_test_whose_fixture_starts_a_process_is_marked(request, started):
    assert started is by_a_helper
    assert marks(request.node) == {"processes"}


@pytest.mark.parametrize("case", ["workers", "plain"])
def test_a_case_is_marked_by_its_name(request, case):
    assert marks(request.node) == ({"processes"} if case == "workers" else set())


def test_files_that_are_left_out_exist():
    assert [file for file in SLOW if not (ROOT / file).is_file()] == []
