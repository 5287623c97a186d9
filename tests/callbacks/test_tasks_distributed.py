"""Statistics per task on two real processes: merged to the same bits, and different tasks refused where they meet."""

import pytest
import torch

from tests.callbacks.tasks_ranks import WORLD
from tests.models import bits
from tests.ranks import Results, results_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.callbacks.tasks_ranks", WORLD, tmp_path_factory, 100)


@pytest.mark.parametrize("scenario", ["alike, broadcast", "alike", "unlike", "validated", "alike, synchronized"])
def test_ranks_end_with_the_same_statistics(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        assert not rank[scenario]["error"]
        assert rank[scenario]["after"] == ranks[0][scenario]["after"]
        assert torch.equal(rank[scenario]["weights"], ranks[0][scenario]["weights"])


@pytest.mark.parametrize("scenario", ["alike", "unlike"])
def test_before_they_merge_each_rank_has_what_its_own_batches_give(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        assert {key: bits(value) for key, value in rank[scenario]["before"].items()} == rank[scenario]["oracle"]


def test_synchronized_layers_have_one_set_for_each_task_of_the_batches_of_all_ranks(ranks: Results) -> None:
    first, second = (rank["alike, synchronized"] for rank in ranks)
    assert first["before"].keys() == second["before"].keys()
    assert all(torch.equal(value, second["before"][key]) for key, value in first["before"].items())
    # Nothing is left to merge.
    assert {key: bits(value) for key, value in first["before"].items()} == first["after"]
    found = {task: first["before"][f"{task}/net.body.1.running_mean"] for task in ("det", "seg", "depth")}
    assert len({bits(mean) for mean in found.values()}) == 3


def test_merged_by_samples_and_a_rank_without_a_task_takes_the_others(ranks: Results) -> None:
    first, second = (rank["unlike"]["before"] for rank in ranks)
    after = ranks[0]["unlike"]["after"]
    key = "net.body.1.running_mean"
    assert after[f"det/{key}"] == bits(first[f"det/{key}"])
    assert after[f"depth/{key}"] == bits(second[f"depth/{key}"])
    # 4 batches of 4 samples on the one, 4 of 12 on the other.
    merged = torch.frombuffer(bytearray(after[f"seg/{key}"]), dtype=torch.float64)
    assert torch.allclose(merged, 0.25 * first[f"seg/{key}"] + 0.75 * second[f"seg/{key}"], rtol=1e-12)


@pytest.mark.parametrize("scenario", ["unlike, broadcast", "unlike, synchronized"])
def test_different_tasks_where_ranks_share_statistics_are_an_error_on_all_of_them(
    ranks: Results, scenario: str
) -> None:
    for rank in ranks:
        error = rank[scenario]["error"]
        assert "task (rank 0: det, rank 1: seg)" in error
        assert "DDPStrategy(broadcast_buffers=False)" in error
