"""Faults of statistics, from two snapshots of real layers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_bn.functional.monitoring.batch_deviation import momenta
from lightning_bn.functional.monitoring.health import health, initial_shares, newly_collapsed
from lightning_bn.functional.statistics.snapshots import snapshot_of, take_snapshot
from tests.models import SharedNorm, SmallResNet, fill_statistics, images, seeded, warmed


def two(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Two layers of different width after a few batches, in train mode."""
    layers = nn.ModuleDict({"a": nn.BatchNorm1d(3, dtype=dtype), "b": nn.BatchNorm1d(2, dtype=dtype)})
    fill_statistics(layers)
    return layers.train()


def run(layer: nn.Module, batches: int) -> None:
    for seed in range(batches):
        layer(torch.randn(8, layer.num_features, generator=torch.Generator().manual_seed(seed)))  # type: ignore[arg-type]


def test_updates_are_counted_by_layer_and_training_batch() -> None:
    net = two()
    before = take_snapshot(net)
    run(net["a"], 6)
    run(net["b"], 3)
    found = health(take_snapshot(net), before, 3)
    assert found.updates.tolist() == [2.0, 1.0]
    assert found.reset.tolist() == [False, False]
    assert found.changed.tolist() == [True, True]


def test_a_layer_that_no_batch_reached_has_none() -> None:
    net = two()
    before = take_snapshot(net)
    run(net["a"], 4)
    found = health(take_snapshot(net), before, 4)
    assert found.updates.tolist() == [1.0, 0.0]
    assert found.changed.tolist() == [True, False]


def test_a_layer_used_twice_has_two_updates_per_batch() -> None:
    net = warmed(seeded(SharedNorm))
    before = take_snapshot(net)
    net(images())
    assert health(take_snapshot(net), before, 1).updates.tolist() == [2.0, 1.0]


def test_without_a_batch_in_between_nothing_is_known_of_updates() -> None:
    snapshot = take_snapshot(two())
    assert health(snapshot, snapshot, 0).updates.isnan().all()


def test_without_a_counter_nothing_is_known_of_updates_and_nothing_is_called_reset() -> None:
    net = two()
    net["a"].num_batches_tracked = None  # type: ignore[assignment]
    before = take_snapshot(net)
    run(net["b"], 2)
    found = health(take_snapshot(net), before, 2)
    assert math.isnan(float(found.updates[0]))
    assert float(found.updates[1]) == 1
    assert not found.reset.any()


def test_a_reset_is_seen_by_its_counter_also_after_further_batches() -> None:
    net = two()
    before = take_snapshot(net)
    net["a"].reset_running_stats()
    run(net["a"], 2)
    run(net["b"], 2)
    found = health(take_snapshot(net), before, 2)
    assert found.reset.tolist() == [True, False]
    assert math.isnan(float(found.updates[0]))


def test_a_reset_of_the_statistics_alone_is_seen_too() -> None:
    net = two()
    before = take_snapshot(net)
    net["a"].running_mean.zero_()  # type: ignore[union-attr, operator]
    net["a"].running_var.fill_(1)  # type: ignore[union-attr, operator]
    assert health(take_snapshot(net), before, 2).reset.tolist() == [True, False]


def test_a_layer_that_was_never_trained_is_not_called_reset() -> None:
    snapshot = take_snapshot(nn.BatchNorm1d(3))
    assert health(snapshot, snapshot, 5).reset.tolist() == [False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["running_mean", "running_var"])
def test_channels_that_are_not_finite_are_counted_by_layer(bad: float, where: str) -> None:
    net = two()
    getattr(net["b"], where)[1] = bad
    found = health(take_snapshot(net), take_snapshot(net), 1)
    assert found.nonfinite.tolist() == [0, 1]


def test_a_mean_and_a_variance_that_cancel_are_still_not_finite() -> None:
    net = two()
    net["a"].running_mean[0], net["a"].running_var[0] = -math.inf, math.inf  # type: ignore[index, operator]
    snapshot = take_snapshot(net)
    assert health(snapshot, snapshot, 1).nonfinite.tolist() == [1, 0]


