"""Synchronized layers: a batch is that of all processes of a group, all run as many, and nobody waits in vain."""

import pytest
import torch
from torch import Tensor

from lightning_bn.functional import recalibrate
from tests.functional.recalibration.recalibrating_ranks import long, network
from tests.functional.recalibration.synchronized_ranks import FAULTS, RIGHT, STRANDING
from tests.models import SharedNorm
from tests.oracle import assert_statistics_of, layer_inputs
from tests.ranks import STRANDED, Results, results_of

SECONDS = 5
"""Within which a failure between forwards is known everywhere."""
WORLDS = [
    pytest.param(("tests.functional.recalibration.synchronized_ranks", 2), id="2 processes"),
    pytest.param(("tests.functional.recalibration.synchronized_ranks", 3), id="3 processes"),
    pytest.param(
        ("tests.functional.recalibration.synchronized_gpu_ranks", 2), id="2 processes on a GPU", marks=pytest.mark.gpu
    ),
]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    module, world = request.param
    return results_of(module, world, tmp_path_factory, limit=100)


def steps(scenario: str, world: int) -> list[Tensor]:
    """What each group normalizes together, step by step, as many as the rank with the fewest batches has."""
    _, shards, groups, _, options = RIGHT[scenario]
    by_rank = [shards(rank, world) for rank in range(world)]
    fewest = min(map(len, by_rank))
    fewest = min(fewest, options.get("num_batches", fewest))
    return [torch.cat([by_rank[rank][step] for rank in group]) for group in groups(world) for step in range(fewest)]


POOLED = ["equal", "unequal", "groups", "one value on a rank", "no rows on a rank", "used several times", "num_batches"]


