"""Frozen on two real processes: the same bits on both, before a freeze, in it and after it."""

from typing import Any

import pytest

from tests.callbacks.freezing_fits import BATCHES, BODY
from tests.ranks import Results, results_of

WORLD = 2
LIMIT = 100  # seconds for all scenarios together


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank was left with, by scenario."""
    return results_of("tests.callbacks.freezing_ranks", WORLD, tmp_path_factory, LIMIT)


def frozen_bits(result: dict[str, Any], step: int) -> dict[str, bytes]:
    """Values of the body as a batch ended; before the first one for step -1."""
    noted = result["first"] if step < 0 else result["values"][step]
    return {key: value for key, value in noted.items() if key.startswith(BODY)}


@pytest.mark.parametrize("scenario", ["unfrozen from epoch 1 on", "accumulated", "static graph", "unused parameters"])
def test_frozen_values_are_bit_identical_on_both_ranks_until_a_scheduled_unfreeze(
    ranks: Results, scenario: str
) -> None:
    for rank in ranks:
        result = rank[scenario]
        assert all(frozen_bits(result, step) == frozen_bits(result, -1) for step in range(BATCHES))
        assert result["identical"]
        assert result["steps"] == (BATCHES // 2 if scenario == "accumulated" else BATCHES)
        assert all(result["training"].values())


@pytest.mark.parametrize("scenario", ["unfrozen from epoch 1 on", "accumulated", "static graph", "unused parameters"])
def test_after_a_scheduled_unfreeze_the_layers_train_and_the_ranks_stay_bit_equal(
    ranks: Results, scenario: str
) -> None:
    for rank in ranks:
        result = rank[scenario]
        before, after = frozen_bits(result, BATCHES - 1), frozen_bits(result, 2 * BATCHES - 1)
        assert all(after[key] != value for key, value in before.items())
        assert result["parameters_equal"] == [True] * 2 * BATCHES
    weights = [{key: value for key, value in rank[scenario]["state"].items() if "running" not in key} for rank in ranks]
    assert weights[0] == weights[1]


def test_a_scheduled_freeze_holds_on_every_rank_what_that_rank_had(ranks: Results) -> None:
    for rank in ranks:
        result = rank["frozen from epoch 1 on"]
        assert frozen_bits(result, 0) != frozen_bits(result, -1)
        held = [frozen_bits(result, step) for step in range(BATCHES, 2 * BATCHES)]
        assert all(one == held[0] for one in held)
        assert result["identical"]
        assert result["parameters_equal"] == [True] * 2 * BATCHES


def test_what_a_scheduled_freeze_holds_is_the_same_on_every_rank(ranks: Results) -> None:
    # Without SyncBatchNorm the ranks' statistics differ after a step; frozen ones are those of rank 0, as in a forward.
    first, second = (frozen_bits(rank["frozen from epoch 1 on"], 2 * BATCHES - 1) for rank in ranks)
    assert first == second


@pytest.mark.parametrize("scenario", ["tasks by rank", "joint steps", "tasks by key"])
def test_ranks_that_train_different_tasks_in_one_step_stay_bit_equal(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        result = rank[scenario]
        assert all(result["parameters_equal"])
        assert result["identical"]
        assert result["values"][-1] != result["first"]


def test_a_layer_held_for_a_task_normalizes_with_the_same_statistics_on_every_rank(ranks: Results) -> None:
    # As by hand: before a forward DistributedDataParallel gives every rank the buffers of rank 0.
    for rank in ranks:
        used = rank["tasks by key"]["used_equal"]
        assert used
        assert all(used)


def test_tasks_leave_their_layers_with_what_others_contributed(ranks: Results) -> None:
    # In the first step rank 0 trains "det" and rank 1 "seg": each head learns from the other rank alone.
    for rank in ranks:
        result = rank["tasks by rank"]
        moved = {key for key, value in result["values"][-1].items() if value != result["first"][key]}
        assert {"net.seg_head.1.weight", "net.det_head.1.weight", "net.body.1.weight"} <= moved


@pytest.mark.parametrize("scenario", ["accumulated", "static graph"])
def test_layers_that_keep_nothing_of_their_inputs_end_with_the_bits_of_those_that_do(
    ranks: Results, scenario: str
) -> None:
    for rank in ranks:
        assert rank[scenario]["state"] == rank[f"{scenario}, inputs kept"]["state"]