def test_statistics_that_are_not_finite_and_stay_have_not_changed() -> None:
    net = two()
    net["a"].running_mean.fill_(math.nan)  # type: ignore[union-attr, operator]
    found = health(take_snapshot(net), take_snapshot(net), 1)
    assert found.changed.tolist() == [False, False]


def test_collapsed_channels_have_a_variance_below_the_layers_own_eps() -> None:
    net = two()
    net["b"].eps = 0.1
    net["a"].running_var[:2] = 0.0  # type: ignore[index, operator]
    net["a"].running_var[2] = 0.05  # type: ignore[index, operator]
    net["b"].running_var.fill_(0.05)  # type: ignore[union-attr, operator]
    snapshot = take_snapshot(net)
    assert health(snapshot, snapshot, 1).collapsed.tolist() == [2, 2]


def test_everything_is_one_number_a_layer_in_registration_order() -> None:
    net = fill_statistics(seeded(SmallResNet))
    snapshot = take_snapshot(net)
    found = health(snapshot, snapshot, 1)
    for values in (found.nonfinite, found.collapsed, found.updates, found.changed, found.reset):
        assert values.shape == (len(snapshot),)


def test_snapshots_of_other_layers_are_an_error() -> None:
    with pytest.raises(ValueError, match="same layers"):
        health(take_snapshot(two()), take_snapshot(nn.BatchNorm1d(3)), 1)


def test_newly_collapsed_channels_were_not_at_the_reference() -> None:
    net = two()
    for name in ("a", "b"):
        net[name].running_var.fill_(1.0)  # type: ignore[union-attr, operator]
    net["b"].running_var[0] = 2e-5  # type: ignore[index, operator]
    before = take_snapshot(net)
    # From 1 to nothing; from hardly more than eps to nothing; to what is little and not nothing.
    net["a"].running_var[:2] = 1e-7  # type: ignore[index, operator]
    net["b"].running_var[0] = 1e-7  # type: ignore[index, operator]
    net["b"].running_var[1] = 2e-5  # type: ignore[index, operator]
    after = take_snapshot(net)
    weights = momenta([net["a"], net["b"]], torch.device("cpu"))  # type: ignore[list-item]
    for layer in net.values():
        layer.num_batches_tracked.fill_(1000)  # type: ignore[union-attr, operator]
    before = replace(before, num_batches_tracked=take_snapshot(net).num_batches_tracked)
    assert newly_collapsed(after, before, weights, 0.02).tolist() == [2, 0]


def test_what_is_left_of_the_initial_variance_does_not_count() -> None:
    layer = nn.BatchNorm1d(2)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.0])
    for _ in range(44):
        layer(x)
    settled = take_snapshot(layer)
    assert float(settled.var[1]) == pytest.approx(0.9**44, rel=1e-4)
    for _ in range(100):
        layer(x)
    assert float(take_snapshot(layer).var[1]) < layer.eps
    assert newly_collapsed(take_snapshot(layer), settled, momenta([layer], torch.device("cpu")), 0.02).tolist() == [0]


def test_the_share_of_initial_values_is_what_the_moving_average_has_left() -> None:
    layers = {name: nn.BatchNorm1d(2, momentum=momentum) for name, momentum in (("a", 0.1), ("b", 0.5), ("c", None))}
    layers["d"] = nn.BatchNorm1d(2)
    layers["d"].num_batches_tracked = None
    weights = momenta(list(layers.values()), torch.device("cpu"))
    assert initial_shares(snapshot_of(layers), weights).tolist() == [1, 1, 1, 0]
    # A batch of zeros leaves of the initial variance, 1, exactly that share.
    for _ in range(3):
        for layer in layers.values():
            layer(torch.zeros(4, 2))
    shares = initial_shares(snapshot_of(layers), weights).tolist()
    left = [float(layer.running_var[0]) for layer in layers.values()]
    assert shares[:3] == pytest.approx([0.9**3, 0.5**3, 0.0])
    assert left[:3] == pytest.approx(shares[:3])
    assert shares[3] == 0
