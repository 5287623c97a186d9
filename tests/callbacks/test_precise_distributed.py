"""PreciseBatchNorm on two real processes: statistics of the batches of both, training as without it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.callbacks.fits import LAYERS, Net
from tests.callbacks.precise_ranks import BATCHES, FAILURES, SCENARIOS, STRANDING
from tests.models import bits
from tests.oracle import assert_all_statistics, layer_inputs
from tests.ranks import STRANDED, Results, results_of

NORMS = [name.removeprefix("net.") for name in LAYERS]
PRECISE = [name for name in SCENARIOS if "without" not in name]
ENDED = ["no validation", "ends in mid-epoch"]
VALIDATED = [name for name in PRECISE if name not in ENDED]
SYNCHRONIZED = [name for name in VALIDATED if name.startswith("synchronized")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.callbacks.precise_ranks", 2, tmp_path_factory, limit=110)


def net_of(state: dict[str, Tensor]) -> Net:
    net = Net()
    net.load_state_dict(state)
    return net.train()


def inner(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's part of the module's state."""
    return {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}


@pytest.mark.parametrize("scenario", [name for name in VALIDATED if name not in SYNCHRONIZED])
def test_statistics_in_validation_are_those_of_the_batches_of_both_ranks(ranks: Results, scenario: str) -> None:
    validations = [rank[scenario]["validated"] for rank in ranks]
    assert len(validations[0]) == (4 if scenario == "twice an epoch" else 2)
    for one, other in zip(*validations, strict=True):
        used = [*one["batches"], *other["batches"]]
        assert used
        net = net_of(one["state"])
        assert_all_statistics(net, layer_inputs(net, used, NORMS))


@pytest.mark.parametrize("scenario", SYNCHRONIZED)
def test_synchronized_statistics_in_validation_are_those_of_batches_of_both_ranks_put_together(
    ranks: Results, scenario: str
) -> None:
    frozen, plain = "frozen" in scenario, "in part" in scenario
    for one, other in zip(*(rank[scenario]["validated"] for rank in ranks), strict=True):
        steps = min(len(one["batches"]), len(other["batches"]))
        # A rank that has fewer ends it for both, which drops a batch that the other had fetched, and never runs it.
        assert steps == (1 if "fewer" in scenario else 3)
        together = [torch.cat(pair) for pair in zip(one["batches"], other["batches"], strict=True)]
        net = net_of(one["state"])
        if frozen:
            net.features[1].eval()
        # What lies behind a plain layer has seen what that made of each rank's batch.
        reached = NORMS[frozen : 1 if plain else None]
        assert_all_statistics(net, layer_inputs(net, together, reached))
        assert one["state"].keys() == Net().state_dict().keys()


@pytest.mark.parametrize("scenario", SYNCHRONIZED)
def test_layers_are_converted_for_the_fit_and_reverted_after_it(ranks: Results, scenario: str) -> None:
    inside = ["ReferenceSyncBatchNorm"] * 3
    if "in part" in scenario:
        inside[1] = "BatchNorm2d"
    for rank in ranks:
        assert rank[scenario]["kinds_after"] == ["BatchNorm2d", "BatchNorm2d", "BatchNorm1d"]
        assert rank[scenario]["kinds_in_validation"] == [inside] * 2


def test_frozen_synchronized_layers_are_bit_identical_on_both_ranks(ranks: Results) -> None:
    for rank in ranks:
        assert rank["synchronized, frozen"]["identical"] == [True]


def test_statistics_of_synchronized_layers_are_the_same_on_both_ranks_while_they_train(ranks: Results) -> None:
    [first], [second] = (rank["synchronized"]["sampled"] for rank in ranks)
    assert len(first) == 14
    assert torch.equal(first, second)


@pytest.mark.parametrize("scenario", VALIDATED)
def test_the_network_in_validation_and_its_metrics_are_the_same_bits_on_both_ranks(
    ranks: Results, scenario: str
) -> None:
    first, second = ([seen["bits"] for seen in rank[scenario]["validated"]] for rank in ranks)
    assert first == second
    losses = [rank[scenario]["losses"] for rank in ranks]
    assert losses[0] == losses[1]
    assert losses[0]


@pytest.mark.parametrize("scenario", ["with", "whole epoch", "twice an epoch", "static graph", "averaged"])
def test_batches_of_each_rank_are_its_own(ranks: Results, scenario: str) -> None:
    count = BATCHES if scenario == "whole epoch" else 3
    for validations in zip(*(rank[scenario]["validated"] for rank in ranks), strict=True):
        seen = [{bits(image) for batch in one["batches"] for image in batch} for one in validations]
        assert all(len(one["batches"]) == count for one in validations)
        # A distributed sampler fills the last batch up with samples of the beginning, if need be.
        assert not seen[0] & seen[1]


