"""What is known of layers between and at samples, without a Trainer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn.functional import freeze_batch_norm, layer_status
from lightning_bn.functional.layers.status import update_status
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.session import Watch


def batch(seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)) + shift


def watched(updates: int = 100) -> tuple[nn.BatchNorm1d, Watch]:
    """A layer with the statistics of the data, under watch."""
    layer = nn.BatchNorm1d(4)
    for seed in range(updates):
        layer(batch(seed))
    watch = Watch({"bn": layer}, "jeffreys", DriftHistory())
    watch.refer_to_now()
    return layer, watch


def trained(layer: nn.Module, watch: Watch, count: int = 1, shift: float = 0.0) -> None:
    for seed in range(count):
        watch.before_batch()
        layer(batch(1000 + seed, shift))
        watch.after_batch(batch(0))


def diseases(watch: Watch, step: int = 1) -> list[str]:
    return [one.disease for one in watch.sample(step, 0).diagnoses]


class Reads(TorchDispatchMode):
    """Counts single values that are read, for each of which an accelerator would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def test_a_sample_reads_no_value_but_all_of_them_at_once() -> None:
    layer, watch = watched()
    trained(layer, watch)
    watch.sample(1, 0)
    with Reads() as reads:
        watch.before_batch()
        watch.after_batch(batch(0))
        watch.sample(2, 0, right_after=True)
    assert reads.count == 0
    with Reads() as reads:
        float(layer.running_mean[0])  # type: ignore[index]
    assert reads.count == 1, "or it counts nothing"


@pytest.mark.parametrize(("factors", "found"), [([1e6, 1, 1, 1], []), ([200, 200, 200, 50], ["exploding"])])
def test_it_takes_most_channels_to_explode(factors: list[float], found: list[str]) -> None:
    layer, watch = watched()
    trained(layer, watch)
    layer.running_var.mul_(torch.tensor(factors))  # type: ignore[union-attr]
    assert diseases(watch) == found


def test_what_is_not_finite_is_not_called_exploding_too() -> None:
    layer, watch = watched()
    trained(layer, watch)
    layer.running_var.fill_(float("inf"))  # type: ignore[union-attr]
    assert diseases(watch) == ["not finite"]


@pytest.mark.parametrize(("then", "found"), [(2e-4, []), (1e-3, ["died"])])
def test_a_dead_channel_was_alive_if_its_variance_was_fifty_times_eps(then: float, found: list[str]) -> None:
    layer, watch = watched(1000)
    layer.running_var[0] = then  # type: ignore[index]
    watch.refer_to_now()
    trained(layer, watch)
    layer.running_var[0] = 1e-7  # type: ignore[index]
    assert diseases(watch) == found


def test_the_batch_after_a_recalibration_is_not_judged_and_the_next_one_is() -> None:
    layer, watch = watched()
    update_status(layer, recalibrated_at=5)
    assert watch.recalibrated(5)
    trained(layer, watch)
    assert watch.sample(6, 0).step == 6
    assert watch._judged == 0
    trained(layer, watch)
    assert watch._judged == 1


def test_values_that_a_recalibration_wrote_are_no_fault_of_a_layer_that_is_frozen_then() -> None:
    layer, watch = watched()
    freeze_batch_norm(layer)
    trained(layer, watch)
    watch.sample(1, 0)
    layer.running_mean.add_(1)  # type: ignore[union-attr]
    update_status(layer, recalibrated_at=5)
    trained(layer, watch)
    assert diseases(watch, 6) == []
    layer.running_mean.add_(1)  # type: ignore[union-attr]
    trained(layer, watch)
    assert diseases(watch, 7) == ["frozen but moves"]
    assert layer_status(layer).recalibrated_at == 5


def test_momentum_is_read_again_when_a_layer_was_reset() -> None:
    layer, watch = watched()
    layer.reset_running_stats()
    layer.momentum = None
    trained(layer, watch)
    watch.sample(1, 0)
    # One update of a cumulative average leaves nothing of the initial values.
    assert watch.unsettled == set()


def test_a_moving_average_far_behind_its_batches_lags() -> None:
    layer, watch = watched()
    layer.momentum = 0.001
    trained(layer, watch, 8, shift=3.0)
    assert diseases(watch) == ["lagging"]
