"""Standard errors are those that the spread between batches tells, batch by batch, in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bn.functional import moments, recalibrate
from lightning_bn.functional.recalibration.standard_error import ErrorSums, relative_errors
from lightning_bn.functional.statistics.sample_moments import Moments, merge
from tests.models import SharedNorm, images
from tests.oracle import captured_inputs, per_channel


class Errors(NamedTuple):
    mean: Tensor
    var: Tensor

    def largest(self) -> float:
        return float(torch.maximum(self.mean, self.var).max())


def errors_of(batches: list[Tensor], eps: float = 1e-5) -> Errors:
    """Over clusters of values, each (C, n): from their definition, about the pooled statistics."""
    clusters = [batch.double() for batch in batches]
    everything = torch.cat(clusters, 1)
    count, mean = everything.shape[1], everything.mean(1, keepdim=True)
    var = (everything - mean).square().mean(1)
    correction = len(clusters) / (len(clusters) - 1)
    of_mean = sum((cluster - mean).sum(1).square() for cluster in clusters)
    of_var = sum(((cluster - mean).square() - var[:, None]).sum(1).square() for cluster in clusters)
    return Errors(
        mean=(correction * of_mean).sqrt() / count / (var + eps).sqrt(),
        var=(correction * of_var).sqrt() / count / (var + eps),
    )


def sums_of(batches: list[Tensor]) -> tuple[ErrorSums, Moments]:
    zeros = torch.zeros(batches[0].shape[0], dtype=torch.float64)
    sums, pooled = ErrorSums.none(zeros), Moments(zeros, zeros, zeros)
    for batch in batches:
        count, mean, m2 = moments(batch, channel_dim=0)
        one = Moments(count.expand_as(mean), mean, m2)
        sums, pooled = sums.with_batch(one), merge(pooled, one)
    return sums, pooled


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=12),
    seed=st.integers(0, 2**16),
    offset=st.sampled_from([0.0, 1.0, -50.0, 1e3]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    between=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_errors_are_those_of_their_definition_whatever_the_batches(sizes, seed, offset, scale, between):
    # Each batch has a mean of its own besides.
    batches = [
        scale * (offset + between * normal(3, 1, seed=seed + index) + normal(3, size, seed=seed + 99 + index))
        for index, size in enumerate(sizes)
    ]
    sums, pooled = sums_of(batches)
    eps = torch.full((3,), 1e-5, dtype=torch.float64)
    expected = torch.maximum(*errors_of(batches))
    found = relative_errors(pooled, sums.squared(pooled), eps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_errors_predict_how_far_the_statistics_of_another_sample_are():
    """The truth, not a formula: 2,000 samples of 40 batches, whose positions share a part of their values."""

    def sample(seed: int, times: int) -> Tensor:
        shared, own = normal(times, 40, 1, seed=seed), normal(times, 40, 9, seed=seed + 1)
        return shared + own

    pooled = sample(3, 2000).flatten(1)
    truth_mean = pooled.mean(1).std() / math.sqrt(2)
    truth_var = pooled.var(1).std() / 2
    estimated = [errors_of([batch[None] for batch in one]) for one in sample(17, 200)]
    found = []
    for one in sample(17, 200):
        sums, together = sums_of([batch[None] for batch in one])
        mean, var = sums.squared(together)
        found.append((mean.sqrt() / 360 / math.sqrt(2), var.sqrt() / 360 / 2))
    assert float(torch.stack([mean for mean, _ in found]).mean()) == pytest.approx(float(truth_mean), rel=0.06)
    assert float(torch.stack([var for _, var in found]).mean()) == pytest.approx(float(truth_var), rel=0.1)
    assert float(torch.stack([error.mean for error in estimated]).mean()) == pytest.approx(float(truth_mean), rel=0.06)


def test_values_within_a_batch_that_are_copies_of_each_other_add_no_certainty():
    single = [normal(2, 8, seed=seed) for seed in range(12)]
    layer, repeated = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    once = recalibrate(layer, [batch.T.float() for batch in single]).standard_error
    many = recalibrate(repeated, [batch.T.float()[:, :, None].expand(8, 2, 50) for batch in single]).standard_error
    assert many == pytest.approx(once, rel=1e-4)


def test_error_of_one_batch_is_infinite():
    assert recalibrate(nn.BatchNorm2d(3), [images(8)]).standard_error == math.inf


def test_error_of_one_batch_used_several_times_is_infinite():
    # Two uses of the shared layer are one unit.
    assert recalibrate(SharedNorm(), [images(8)]).standard_error == math.inf


def test_several_uses_in_one_forward_count_as_one_unit():
    net = SharedNorm()
    batches = [images(6, seed=seed) for seed in range(10)]
    layers = {"first.norm": net.first["norm"], "own": net.own}
    units: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch in batches:
        with torch.no_grad(), captured_inputs(layers) as seen:
            net(batch)
        for name, uses in seen.items():
            units[name].append(torch.cat(uses, 1))
    assert units["first.norm"][0].shape[1] == 2 * units["own"][0].shape[1]
    expected = max(errors_of(values).largest() for values in units.values())
    assert recalibrate(net, batches).standard_error == pytest.approx(expected, rel=1e-4)


def test_error_is_that_of_the_worst_channel_of_the_worst_layer():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    batches = [images(size, seed=size) for size in (3, 9, 4, 16, 5)]
    layers = {"0": net[0], "2": net[2]}
    with torch.no_grad(), captured_inputs(layers) as seen:
        for batch in batches:
            net(batch)
    expected = max(errors_of(values).largest() for values in seen.values())
    assert recalibrate(net, batches).standard_error == pytest.approx(expected, rel=1e-4)


def test_dead_channel_has_no_error():
    layer = nn.BatchNorm1d(2)
    batches = []
    for seed in range(10):
        batch = normal(16, 2, seed=seed).float()
        batch[:, 1] = 0.1
        batches.append(batch)
    result = recalibrate(layer, batches)
    alive = errors_of([per_channel(batch)[:1] for batch in batches]).largest()
    assert result.standard_error == pytest.approx(alive, rel=1e-4)


def test_all_channels_dead_is_no_error_at_all():
    assert recalibrate(nn.BatchNorm1d(2), [torch.zeros(4, 2)] * 3).standard_error == 0


def test_non_finite_batch_is_no_unit():
    batches = [normal(16, 2, seed=seed).float() for seed in range(5)]
    expected = errors_of([per_channel(batch) for batch in batches]).largest()
    found = recalibrate(nn.BatchNorm1d(2), [*batches, torch.full((16, 2), math.inf)]).standard_error
    assert found == pytest.approx(expected, rel=1e-4)


def test_layer_that_few_batches_reached_is_judged_by_those():
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rare, self.calls = nn.BatchNorm1d(2), nn.BatchNorm1d(2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.rare(x) if self.calls % 4 == 0 else self.always(x)

    batches = [normal(16, 2, seed=seed).float() for seed in range(12)]
    expected = errors_of([per_channel(batch) for batch in batches[3::4]]).largest()
    assert recalibrate(Rare(), batches).standard_error == pytest.approx(expected, rel=1e-4)