@pytest.mark.parametrize("scenario", VALIDATED)
def test_checkpoint_holds_what_both_ranks_validated(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        validated = rank[scenario]["validated"]
        assert validated
        for seen in validated:
            saved = rank[scenario]["saved"][f"step={seen['step']}.ckpt"]
            assert {name: bits(value) for name, value in inner(saved).items()} == seen["bits"]


@pytest.mark.parametrize("scenario", ENDED)
def test_the_last_checkpoint_is_precise_however_the_fit_ended(ranks: Results, scenario: str) -> None:
    results = [rank[scenario] for rank in ranks]
    used = [batch for result in results for batch in result["recalibrated_last"]]
    assert len(used) >= 6
    state = inner(results[0]["saved"]["last.ckpt"])
    assert_all_statistics(net_of(state), layer_inputs(net_of(state), [*used[:3], *used[-3:]], NORMS))
    for result in results:
        assert {key: bits(value) for key, value in inner(result["state"]).items()} == {
            key: bits(value) for key, value in state.items()
        }


TWINS = [
    ("with", "without"),
    ("whole epoch", "without"),
    ("restored", "without"),
    ("recent", "without"),
    ("fewer on one", "without"),
    ("none on one", "without"),
    ("twice an epoch", "twice an epoch, without"),
    ("accumulated", "accumulated, without"),
    ("static graph", "static graph, without"),
    ("unused parameters", "unused parameters, without"),
    ("averaged", "averaged, without"),
    ("synchronized", "synchronized, without"),
    ("synchronized, fewer on one", "synchronized, without"),
    ("synchronized, frozen", "synchronized, frozen, without"),
    ("synchronized in part", "synchronized in part, without"),
]


@pytest.mark.parametrize(("scenario", "without"), TWINS)
def test_training_is_bit_identical_to_a_run_without_it(ranks: Results, scenario: str, without: str) -> None:
    for rank in ranks:
        assert len(rank[without]["trace"]) == 2 * BATCHES
        assert rank[scenario]["trace"] == rank[without]["trace"]
        parameters = [
            {key: bits(value) for key, value in rank[name]["parameters"].items()} for name in (scenario, without)
        ]
        assert parameters[0] == parameters[1]


def test_ranks_train_on_different_batches_or_the_comparisons_would_mean_little(ranks: Results) -> None:
    assert ranks[0]["without"]["trace"] != ranks[1]["without"]["trace"]
    seen = [[batch["bits"] for batch in rank["without"]["validated"]] for rank in ranks]
    assert all(seen)


def told(ranks: Results, scenario: str) -> list[Any]:
    return [rank[scenario]["used"] for rank in ranks]


def test_what_was_done_is_told_alike_on_both_ranks(ranks: Results) -> None:
    for scenario in PRECISE:
        first, second = told(ranks, scenario)
        assert first == second
        assert first[2] == 2


@pytest.mark.parametrize(
    ("scenario", "batches", "count"), [("with", 6, 48), ("fewer on one", 4, 29), ("none on one", 3, 24)]
)
def test_batches_and_samples_are_those_of_both_ranks(ranks: Results, scenario: str, batches: int, count: int) -> None:
    assert told(ranks, scenario)[0][:2] == [batches, count]


def test_layer_that_no_step_reaches_is_told(ranks: Results) -> None:
    for used in told(ranks, "unused parameters"):
        assert used[3] == ["spare"]
        assert used[4] == list(LAYERS)


@pytest.mark.parametrize(
    ("scenario", "own"),
    [("step raises", "broken step"), ("loader raises", "broken loader"), ("method raises", "no such target")],
)
def test_failure_on_one_rank_ends_the_fit_on_both_and_each_says_why(ranks: Results, scenario: str, own: str) -> None:
    assert own in ranks[1][scenario]["told"]
    other = ranks[0][scenario]["told"]
    assert "failed on 1 of 2 processes" in other or "rank 1 failed" in other


@pytest.mark.parametrize("scenario", [*FAILURES, *STRANDING])
def test_failure_on_one_rank_leaves_neither_waiting_nor_anything_behind(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        found = rank[scenario]
        assert found["told"]
        assert found["seconds"] < STRANDED
        assert found["momenta"] == [0.1, 0.1, 0.1]
        assert (found["own_forwards"], found["hooks"]) == (0, 0)


def test_ranks_of_which_some_have_nothing_to_validate_are_told_so_when_the_fit_starts(ranks: Results) -> None:
    for rank, have in zip(ranks, ("has", "has no"), strict=True):
        assert f"rank {ranks.index(rank)} {have} validation batches" in rank["validation on one"]["told"]


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("frozen otherwise on one", "would freeze differently: layer "),
        ("frozen without affine on one", "affine (rank 0: True, rank 1: False)"),
        ("monitored otherwise on one", "would monitor differently: every_n_steps (rank 0: 1, rank 1: 2)"),
        ("recalibrated otherwise on one", "every_n_validations (rank 0: 1, rank 1: 2)"),
    ],
)
def test_ranks_with_other_settings_are_told_so_when_the_fit_starts(ranks: Results, scenario: str, said: str) -> None:
    for rank in ranks:
        assert said in rank[scenario]["told"]


def test_ranks_that_would_train_other_tasks_with_synchronized_layers_are_told_so(ranks: Results) -> None:
    for rank in ranks:
        assert "task (rank 0: a, rank 1: b)" in rank["another task on one"]["told"]


def test_a_selection_that_fails_on_one_rank_is_told_on_the_other(ranks: Results) -> None:
    assert "rank 1 failed" in ranks[0]["frozen nothing on one"]["told"]
    assert "SelectionError" in ranks[1]["frozen nothing on one"]["told"]


def test_ranks_that_froze_different_layers_are_told_so(ranks: Results) -> None:
    first, second = (rank["frozen on one"]["told"] for rank in ranks)
    assert "rank 1 failed: look for its error" in first
    assert second.startswith("FailedAloneError: nothing to recalibrate: 3 selected BatchNorm layers, all frozen")


def test_suite_has_its_scenarios() -> None:
    assert {name for pair in TWINS for name in pair} | set(ENDED) == set(SCENARIOS)
    assert torch.distributed.is_available()
