"""What a batch looked like, recovered from the moving average, against the batch itself."""

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional.monitoring.batch_deviation import BatchDeviations, innovation, momenta
from lightning_bn.functional.statistics.snapshots import Snapshot, take_snapshot
from tests.models import fill_statistics

CPU = torch.device("cpu")


def layer(momentum: float | None = 0.1, channels: int = 3) -> nn.BatchNorm1d:
    built = nn.BatchNorm1d(channels, momentum=momentum, dtype=torch.float64)
    return fill_statistics(built).train()  # type: ignore[return-value]


def batch(seed: int = 0, shift: float = 2.0, channels: int = 3) -> Tensor:
    return shift + torch.randn(16, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(one: nn.BatchNorm1d, *batches: Tensor) -> tuple[Snapshot, Snapshot, Tensor]:
    before = take_snapshot(one)
    for x in batches:
        one(x)
    return before, take_snapshot(one), momenta([one], CPU)


@pytest.mark.parametrize("momentum", [0.001, 0.1, 0.5, 1.0])
def test_an_innovation_is_the_distance_of_the_batch_mean_in_sigma_of_the_running_average(momentum: float) -> None:
    one = layer(momentum)
    mean, var = one.running_mean.clone(), one.running_var.clone()  # type: ignore[union-attr]
    expected = (batch().mean(0) - mean) / (var + one.eps).sqrt()
    torch.testing.assert_close(innovation(*seen(one, batch())), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("updates", [0, 2])
def test_nothing_is_told_of_anything_but_one_update(updates: int) -> None:
    assert innovation(*seen(layer(), *[batch()] * updates)).isnan().all()


def test_a_cumulative_average_and_one_that_never_moves_tell_nothing() -> None:
    assert momenta([layer(None), layer(0.3)], CPU).isnan().tolist() == [True, False]
    assert innovation(*seen(layer(None), batch())).isnan().all()
    assert innovation(*seen(layer(0.0), batch())).isnan().all()


def of(values: list[list[float]]) -> BatchDeviations:
    total = BatchDeviations.none(torch.zeros(len(values[0])))
    for row in values:
        total = total.with_batch(torch.tensor(row, dtype=torch.float64), 2.0)
    return total


def snapshot(*channels: int) -> Snapshot:
    return take_snapshot(nn.ModuleList(nn.BatchNorm1d(count) for count in channels))


def test_bias_and_scatter_are_root_mean_squares_over_each_layers_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    # Within the range of batches that are no outliers.
    values = 0.5 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    summed, layers = of(values.tolist()), snapshot(3, 2)
    mean, var = values.mean(0), values.var(0, unbiased=False)
    for got, squares in ((summed.bias(layers.layout), mean.square()), (summed.scatter(layers.layout), var)):
        expected = torch.stack([squares[:3].mean().sqrt(), squares[3:].mean().sqrt()])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_constant_deviation_is_all_bias_and_an_alternating_one_all_scatter() -> None:
    layers = snapshot(1)
    lagging, alternating = of([[1.5]] * 8), of([[1.5], [-1.5]] * 4)
    assert float(lagging.bias(layers.layout)) == pytest.approx(1.5)
    assert float(lagging.scatter(layers.layout)) == pytest.approx(0, abs=1e-7)
    assert float(alternating.bias(layers.layout)) == pytest.approx(0, abs=1e-12)
    assert float(alternating.scatter(layers.layout)) == pytest.approx(1.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out_by_channel(bad: float) -> None:
    layers = snapshot(1, 1)
    summed = of([[1.0, 2.0], [bad, 2.0], [1.0, 2.0]])
    assert summed.bias(layers.layout).tolist() == pytest.approx([1.0, 2.0])
    assert summed.scatter(layers.layout).tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


def test_of_no_batch_there_is_no_bias_and_no_scatter() -> None:
    none = BatchDeviations.none(torch.zeros(3))
    assert none.bias(snapshot(3).layout).tolist() == [0.0]
    assert none.scatter(snapshot(3).layout).tolist() == [0.0]
