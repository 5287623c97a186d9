"""Statistics per task merged across real processes: by samples, with the variance between them, in one collective."""

from typing import Any

import pytest
import torch

from tests.functional.tasks.merge_ranks import SCENARIOS, inputs
from tests.models import bits
from tests.ranks import Results, results_of


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.functional.tasks.merge_ranks", request.param, tmp_path_factory, 60)


def flat(sets: dict[str, Any]) -> dict[str, bytes]:
    return {f"{task}.{key}": bits(one) for task, each in sets.items() for key, one in each.items()}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_ranks_hold_the_same_bits_after_one_collective(ranks: Results, scenario: str) -> None:
    assert len({repr(flat(rank[scenario]["first"])) for rank in ranks}) == 1
    assert all(rank[scenario]["collectives"] == 1 for rank in ranks)
    assert all(rank[scenario]["in place"] for rank in ranks)
    # What all hold alike is not rounded once more.
    assert all(flat(rank[scenario]["first"]) == flat(rank[scenario]["again"]) for rank in ranks)


@pytest.mark.parametrize("scenario", ["1 task", "8 tasks"])
def test_means_are_weighted_by_samples_and_the_variance_between_ranks_is_added(ranks: Results, scenario: str) -> None:
    for index, (task, found) in enumerate(ranks[0][scenario]["first"].items()):
        seen = [inputs(index, rank) for rank in range(len(ranks))]
        weights = torch.tensor([len(x) for x in seen], dtype=torch.float64) / sum(map(len, seen))
        means, variances = torch.stack([x.mean(0) for x in seen]), torch.stack([x.var(0) for x in seen])
        mean = weights @ means
        assert torch.allclose(found["running_mean"], mean, rtol=1e-12), task
        assert torch.allclose(found["running_var"], weights @ (variances + (means - mean).square()), rtol=1e-12)
        assert int(found["num_batches_tracked"]) == 1


def test_rank_that_saw_none_of_a_task_takes_the_others(ranks: Results) -> None:
    for rank in ranks:
        found = rank["2 tasks, one alone"]["first"]["task 1"]
        assert torch.allclose(found["running_mean"], inputs(1, 0).mean(0), rtol=1e-14)
        assert torch.allclose(found["running_var"], inputs(1, 0).var(0), rtol=1e-14)
        assert int(found["num_batches_tracked"]) == 1


def test_task_that_no_rank_saw_is_left_alone(ranks: Results) -> None:
    for rank in ranks:
        for found in rank["2 tasks that nobody saw"]["first"].values():
            assert torch.equal(found["running_mean"], torch.zeros(3, dtype=torch.float64))
            assert torch.equal(found["running_var"], torch.ones(3, dtype=torch.float64))
