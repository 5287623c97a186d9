"""Statistics of several real processes are the same bits on all of them, and those of one process with all the data."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional import recalibrate
from tests.functional.recalibration.recalibrating_ranks import FAULTS, RIGHT, STRANDING, Branches
from tests.oracle import assert_statistics_of, layer_inputs
from tests.ranks import STRANDED, Results, results_of

SECONDS = 5
"""Within which a failure is known everywhere."""


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.functional.recalibration.recalibrating_ranks", request.param, tmp_path_factory, limit=100)


def all_batches(scenario: str, world: int) -> list[Any]:
    shards = RIGHT[scenario][1]
    return [batch for rank in range(world) for batch in shards(rank, world)]


def usable(scenario: str, batches: list[Any]) -> list[Any]:
    """Without those that are skipped, or not finite."""
    if scenario == "a skipped batch":
        return [batch for batch in batches if len(batch) > 1]
    return [batch for batch in batches if not isinstance(batch, Tensor) or batch.isfinite().all()]


def rebuilt(scenario: str, state: dict[str, Tensor]) -> nn.Module:
    model = RIGHT[scenario][0]()
    model.load_state_dict(state)
    return model


def run(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


_OTHERWISE = ("mean of batches", "num_samples", "num_batches", "max_standard_error", "prior")
POOLED = [name for name in RIGHT if name not in _OTHERWISE]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""By the dtype in which torch computes the statistics of a batch."""


