"""Rows of several tasks in real processes: refused in synchronized layers, right in others."""

import pytest
import torch

from tests.functional.tasks.rows_ranks import TASKS, alone, network
from tests.ranks import Results, results_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.functional.tasks.rows_ranks", 2, tmp_path_factory, 60)


def test_synchronized_layers_are_refused_by_name_and_nothing_changed(ranks: Results) -> None:
    before = dict(network()[1].named_buffers())
    for rank in ranks:
        found = rank["synchronized"]
        for part in ("'1'", "synchronized over 2 processes", "task(name)"):
            assert part in found["error"]
        for task in TASKS:
            torch.testing.assert_close(found["sets"][task], before, rtol=0, atol=0)


@pytest.mark.parametrize("scenario", ["ddp", "ddp without broadcasting"])
def test_each_rank_may_have_another_split(ranks: Results, scenario: str) -> None:
    right = [alone(rank) for rank in range(2)]
    means = [torch.stack(pair).mean(0) for pair in zip(*(one["gradients"] for one in right), strict=True)]
    for rank, one in zip(ranks, right, strict=True):
        torch.testing.assert_close(rank[scenario]["gradients"], means, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(rank[scenario]["sets"], one["sets"], rtol=1e-11, atol=1e-11)