@pytest.mark.parametrize("scenario", RIGHT)
def test_statistics_are_the_same_bits_on_every_rank(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        assert rank[scenario]["bits"] == ranks[0][scenario]["bits"]
        assert rank[scenario]["undisturbed"]


@pytest.mark.parametrize("scenario", [*POOLED, "non-finite", "mean of batches", "some of them"])
def test_they_are_what_one_process_makes_of_the_batches_of_each_group_put_together(
    ranks: Results, scenario: str
) -> None:
    model = RIGHT[scenario][0]()
    options = {key: value for key, value in RIGHT[scenario][4].items() if key != "num_batches"}
    expected = recalibrate(model, steps(scenario, len(ranks)), **options)
    for rank in ranks:
        for key, value in model.state_dict().items():
            torch.testing.assert_close(rank[scenario]["state"][key], value, rtol=1e-6, atol=1e-9)
        assert rank[scenario]["layers"] == list(expected.layers)


@pytest.mark.parametrize("scenario", POOLED)
def test_they_are_those_of_all_values_in_float64(ranks: Results, scenario: str) -> None:
    build = RIGHT[scenario][0]
    found = ranks[0][scenario]
    inputs = layer_inputs(build(), steps(scenario, len(ranks)), found["layers"])
    model = build()
    model.load_state_dict(found["state"])
    for name in found["layers"]:
        assert_statistics_of(model.get_submodule(name), inputs[name], 1e-6)


def test_plain_layers_beside_them_count_each_ranks_batches(ranks: Results) -> None:
    # The first layer's input does not depend on how any layer normalizes.
    found, (build, shards, _, plain, _) = ranks[0]["some plain"], RIGHT["some plain"]
    assert plain[0] == "bn1"
    by_rank = [shards(rank, len(ranks))[:2] for rank in range(len(ranks))]
    inputs = layer_inputs(build(), [batch for batches in by_rank for batch in batches], ["bn1"])
    model = build()
    model.load_state_dict(found["state"])
    assert_statistics_of(model.get_submodule("bn1"), inputs["bn1"], 1e-6)


@pytest.mark.parametrize("scenario", ["tracking switched off", "one value, tracking switched off"])
def test_where_tracking_was_switched_off_statistics_are_those_of_all_values_too(ranks: Results, scenario: str) -> None:
    model = RIGHT[scenario][0]()
    recalibrate(model, steps(scenario, len(ranks)))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(ranks[0][scenario]["state"][key], value, rtol=1e-6, atol=1e-9)


def test_descriptions_and_plans_say_over_how_many_processes_a_layer_is_synchronized(ranks: Results) -> None:
    world = len(ranks)
    for rank, found in enumerate(ranks):
        for key in ("processes", "planned"):
            assert set(found["equal"][key].values()) == {world}
            plain = RIGHT["some plain"][3]
            assert {name for name, count in found["some plain"][key].items() if count == 1} == set(plain)
            assert set(found["groups"][key].values()) == {1 if rank == world - 1 else world - 1}


def test_statistics_of_a_model_in_half_precision_are_read_in_more(ranks: Results) -> None:
    # The first layer's input is the same in one process, as its convolution runs image by image.
    model = RIGHT["half"][0]()
    inputs = layer_inputs(model, steps("half", len(ranks)), ["bn1"])
    state = ranks[0]["half"]["state"]
    var, mean = torch.var_mean(inputs["bn1"].double(), 1)
    torch.testing.assert_close(state["bn1.running_var"].double(), var, rtol=2**-8, atol=0)
    torch.testing.assert_close(state["bn1.running_mean"].double(), mean, rtol=2**-8, atol=1e-4)


def test_every_rank_runs_as_many_batches_as_the_one_with_the_fewest(ranks: Results) -> None:
    for rank in ranks:
        assert rank["unequal"]["num_batches"] == 2 * len(ranks)
        assert rank["unequal"]["num_samples"] == sum(map(len, steps("unequal", len(ranks))))
        assert rank["num_batches"]["num_batches"] == 2 * len(ranks)


def test_samples_asked_for_end_the_pass_on_all_ranks_at_the_same_batch(ranks: Results) -> None:
    # 11 were asked for: 3 + 7 in the first step are too few, though more than rank 1's share, and 3 + 7 + 2 are not.
    for rank in ranks:
        assert rank["num_samples"]["num_batches"] == {2: 2 * 2, 3: 3 * 1}[len(ranks)]


def test_they_go_on_together(ranks: Results) -> None:
    for index, rank in enumerate(ranks):
        assert rank["votes"] == {
            "nobody": True,
            "one has ended": False,
            "one is precise": True,
            "all are precise": False,
            "enough samples": False,
            "one sample too few": True,
            "processes": 1 if index else len(ranks),
        }


def test_the_error_is_that_of_as_many_samples_as_there_are_groups(ranks: Results) -> None:
    world = len(ranks)
    for scenario, groups in (("max_standard_error", 1), ("max_standard_error in groups", 2)):
        found = ranks[0][scenario]
        # What one process estimates of the same batches put together.
        taken = found["num_batches"] // world
        by_rank = [long(rank, world)[:taken] for rank in range(world)]
        sets = RIGHT[scenario][2](world)
        together = [torch.cat([by_rank[rank][step] for rank in group]) for group in sets for step in range(taken)]
        expected = recalibrate(network(SharedNorm), together).standard_error
        # Each group corrects for its own number of batches.
        assert found["standard_error"] == pytest.approx(expected, rel=1e-6 if groups == 1 else 0.1)
        assert 8 <= taken < 120
        assert len(sets) == groups
        assert found["standard_error"] < 0.06


def test_one_collective_merges_and_a_small_one_agrees_before_each_batch(ranks: Results) -> None:
    for scenario in ("equal", "unequal", "used several times"):
        for rank in ranks:
            found = rank[scenario]
            batches = found["num_batches"] // len(ranks)
            # torch's layer gathers in its forward, the reference layer counts its sums.
            called = [name for name in found["called"] if found["of_layers"] or "gather" not in name]
            # One on layers, one before each batch and one that finds no further batch, one that merges.
            assert len(called) - found["of_layers"] == batches + 3
            assert set(called) == {"all_reduce"}


def test_a_layer_whose_values_are_not_finite_on_one_rank_is_left_out_on_all(ranks: Results) -> None:
    for rank in ranks:
        assert set(rank["non-finite"]["nonfinite"].values()) == {len(ranks)}


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", FAULTS)
def test_failure_between_forwards_ends_it_on_all_at_once_and_changes_nothing(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        assert rank[scenario]["told"]
        assert rank[scenario]["unchanged"]
        assert rank[scenario]["seconds"] < min(SECONDS, STRANDED)


@pytest.mark.parametrize(
    ("scenario", "own", "others"),
    [
        ("loader raises", "Broken: broken loader", "failed on 1 of"),
        ("loader raises at once", "Broken: broken loader", "failed on 1 of"),
        ("loader cannot be started", "Broken: no such dataset", "failed on 1 of"),
        ("batch cannot be moved", "Broken: cannot be moved", "failed on 1 of"),
        ("no data", "the loader gave no batch", "another process had no batch"),
        ("all frozen", "nothing to recalibrate", "rank 1 failed"),
        ("some frozen", "differently: layer ", "'layer2.0.bn1'"),
        ("a plain layer", "'bn1' is synchronized", "'bn1' is synchronized"),
        ("not distributed", "Pass distributed=True", "Pass distributed=True"),
    ],
)
def test_the_rank_that_failed_says_why_and_the_others_that_one_did(
    ranks: Results, scenario: str, own: str, others: str
) -> None:
    for index, rank in enumerate(ranks):
        assert (own if index == 1 else others) in rank[scenario]["told"]


@pytest.mark.parametrize("scenario", STRANDING)
def test_failure_inside_a_forward_is_a_bounded_wait_and_an_error_that_says_for_whom(
    ranks: Results, scenario: str
) -> None:
    for index, rank in enumerate(ranks):
        assert rank[scenario]["unchanged"]
        assert rank[scenario]["seconds"] < 2 * STRANDED
        if index == 1:
            assert rank[scenario]["told"] == "Broken: broken forward"
            assert rank[scenario]["seconds"] < STRANDED
        else:
            assert "waited for another process" in rank[scenario]["told"]
