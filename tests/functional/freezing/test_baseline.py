"""Values that must not change: copied, watched, compared bit by bit, restored."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bn.functional.freezing.baseline import Baseline
from lightning_bn.functional.freezing.change import Change
from lightning_bn.functional.layers.selection import batch_norm_layers
from tests.models import SmallResNet, bits, fill_statistics, seeded, state_bits

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")


def layer(channels: int = 3, **arguments: bool) -> nn.BatchNorm1d:
    return fill_statistics(nn.Sequential(nn.BatchNorm1d(channels, **arguments)))[0]  # type: ignore[index]


def baseline_of(norm: nn.BatchNorm1d, *, stats: bool = True, affine: bool = True) -> Baseline:
    return Baseline({"norm": norm}, stats=stats, affine=affine)


def test_nothing_is_touched_and_nothing_moved_at_first() -> None:
    baseline = baseline_of(layer())
    assert not baseline.touched()
    assert baseline.changes() == []


def test_reading_and_a_forward_in_eval_touch_nothing() -> None:
    norm = layer().eval()
    baseline = baseline_of(norm)
    norm(torch.randn(4, 3)).sum().backward()
    norm.state_dict()
    assert not baseline.touched()
    assert baseline.changes() == []


@pytest.mark.parametrize("value", [*STATISTICS, *AFFINE])
def test_a_value_written_in_place_is_touched_and_moved_and_comes_back(value: str) -> None:
    norm = layer()
    baseline, before, tensors = (
        baseline_of(norm),
        state_bits(norm),
        {id(t) for t in norm.state_dict(keep_vars=True).values()},
    )
    with torch.no_grad():
        getattr(norm, value).add_(2)
    assert baseline.touched()
    assert baseline.changes() == [Change("norm", value, pytest.approx(2))]
    baseline.restore()
    assert state_bits(norm) == before
    assert {id(t) for t in norm.state_dict(keep_vars=True).values()} == tensors
    assert not baseline.touched()
    assert baseline.changes() == []


@pytest.mark.parametrize("value", ["running_mean", "weight"])
def test_a_writer_that_leaves_no_version_behind_is_not_touched_but_moved(value: str) -> None:
    norm = layer()
    baseline = baseline_of(norm)
    getattr(norm, value).data.copy_(getattr(norm, value).data + 1)
    assert not baseline.touched()
    assert [(change.layer, change.value) for change in baseline.changes()] == [("norm", value)]


def test_a_forward_in_train_mode_is_touched_by_its_counter_and_moves_the_statistics() -> None:
    norm = layer()
    baseline = baseline_of(norm)
    norm(torch.randn(4, 3))
    assert baseline.touched()
    assert [change.value for change in baseline.changes()] == list(STATISTICS)


@pytest.mark.parametrize(("stats", "affine"), [(True, False), (False, True)])
def test_only_what_was_asked_for_is_kept(stats: bool, affine: bool) -> None:
    norm = layer()
    baseline = baseline_of(norm, stats=stats, affine=affine)
    with torch.no_grad():
        for value in AFFINE if stats else STATISTICS:
            getattr(norm, value).add_(1)
    assert not baseline.touched()
    assert baseline.changes() == []


def replaced(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = norm.running_mean + 1  # type: ignore[operator]


def reshaped(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = torch.zeros(7)


def retyped(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = norm.running_mean.double() + 1  # type: ignore[union-attr]


def none(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = None


def deleted(norm: nn.BatchNorm1d) -> None:
    del norm.running_mean


@pytest.mark.parametrize("alter", [replaced, reshaped, retyped, none, deleted], ids=lambda alter: alter.__name__)
def test_a_tensor_that_was_replaced_or_taken_away_comes_back(alter: Callable[[nn.BatchNorm1d], None]) -> None:
    norm = layer()
    baseline, before = baseline_of(norm), state_bits(norm)
    alter(norm)
    assert baseline.touched()
    (change,) = baseline.changes()
    assert (change.layer, change.value) == ("norm", "running_mean")
    assert math.isnan(change.largest_change) == (alter in (reshaped, none, deleted))
    baseline.restore()
    assert state_bits(norm) == before
    assert norm.running_mean.dtype == torch.float32  # type: ignore[union-attr]
    assert baseline.changes() == []
    assert not baseline.touched()


@pytest.mark.parametrize("bit", ["-0.0", "nan", "ulp"])
def test_bits_count_and_not_values(bit: str) -> None:
    norm = layer()
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.0, float("nan"), 1.0]))  # type: ignore[union-attr]
    baseline = baseline_of(norm)
    assert baseline.changes() == []
    with torch.no_grad():
        if bit == "-0.0":
            norm.running_mean[0] = -0.0  # type: ignore[index]
        elif bit == "nan":
            norm.running_mean[1] = 0.0  # type: ignore[index]
        else:
            norm.running_mean[2] = 1.0 + 2**-23  # type: ignore[index]
    assert len(baseline.changes()) == 1
    baseline.restore()
    assert bits(norm.running_mean) == bits(torch.tensor([0.0, float("nan"), 1.0]))  # type: ignore[arg-type]


def test_a_reset_is_told_as_such() -> None:
    norm = layer()
    baseline = baseline_of(norm)
    norm.reset_running_stats()
    assert [change.value for change in baseline.changes()] == list(STATISTICS)
    assert all("StochasticWeightAveraging" in change.cause for change in baseline.changes())
    assert "initial value" in str(baseline.changes()[0])


def test_what_is_put_back_was_not_reached_by_later_writes() -> None:
    norm = layer()
    baseline, before = baseline_of(norm), state_bits(norm)
    for _ in range(3):
        with torch.no_grad():
            norm.weight.mul_(2)
            norm.running_var.mul_(2)  # type: ignore[union-attr]
        baseline.restore()
        assert state_bits(norm) == before


def test_rearming_takes_what_is_there_as_untouched_but_still_knows_what_was_kept() -> None:
    norm = layer()
    baseline = baseline_of(norm)
    with torch.no_grad():
        norm.weight.add_(1)
    baseline.rearm()
    assert not baseline.touched()
    assert [change.value for change in baseline.changes()] == ["weight"]


@pytest.mark.parametrize("arguments", [{"affine": False}, {"track_running_stats": False}])
def test_a_layer_that_lacks_some_values_is_kept_without_them(arguments: dict[str, bool]) -> None:
    norm = layer(**arguments)
    baseline = baseline_of(norm)
    for tensor in norm.state_dict().values():
        tensor.add_(1)
    expected = AFFINE if "track_running_stats" in arguments else STATISTICS
    assert [change.value for change in baseline.changes()] == list(expected)
    baseline.restore()
    assert baseline.changes() == []


def test_no_layers_at_all_are_no_error() -> None:
    baseline = Baseline({}, stats=True, affine=True)
    assert not baseline.touched()
    assert baseline.changes() == []
    baseline.restore()


def test_layers_of_several_dtypes_are_kept_side_by_side() -> None:
    net = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(5).to(torch.bfloat16), nn.BatchNorm1d(2).double()])
    fill_statistics(net)
    before = state_bits(net)
    baseline = Baseline(batch_norm_layers(net), stats=True, affine=True)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    assert len(baseline.changes()) == 15
    baseline.restore()
    assert state_bits(net) == before


def test_what_another_keeps_can_be_expected_of_a_copy() -> None:
    net, copy = fill_statistics(seeded(SmallResNet)), fill_statistics(seeded(SmallResNet), seed=1)
    baseline = Baseline(batch_norm_layers(net), stats=True, affine=True)
    expected = baseline.for_layers(batch_norm_layers(copy))
    assert expected.changes()
    expected.restore()
    layers, copies = batch_norm_layers(net), batch_norm_layers(copy)
    assert all(state_bits(layers[name]) == state_bits(copies[name]) for name in layers)
    assert baseline.changes() == []


@pytest.mark.parametrize(("name", "channels"), [("other", 3), ("norm", 5)])
def test_of_a_layer_of_another_name_or_size_what_it_is_now_is_expected(name: str, channels: int) -> None:
    other = layer(channels)
    before = state_bits(other)
    expected = baseline_of(layer()).for_layers({name: other})
    # The counter has the same size in both; all else has nothing to be compared with.
    assert {change.value for change in expected.changes()} <= {"num_batches_tracked"}
    with torch.no_grad():
        other.weight.add_(1)
    assert "weight" in {change.value for change in expected.changes()}
    expected.restore()
    assert state_bits(other)["weight"] == before["weight"]


def test_a_change_reads_as_a_sentence() -> None:
    assert str(Change("a.bn", "weight", 0.1234567)) == "a.bn.weight by up to 0.123"
    assert str(Change("a.bn", "bias", 2.0, "LBFGS")) == "a.bn.bias by up to 2 (LBFGS)"


@settings(max_examples=60)
@given(
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    writes=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from([*STATISTICS, *AFFINE]),
            st.sampled_from(["add", "data", "replace", "same"]),
        ),
        max_size=6,
    ),
)
def test_exactly_what_differs_is_named_whatever_was_written_and_all_of_it_comes_back(
    channels: list[int], writes: list[tuple[int, str, str]]
) -> None:
    net = fill_statistics(nn.ModuleList([nn.BatchNorm1d(count) for count in channels]))
    layers = batch_norm_layers(net)
    baseline, before = Baseline(layers, stats=True, affine=True), state_bits(net)
    with torch.no_grad():
        for index, value, how in writes:
            norm: nn.Module = layers[str(index % len(channels))]
            tensor: Tensor = getattr(norm, value)
            if how == "add":
                tensor.add_(1)
            elif how == "data":
                tensor.data.add_(1)
            elif how == "same":
                tensor.copy_(tensor.clone())
            elif value in AFFINE:
                setattr(norm, value, nn.Parameter(tensor + 1))
            else:
                setattr(norm, value, tensor + 1)
    after = state_bits(net)
    assert {f"{change.layer}.{change.value}" for change in baseline.changes()} == {
        k for k in before if before[k] != after[k]
    }
    baseline.restore()
    assert state_bits(net) == before
    assert baseline.changes() == []
