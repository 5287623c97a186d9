"""Settings of the whole suite."""

import os

import pytest
import torch
from hypothesis import settings

from tests.speed import marks

os.environ.setdefault("MPLBACKEND", "Agg")  # figures are written, never shown

# A slow moment of the machine is not a failure: pytest-timeout is the only clock.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Mark what `make test-fast` leaves out; skip tests marked ``gpu`` where there is no CUDA device."""
    for item in items:
        for mark in marks(item):
            item.add_marker(mark)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
