"""A forward that normalizes with the batch and updates nothing is otherwise the forward of training, bit for bit."""

import copy
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_bn.functional import SelectionError, recalibrate, without_updates
from tests.models import SMALL_RESNET_NAMES, BatchNormAct2d, Broken, SmallResNet, bits, fill_statistics, images, seeded
from tests.oracle import everything


def network() -> nn.Module:
    return fill_statistics(seeded(SmallResNet)).train()


def gradients(model: nn.Module, x: Tensor) -> list[bytes]:
    model(x).square().sum().backward()
    return [bits(parameter.grad) for parameter in model.parameters()]  # type: ignore[arg-type]


def statistics(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(buffer) for name, buffer in model.named_buffers()}


def test_outputs_and_gradients_are_those_of_training_and_nothing_moves() -> None:
    model, twin = network(), network()
    before = statistics(model)
    with without_updates(model) as names:
        found = gradients(model, images(8))
    assert found == gradients(twin, images(8))
    assert statistics(model) == before
    assert statistics(twin) != before
    assert names == tuple(SMALL_RESNET_NAMES)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3, momentum=None), BatchNormAct2d(3), nn.SyncBatchNorm(3)])
def test_layers_of_other_kinds_do_not_move_either(layer: nn.Module) -> None:
    twin, before = copy.deepcopy(layer).train(), statistics(layer)
    with without_updates(layer.train()):
        output = layer(images(8))
    assert bits(output) == bits(twin(images(8)))
    assert statistics(layer) == before


def test_layers_in_eval_read_their_running_statistics_as_ever() -> None:
    model = network().eval()
    expected = bits(model(images(8)))
    with without_updates(model):
        assert bits(model(images(8))) == expected


def test_second_forward_of_a_step_leaves_the_statistics_of_the_first() -> None:
    model, once = network(), network()
    once(images(8))
    model(images(8))
    with without_updates(model):
        model(images(8) + 1)
    assert statistics(model) == statistics(once)


def test_only_selected_layers_and_only_inside() -> None:
    model = network()
    found = everything(model)
    with without_updates(model, "layer1", exclude="**.bn2") as names:
        assert all(name.startswith("layer1") and not name.endswith("bn2") for name in names)
    assert everything(model) == found

    def fail() -> None:
        with without_updates(model), without_updates(model, "layer1"):
            raise Broken

    with pytest.raises(Broken):
        fail()
    assert everything(model) == found
    with pytest.raises(SelectionError), without_updates(model, "nowhere"):
        pass


def test_recalibration_does_not_count_such_a_forward() -> None:
    def forward(model: Any, batch: Tensor) -> None:
        with without_updates(model):
            model(batch * 5 + 7)
        model(batch)

    model, twin = network(), network()
    batches = [images(8, seed=seed) for seed in range(3)]
    assert recalibrate(model, batches, forward=forward).after.same_bits(recalibrate(twin, batches).after)
