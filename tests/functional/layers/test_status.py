"""What is known of a layer lies on the layer: found from any parent, under any name, in any copy."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_bn.functional import SelectionError, is_frozen, layer_status
from lightning_bn.functional.layers.status import LayerStatus, status_by_name, update_status
from tests.models import SMALL_RESNET_NAMES, Holder, SharedNorm, SmallResNet


def test_nothing_is_known_of_a_new_layer() -> None:
    assert layer_status(nn.BatchNorm2d(3)) == LayerStatus((), (), None)


def test_what_is_recorded_is_found_and_the_rest_stays() -> None:
    layer = nn.BatchNorm2d(3)
    update_status(layer, stats_frozen_by=("a",))
    update_status(layer, recalibrated_at=7)
    assert layer_status(layer) == LayerStatus(("a",), (), 7)
    update_status(layer, affine_frozen_by=("b",), recalibrated_at=8)
    assert layer_status(layer) == LayerStatus(("a",), ("b",), 8)


def test_a_layer_of_which_nothing_is_known_any_more_carries_no_trace() -> None:
    layer = nn.BatchNorm2d(3)
    before = dict(vars(layer))
    update_status(layer, stats_frozen_by=("a",))
    update_status(layer, stats_frozen_by=())
    assert vars(layer) == before


def test_a_record_is_not_part_of_the_state_dict() -> None:
    layer = nn.BatchNorm2d(3)
    keys = list(layer.state_dict())
    update_status(layer, stats_frozen_by=("a",), recalibrated_at=3)
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_knows_what_its_original_knew_then(copied: object) -> None:
    layer = nn.BatchNorm2d(3)
    update_status(layer, stats_frozen_by=("a",))
    other = copied(layer)  # type: ignore[operator]
    update_status(layer, stats_frozen_by=())
    assert layer_status(other).stats_frozen_by == ("a",)
    assert layer_status(layer).stats_frozen_by == ()


def test_a_record_cannot_be_changed_by_holding_it() -> None:
    status = layer_status(nn.BatchNorm2d(3))
    with pytest.raises(AttributeError):
        status.recalibrated_at = 3  # type: ignore[misc]


def test_a_layer_is_frozen_where_somebody_keeps_its_statistics() -> None:
    layer = nn.BatchNorm2d(3)
    update_status(layer, affine_frozen_by=("a",), recalibrated_at=3)
    assert not is_frozen(layer)
    update_status(layer, stats_frozen_by=("a",))
    assert is_frozen(layer)
    assert not is_frozen(nn.BatchNorm2d(3).eval())


def test_every_layer_is_listed_by_its_canonical_name() -> None:
    net = SmallResNet()
    update_status(net.layer1[0].bn2, recalibrated_at=4)
    statuses = status_by_name(net)
    assert list(statuses) == SMALL_RESNET_NAMES
    assert {name for name, status in statuses.items() if status != LayerStatus()} == {"layer1.0.bn2"}
    assert status_by_name(Holder(net))["model.layer1.0.bn2"].recalibrated_at == 4


def test_a_shared_layer_and_a_compiled_one_are_found_under_their_plain_first_names() -> None:
    net = SharedNorm()
    update_status(net.second["norm"], stats_frozen_by=("a",))
    assert status_by_name(net)["first.norm"].stats_frozen_by == ("a",)
    compiled = nn.Sequential(torch.compile(nn.Sequential(nn.BatchNorm1d(2)), backend="eager"))  # type: ignore[arg-type]
    assert list(status_by_name(compiled)) == ["0.0"]


def test_a_model_without_batch_norm_is_an_error() -> None:
    with pytest.raises(SelectionError, match="no BatchNorm layer"):
        status_by_name(nn.Linear(2, 2))
