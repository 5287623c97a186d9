"""Fits with synchronized layers, two ranks on one device: torch's own on a GPU, the reference layer on a CPU."""

import pytest
import torch

from tests.callbacks.fits import Net
from tests.callbacks.precise_gpu_ranks import scenarios
from tests.callbacks.test_precise_distributed import NORMS, inner, net_of
from tests.models import bits
from tests.oracle import assert_all_statistics, layer_inputs
from tests.ranks import Results, results_of

PAIRS = [(name, f"{name.split(',')[0]}, without") for name in ("frozen", "bf16")]
PAIRS += [("with", "without"), ("fewer on one", "without")]
RECALIBRATED = [name for name, _ in PAIRS]
DEVICES = [
    pytest.param("tests.callbacks.precise_one_card_ranks", id="CPU"),
    pytest.param("tests.callbacks.precise_gpu_ranks", id="GPU", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=DEVICES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(request.param, 2, tmp_path_factory, limit=110)


@pytest.mark.parametrize(("scenario", "without"), PAIRS)
def test_training_is_bit_identical_to_a_run_without_them(ranks: Results, scenario: str, without: str) -> None:
    for rank in ranks:
        assert rank[scenario]["trace"] == rank[without]["trace"]
        for name, value in rank[without]["parameters"].items():
            assert bits(rank[scenario]["parameters"][name]) == bits(value), name


@pytest.mark.parametrize("scenario", RECALIBRATED)
def test_validation_sees_the_statistics_of_both_ranks_batches_put_together(ranks: Results, scenario: str) -> None:
    for one, other in zip(*(rank[scenario]["validated"] for rank in ranks), strict=True):
        assert one["bits"] == other["bits"]
        together = [torch.cat(pair) for pair in zip(one["batches"], other["batches"], strict=True)]
        assert len(together) == (1 if "fewer" in scenario else 3)
        net = net_of(one["state"])
        if scenario == "frozen":
            net.features[1].eval()
        inputs = layer_inputs(net, together, NORMS[scenario == "frozen" :])
        # In bf16 and on a GPU convolutions are rounded otherwise than here.
        assert_all_statistics(net, inputs, 0.05 if scenario == "bf16" else 1e-3)


def test_frozen_layers_are_bit_identical(ranks: Results) -> None:
    for rank in ranks:
        assert rank["frozen"]["identical"] == [True]


@pytest.mark.parametrize("scenario", [*scenarios("cpu")])
def test_layers_are_plain_again_after_the_fit(ranks: Results, scenario: str) -> None:
    for rank in ranks:
        assert not [kind for kind in rank[scenario]["kinds_after"] if "Sync" in kind]
        assert inner(rank[scenario]["state"]).keys() == Net().state_dict().keys()


def test_statistics_are_the_same_on_both_ranks_while_they_train(ranks: Results) -> None:
    [first], [second] = (rank["with"]["sampled"] for rank in ranks)
    assert torch.equal(first, second)
