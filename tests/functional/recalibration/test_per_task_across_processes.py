"""Each task's statistics of several real processes are those of one process with all of that task's batches."""

import copy
from typing import Any

import pytest
import torch

from lightning_bn.functional import recalibrate, take_snapshot
from tests.functional.recalibration.per_task_ranks import FAULTS, RIGHT, SYNCHRONIZED, TASKS, network, shard
from tests.models import bits
from tests.ranks import Results, results_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.functional.recalibration.per_task_ranks", 2, tmp_path_factory, limit=100)


def usable(name: str, rank: int) -> list[Any]:
    """What the pass uses of the rank's batches: the first two of each task where no more are asked for."""
    orders, options = {**RIGHT, **SYNCHRONIZED}[name]
    found, seen = [], dict.fromkeys(TASKS, 0)
    for one in shard(rank, orders[rank][: len(min(orders, key=len))] if name in SYNCHRONIZED else orders[rank]):
        seen[one[1]] += 1
        if seen[one[1]] <= options.get("num_batches", 99):
            found.append(one)
    return found


@pytest.mark.parametrize("name", [*RIGHT, *SYNCHRONIZED])
def test_every_rank_has_the_same_bits(ranks: Results, name: str) -> None:
    assert [rank[name]["told"] for rank in ranks] == ["", ""]
    first, second = ({task: [*map(bits, two)] for task, two in rank[name]["sets"].items()} for rank in ranks)
    assert first == second
    assert [*map(bits, ranks[0][name]["without"])] == [*map(bits, ranks[1][name]["without"])]
    assert ranks[0][name]["amounts"] == ranks[1][name]["amounts"]
    assert ranks[0][name]["errors"] == ranks[1][name]["errors"]


@pytest.mark.parametrize("name", RIGHT)
def test_each_task_is_what_one_process_makes_of_all_its_batches(ranks: Results, name: str) -> None:
    start = network()
    prior = {key: value for key, value in RIGHT[name][1].items() if key == "prior"}
    for task in TASKS:
        batches = [one[0] for rank in (0, 1) for one in usable(name, rank) if one[1] == task]
        held, model = ranks[0][name]["sets"][task], copy.deepcopy(start)
        if batches:
            done = recalibrate(model, batches, modules="shared", **prior)
            assert ranks[0][name]["amounts"][task] == (done.num_batches, done.num_samples)
        expected = take_snapshot(model, "shared")
        torch.testing.assert_close(held[0], expected.mean, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(held[1], expected.var, rtol=1e-6, atol=1e-9)
        assert bool(ranks[0][name]["layers"][task]) == bool(batches)


def test_a_task_that_nobody_has_is_named(ranks: Results) -> None:
    assert all("'c' had no batch and was left unchanged" in rank["a task nobody has"]["said"] for rank in ranks)


@pytest.mark.parametrize("name", [name for name in RIGHT if name != "prior"])
def test_one_collective_agrees_and_one_merges(ranks: Results, name: str) -> None:
    assert all(rank[name]["collectives"] == ["all_reduce"] * 2 for rank in ranks)


def test_a_synchronized_pass_uses_what_both_have(ranks: Results) -> None:
    used = ranks[0]["synchronized"]["amounts"]
    assert {task: amount[0] for task, amount in used.items()} == {"a": 4, "b": 2, "c": 2}
    assert {task: one[0] for task, one in ranks[0]["synchronized, by contexts"]["amounts"].items()} == {
        "a": 4,
        "b": 2,
        "c": 2,
    }
    assert {task: one[0] for task, one in ranks[0]["synchronized, num_batches"]["amounts"].items()} == {
        "a": 4,
        "b": 2,
        "c": 2,
    }
    # 3 + 3 samples of the first, 4 + 4 of the second batch.
    assert ranks[0]["synchronized, num_samples"]["amounts"]["a"] == (4, 14)


WORDS = {
    "an unknown task on one": (
        r"recalibration failed on 1",
        "task 'd', but there are statistics only for the tasks 'a', 'b', 'c'",
    ),
    "nothing tells": ("it is not known which task", "it is not known which task"),
    "other tasks": ("tasks (rank 0: ('a', 'b', 'd'), rank 1: ('a', 'b', 'c'))",) * 2,
    "synchronized, different tasks": ("the next batch is of task 'a' on 1, 'b' on 1 of the processes",) * 2,
    "synchronized, different contexts": ("this one ran the tasks ['a']", "this one ran the tasks ['b']"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_on_every_rank_and_nothing_is_changed(ranks: Results, name: str) -> None:
    for rank, words in zip(ranks, WORDS[name], strict=True):
        assert words in rank[name]["told"]
        assert rank[name]["unchanged"]