@pytest.mark.parametrize("scenario", RIGHT)
def test_statistics_are_the_same_bits_on_every_rank(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        assert rank[scenario]["bits"] == ranks[0][scenario]["bits"]
        assert rank[scenario]["undisturbed"]


@pytest.mark.parametrize("scenario", POOLED)
def test_statistics_are_those_of_all_batches_of_all_ranks_in_float64(ranks: Results, scenario: str) -> None:
    build = RIGHT[scenario][0]
    found = ranks[0][scenario]
    batches = usable(scenario, all_batches(scenario, len(ranks)))
    layers = found["layers"]
    inputs = layer_inputs(build(), batches, layers, run)
    model = rebuilt(scenario, found["state"])
    assert list(inputs) == layers
    for name in layers:
        layer = model.get_submodule(name)
        assert_statistics_of(layer, inputs[name], TOLERANCE[layer.running_mean.dtype])


@pytest.mark.parametrize("scenario", [*POOLED, "mean of batches", "prior"])
def test_they_are_what_one_process_makes_of_all_batches(ranks: Results, scenario: str) -> None:
    build, _, options = RIGHT[scenario]
    model = build()
    expected = recalibrate(model, all_batches(scenario, len(ranks)), **options)
    for rank in ranks:
        found = rank[scenario]
        for key, value in model.state_dict().items():
            if "running" in key:
                rtol = 2**-7 if value.dtype == torch.bfloat16 else 1e-6
                torch.testing.assert_close(found["state"][key], value, rtol=rtol, atol=1e-9)
        assert found["layers"] == list(expected.layers)
        assert found["unreached"] == list(expected.unreached)
        assert found["nonfinite"] == expected.nonfinite
        assert (found["num_batches"], found["num_samples"], found["skipped"]) == (
            expected.num_batches,
            expected.num_samples,
            expected.skipped_batches,
        )
        assert found["processes"] == len(ranks)


def test_skipped_batches_of_one_rank_are_counted_on_all(ranks: Results) -> None:
    for rank in ranks:
        found = rank["a skipped batch"]
        assert (found["skipped"], found["num_batches"]) == (2, 2 * len(ranks))
        assert "2 batches skipped" in found["said"]


def test_non_finite_batch_of_one_rank_is_counted_on_all(ranks: Results) -> None:
    for rank in ranks:
        found = rank["non-finite"]
        assert set(found["nonfinite"].values()) == {1}
        assert list(found["nonfinite"]) == found["layers"]


def test_layer_reached_on_one_rank_is_recalibrated_on_all_and_one_reached_nowhere_is_left(ranks: Results) -> None:
    untouched = RIGHT["a layer reached on one rank"][0]()
    assert isinstance(untouched, Branches)
    for rank in ranks:
        found = rank["a layer reached on one rank"]
        assert found["layers"] == ["used", "rare"]
        assert found["unreached"] == ["spare"]
        for key in ("spare.running_mean", "spare.running_var"):
            assert torch.equal(found["state"][key], untouched.state_dict()[key])


def test_layers_that_are_not_selected_are_left_on_every_rank(ranks: Results) -> None:
    untouched = RIGHT["some of them"][0]().state_dict()
    for rank in ranks:
        found = rank["some of them"]["state"]
        changed = {key.rpartition(".")[0] for key, value in untouched.items() if not torch.equal(found[key], value)}
        assert changed == set(rank["some of them"]["layers"])


@pytest.mark.parametrize("scenario", RIGHT)
def test_one_collective_agrees_and_one_merges_whatever_the_number_of_layers(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        # With a prior, what rank 0 holds is everybody's.
        assert rank[scenario]["collectives"] == ["all_reduce", "all_reduce"] + ["broadcast"] * (scenario == "prior")


def test_samples_asked_for_are_those_of_all_ranks_together(ranks: Results) -> None:
    for rank in ranks:
        found = rank["num_samples"]
        assert (found["num_samples"], found["num_batches"]) == (96, 12)


def test_batches_asked_for_are_those_of_each_rank(ranks: Results) -> None:
    # In "unequal" rank 1 has one batch only.
    for rank in ranks:
        assert rank["num_batches"]["num_batches"] == 2 * len(ranks) - 1


def test_a_rank_whose_data_ended_early_is_told_on_every_rank(ranks: Results) -> None:
    assert [rank["num_batches"]["ended_early"] for rank in ranks] == [True] * len(ranks)
    assert "ended" in ranks[0]["num_batches"]["said"]


def test_error_asked_for_is_reached_by_all_ranks_together(ranks: Results) -> None:
    for rank in ranks:
        found = rank["max_standard_error"]
        assert 0 < found["standard_error"] <= 0.02 * 1.01
        assert 8 * len(ranks) <= found["num_batches"] < 120 * len(ranks)
    # Together they need about as many as one process with all the batches.
    build, _, options = RIGHT["max_standard_error"]
    alone = recalibrate(build(), all_batches("max_standard_error", len(ranks)), **options).num_batches
    assert ranks[0]["max_standard_error"]["num_batches"] < 1.4 * alone + 8 * len(ranks)


@pytest.mark.parametrize("scenario", ["equal", "unequal", "an empty rank", "a layer reached on one rank"])
def test_standard_error_is_the_same_on_every_rank_and_neither_none_nor_made_up(ranks: Results, scenario: str) -> None:
    errors = {rank[scenario]["standard_error"] for rank in ranks}
    assert len(errors) == 1
    assert errors.pop() > 0


def test_standard_error_of_one_batch_on_each_rank_is_not_taken_for_none(ranks: Results) -> None:
    # Their spread is known, as that of as many batches in one process is, or else it is infinite.
    build, _, _ = RIGHT["one batch each"]
    expected = recalibrate(build(), all_batches("one batch each", len(ranks))).standard_error
    assert math.isfinite(expected)
    for rank in ranks:
        assert rank["one batch each"]["standard_error"] > 0.3 * expected


# Failures


@pytest.mark.parametrize("scenario", [name for name in FAULTS if name != "another estimator"] + STRANDING)
def test_failure_on_one_rank_ends_the_recalibration_on_all_and_changes_nothing(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        assert rank[scenario]["told"]
        assert rank[scenario]["unchanged"]
        assert rank[scenario]["seconds"] < min(SECONDS, STRANDED)


@pytest.mark.parametrize(
    ("scenario", "told"),
    [
        ("forward raises", "Broken: broken forward"),
        ("forward is interrupted", "KeyboardInterrupt"),
        ("loader raises", "Broken: broken loader"),
        ("loader raises at once", "Broken: broken loader"),
        ("loader cannot be started", "Broken: no such dataset"),
    ],
)
def test_rank_that_failed_tells_its_own_error_and_the_others_that_one_failed(
    ranks: Results, scenario: str, told: str
) -> None:
    for index, rank in enumerate(ranks):
        if index == 1:
            assert rank[scenario]["told"].startswith(told)
        else:
            assert f"failed on 1 of {len(ranks)} processes" in rank[scenario]["told"]


@pytest.mark.parametrize(
    ("scenario", "layer"), [("some frozen", "layer2.0.bn1"), ("others selected", "bn1"), ("other channels", "head.bn")]
)
def test_ranks_that_mean_different_layers_all_name_them(ranks: Results, scenario: str, layer: str) -> None:
    for rank in ranks:
        assert "differently: layer " in rank[scenario]["told"]
        assert repr(layer) in rank[scenario]["told"]


def test_ranks_that_have_the_same_layers_in_another_order_are_told_so(ranks: Results) -> None:
    for rank in ranks:
        assert " in another order" in rank["another order"]["told"]


def test_ranks_that_ask_for_other_numbers_of_samples_are_told_so(ranks: Results) -> None:
    for rank in ranks:
        assert "num_samples (rank 0: " in rank["other samples asked for"]["told"]


@pytest.mark.parametrize(
    ("scenario", "own"),
    [("all frozen", "FailedAloneError: nothing to recalibrate"), ("nothing selected", "SelectionError")],
)
def test_rank_that_cannot_begin_tells_why_and_the_others_do_not_wait(ranks: Results, scenario: str, own: str) -> None:
    for index, rank in enumerate(ranks):
        if index == 1:
            assert rank[scenario]["told"].startswith(own)
        else:
            assert "rank 1 failed" in rank[scenario]["told"]


@pytest.mark.parametrize(("scenario", "own"), [("a bad number", "num_batches=0"), ("no iterable", "Tensor")])
def test_argument_that_is_refused_on_one_rank_strands_no_other(ranks: Results, scenario: str, own: str) -> None:
    for index, rank in enumerate(ranks):
        told = rank[scenario]["told"]
        assert own in told if index == 1 else "rank 1 failed" in told or "failed on 1 of" in told


def test_no_data_on_any_rank_is_an_error_on_all(ranks: Results) -> None:
    for rank in ranks:
        assert "gave no batch" in rank["nobody has data"]["told"]


def test_ranks_with_different_estimators_do_not_end_with_different_statistics(ranks: Results) -> None:
    scenario = "another estimator"
    refused = all(rank[scenario]["told"] and rank[scenario]["unchanged"] for rank in ranks)
    assert refused or all(rank[scenario]["bits"] == ranks[0][scenario]["bits"] for rank in ranks)
