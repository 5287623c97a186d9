"""A recalibration whose forward puts other tensors in a target's place reads nothing, and says so by name."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional import RecalibrationError, frozen_batch_norm, recalibrate
from lightning_bn.functional.layers.exchange import Entries, exchanged
from tests.models import SMALL_RESNET_NAMES, SmallResNet, fill_statistics, images, seeded
from tests.oracle import everything


def batches() -> Iterator[Tensor]:
    return iter([images(8, seed=seed) for seed in range(3)])


def others(layer: nn.Module) -> Entries:
    return Entries("target", layer, {"running_mean": torch.zeros(4), "running_var": torch.ones(4)})


def around_the_call(model: nn.Module, batch: Tensor) -> Tensor:
    with exchanged("somebody", [others(model.layer1[0].bn1)]):
        return model(batch)


LEFT = ExitStack()


def never_taken_out(model: nn.Module, batch: Tensor) -> Tensor:
    LEFT.enter_context(exchanged("somebody", [others(model.layer1[0].bn1)]))
    return model(batch)


def assigned(model: nn.Module, batch: Tensor) -> Tensor:
    model.layer1[0].bn1.running_mean = torch.zeros(4)
    return model(batch)


def frozen_meanwhile(model: nn.Module, batch: Tensor) -> Tensor:
    with frozen_batch_norm(model, "layer1.0.bn1"):
        return model(batch)


def put_into_eval(model: nn.Module, batch: Tensor) -> Tensor:
    model.layer1[0].bn1.eval()
    return model(batch)


def only_in_a_later_batch() -> Callable[[Any, Tensor], Tensor]:
    calls = iter((False, False, True))
    return lambda model, batch: around_the_call(model, batch) if next(calls) else model(batch)


@pytest.mark.parametrize(
    "forward",
    [around_the_call, never_taken_out, assigned, only_in_a_later_batch()],
    ids=lambda forward: forward.__name__,
)
def test_statistics_written_elsewhere_are_an_error_with_the_layer_and_everything_is_put_back(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    model = fill_statistics(seeded(SmallResNet)).train()
    before = everything(model)
    with pytest.raises(RecalibrationError, match=r"'layer1\.0\.bn1'"):
        recalibrate(model, batches(), forward=forward)
    assert everything(model) == before
    LEFT.pop_all()


class SwapsItsOwn(nn.BatchNorm2d):
    """One set of statistics for each domain, put into place for as long as its own forward runs."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        self.running_mean, self.running_var = torch.zeros(self.num_features), torch.ones(self.num_features)
        try:
            return super().forward(x)
        finally:
            self.running_mean, self.running_var = mean, var


@pytest.mark.parametrize("channels", [1, 3])
def test_a_layer_that_exchanges_its_own_buffers_inside_its_forward_is_named(channels: int) -> None:
    model = fill_statistics(
        nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), SwapsItsOwn(channels))
    ).train()
    before = everything(model)
    with pytest.raises(RecalibrationError, match=r"layer '2' could not be collected"):
        recalibrate(model, batches())
    assert everything(model) == before


def test_the_others_are_recalibrated_where_it_is_left_out() -> None:
    model = fill_statistics(nn.Sequential(nn.BatchNorm2d(3), SwapsItsOwn(3))).train()
    assert recalibrate(model, batches(), exclude="1").layers == ("0",)


def test_an_exchange_that_was_there_before_is_written_into_and_stays() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3)).train()
    own = layer.running_mean.clone()  # type: ignore[operator, union-attr]
    shadow = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    with exchanged("somebody", [Entries("bn", layer, shadow)]):
        recalibrate(layer, batches())
        assert layer.running_mean is shadow["running_mean"]
        assert float(shadow["running_mean"].abs().min()) > 0.5
    assert torch.equal(layer.running_mean, own)  # type: ignore[arg-type]


def test_constant_inputs_are_collected_and_not_taken_for_unwritten_ones() -> None:
    layer = nn.BatchNorm2d(3)
    recalibrate(layer, [torch.full((4, 3, 2, 2), -1.0)] * 3)
    assert layer.running_mean.tolist() == [-1.0] * 3  # type: ignore[union-attr]
    assert layer.running_var.tolist() == [0.0] * 3  # type: ignore[union-attr]


@pytest.mark.parametrize("forward", [frozen_meanwhile, put_into_eval])
def test_a_layer_that_the_forward_runs_in_eval_is_not_reached_and_stays_as_it_was(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    model = fill_statistics(seeded(SmallResNet)).train()
    before = everything(model, but_statistics_of=set(SMALL_RESNET_NAMES) - {"layer1.0.bn1"})
    result = recalibrate(model, batches(), forward=forward)
    assert result.unreached == ("layer1.0.bn1",)
    assert len(result.layers) == len(SMALL_RESNET_NAMES) - 1
    assert everything(model, but_statistics_of=set(SMALL_RESNET_NAMES) - {"layer1.0.bn1"}) == before


def test_a_teachers_pass_in_eval_reads_the_running_statistics_and_adds_nothing() -> None:
    layer, twin = (fill_statistics(nn.BatchNorm2d(3)).train() for _ in range(2))
    expected = [copy.deepcopy(layer).eval()(batch) for batch in batches()]
    seen = []

    def with_a_teacher(model: nn.Module, batch: Tensor) -> Tensor:
        model.eval()
        seen.append(model(batch))
        model.train()
        return model(batch)

    found, alone = recalibrate(layer, batches(), forward=with_a_teacher), recalibrate(twin, batches())
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
    assert found.after.same_bits(alone.after)


@pytest.mark.parametrize("momentum", [0.05, 1.0, None])
def test_a_momentum_that_the_step_sets_changes_nothing(momentum: float | None) -> None:
    layer, twin = (fill_statistics(nn.BatchNorm2d(3)).train() for _ in range(2))

    def scheduled(model: nn.Module, batch: Tensor) -> Tensor:
        model.momentum = momentum  # type: ignore[assignment]
        return model(batch)

    assert recalibrate(layer, batches(), forward=scheduled).after.same_bits(recalibrate(twin, batches()).after)
    assert layer.momentum == 0.1
