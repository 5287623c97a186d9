"""Running statistics of many layers as one value: taken, written back bit by bit, saved."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional.layers.patterns import SelectionError
from lightning_bn.functional.statistics.snapshots import Snapshot, restore_snapshot, take_snapshot
from tests.models import SMALL_RESNET_NAMES, Holder, SmallResNet, bits, fill_statistics, images, state_bits

NAN, INF = float("nan"), float("inf")


def buffer_ids(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(buffer), buffer.data_ptr()) for name, buffer in model.named_buffers()}


def buffer_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(buffer) for name, buffer in model.named_buffers()}


def scramble(model: nn.Module) -> None:
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(3)


def with_odd_values(model: nn.Module) -> nn.Module:
    """NaN, both infinities, the negative zero and the smallest number in the statistics of the first layer."""
    layer = next(module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    tiny = torch.finfo(layer.running_mean.dtype).smallest_normal
    layer.running_mean.copy_(torch.tensor([NAN, INF, -0.0, tiny / 2]))
    layer.running_var.copy_(torch.tensor([INF, NAN, 0.0, tiny]))
    return model


def one_nan(model: nn.Module) -> nn.Module:
    """The model with every NaN in its buffers the same NaN; all other bits as they are."""
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer[buffer.isnan()] = NAN
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("odd", [False, True], ids=["ordinary", "nan_and_inf"])
def test_restoring_is_bit_exact(dtype: torch.dtype, odd: bool) -> None:
    model = fill_statistics(SmallResNet().to(dtype))
    if odd:
        with_odd_values(model)
    before = state_bits(model)
    snapshot = take_snapshot(model)
    assert snapshot.mean.dtype == snapshot.var.dtype == dtype
    scramble(model)
    assert state_bits(model) != before
    restore_snapshot(model, snapshot)
    assert state_bits(model) == before


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64, torch.float32, torch.float16),
    ],
    ids=lambda dtypes: "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_restoring_is_bit_exact_where_layers_differ_in_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    model = with_odd_values(fill_statistics(nn.Sequential(*[nn.BatchNorm2d(4, dtype=dtype) for dtype in dtypes])))
    odd = copy.deepcopy(model)
    snapshot = take_snapshot(model)
    promoted = dtypes[0]
    for dtype in dtypes:
        promoted = torch.promote_types(promoted, dtype)
    assert snapshot.mean.dtype == snapshot.var.dtype == promoted
    scramble(model)
    restore_snapshot(model, snapshot)
    # Through a wider dtype and back torch keeps that a value is NaN, but not always which NaN.
    assert state_bits(one_nan(model)) == state_bits(one_nan(odd))
    assert [layer.running_mean.dtype for layer in model] == list(dtypes)


def test_restoring_is_bit_exact_where_mean_and_variance_differ_in_dtype() -> None:
    layer = fill_statistics(nn.BatchNorm2d(4))
    layer.running_var = layer.running_var.double() / 3
    model = nn.Sequential(layer)
    before = state_bits(model)
    snapshot = take_snapshot(model)
    scramble(model)
    restore_snapshot(model, snapshot)
    assert state_bits(model) == before


def test_restoring_after_real_training_is_bit_exact() -> None:
    model = fill_statistics(SmallResNet())
    before, snapshot = buffer_bits(model), take_snapshot(model)
    for seed in range(3):
        model(images(seed=seed))
    assert buffer_bits(model) != before
    restore_snapshot(model, snapshot)
    assert buffer_bits(model) == before


def test_the_same_tensor_objects_are_there_after_restoring() -> None:
    model = fill_statistics(SmallResNet())
    before, snapshot = buffer_ids(model), take_snapshot(model)
    scramble(model)
    restore_snapshot(model, snapshot)
    assert buffer_ids(model) == before


def test_restoring_outside_inference_mode_leaves_buffers_that_can_train() -> None:
    model = fill_statistics(SmallResNet())
    with torch.inference_mode():
        snapshot = take_snapshot(model)
        restore_snapshot(model, snapshot)
    assert not any(buffer.is_inference() for buffer in model.buffers())
    model(images()).sum().backward()


def test_restoring_does_not_touch_weights_modes_or_requires_grad() -> None:
    model = fill_statistics(SmallResNet()).eval()
    model.layer1.train()
    snapshot = take_snapshot(model)
    fill_statistics(model, seed=1)
    model.layer2.requires_grad_(False)
    parameters = {name: (bits(value), value.requires_grad) for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    restore_snapshot(model, snapshot)
    assert parameters == {name: (bits(value), value.requires_grad) for name, value in model.named_parameters()}
    assert modes == [module.training for module in model.modules()]


def test_a_snapshot_is_a_copy_not_a_view() -> None:
    model = fill_statistics(SmallResNet())
    snapshot = take_snapshot(model)
    held = bits(snapshot.mean), bits(snapshot.var), bits(snapshot.weight), bits(snapshot.num_batches_tracked)
    scramble(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9)
    assert held == (bits(snapshot.mean), bits(snapshot.var), bits(snapshot.weight), bits(snapshot.num_batches_tracked))


def test_a_snapshot_of_a_single_layer_is_a_copy_not_a_view() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    snapshot = take_snapshot(layer)
    pointers = {tensor.data_ptr() for tensor in (layer.running_mean, layer.running_var, layer.weight)}
    assert not pointers & {tensor.data_ptr() for tensor in (snapshot.mean, snapshot.var, snapshot.weight)}
    assert layer.num_batches_tracked.data_ptr() != snapshot.num_batches_tracked.data_ptr()


def test_restoring_leaves_the_snapshot_apart_from_the_model() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    snapshot = take_snapshot(layer)
    restore_snapshot(layer, snapshot)
    held = bits(snapshot.mean)
    scramble(layer)
    assert bits(snapshot.mean) == held


def test_taking_a_snapshot_changes_nothing() -> None:
    model = fill_statistics(SmallResNet())
    before, ids = state_bits(model), buffer_ids(model)
    take_snapshot(model)
    assert (state_bits(model), buffer_ids(model)) == (before, ids)


def test_a_snapshot_needs_no_gradient() -> None:
    snapshot = take_snapshot(fill_statistics(SmallResNet()))
    for tensor in (snapshot.mean, snapshot.var, snapshot.weight, snapshot.num_batches_tracked):
        assert not tensor.requires_grad


# --- what is in it -----------------------------------------------------------------------------------------------


def test_the_flat_tensors_hold_every_layer_at_its_slice() -> None:
    model = nn.ModuleDict(
        {"a": nn.BatchNorm1d(2, eps=1e-3), "b": nn.BatchNorm2d(5, affine=False), "c": nn.BatchNorm3d(1, momentum=None)}
    )
    fill_statistics(model)
    model["b"].num_batches_tracked = None
    snapshot = take_snapshot(model)
    assert snapshot.names == ("a", "b", "c")
    assert snapshot.layout.sizes == (2, 5, 1)
    assert snapshot.eps == (1e-3, 1e-5, 1e-5)
    assert snapshot.layout.slices == {"a": slice(0, 2), "b": slice(2, 7), "c": slice(7, 8)}
    assert snapshot.num_batches_tracked.dtype == torch.int64
    assert snapshot.num_batches_tracked.tolist() == [7, -1, 7]
    assert len(snapshot) == 3
    assert snapshot.mean.shape == snapshot.var.shape == snapshot.weight.shape == (8,)
    for name, where in snapshot.layout.slices.items():
        layer = model[name]
        assert torch.equal(snapshot.mean[where], layer.running_mean)
        assert torch.equal(snapshot.var[where], layer.running_var)
        assert torch.equal(snapshot.weight[where], layer.weight if layer.affine else torch.ones(layer.num_features))


def test_a_snapshot_holds_the_selected_layers_only() -> None:
    model = Holder(fill_statistics(SmallResNet()))
    assert take_snapshot(model).names == tuple(f"model.{name}" for name in SMALL_RESNET_NAMES)
    part = take_snapshot(model, "layer1", exclude="layer1.0", root="model")
    assert part.names == ("model.layer1.1.bn1", "model.layer1.1.bn2")


def test_restoring_a_part_leaves_the_rest_as_it_is() -> None:
    model = fill_statistics(SmallResNet())
    before, part = buffer_bits(model), take_snapshot(model, "layer1")
    fill_statistics(model, seed=1)
    changed = buffer_bits(model)
    restore_snapshot(model, part)
    after = buffer_bits(model)
    for name in after:
        assert after[name] == (before if name.startswith("layer1.") else changed)[name], name


def test_layers_without_running_statistics_are_left_out() -> None:
    model = nn.ModuleDict({"kept": nn.BatchNorm2d(3), "untracked": nn.BatchNorm2d(3, track_running_stats=False)})
    assert take_snapshot(model).names == ("kept",)
    with pytest.raises(SelectionError, match="untracked"):
        take_snapshot(model, "untracked")


def test_a_snapshot_is_of_buffers_whatever_the_flag_says() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    layer.track_running_stats = False
    assert torch.equal(take_snapshot(nn.Sequential(layer)).mean, layer.running_mean)


def test_a_shared_layer_is_taken_once() -> None:
    layer = nn.BatchNorm2d(3)
    assert len(take_snapshot(nn.ModuleDict({"a": layer, "b": layer}))) == 1


def test_a_snapshot_goes_from_one_model_to_its_copy_and_to_its_compiled_form() -> None:
    model = fill_statistics(SmallResNet())
    snapshot = take_snapshot(model)
    for other in (copy.deepcopy(model), torch.compile(copy.deepcopy(model), backend="eager")):
        scramble(other)  # type: ignore[arg-type]
        restore_snapshot(other, snapshot)  # type: ignore[arg-type]
        assert take_snapshot(other).same_bits(snapshot)  # type: ignore[arg-type]


# --- counters ----------------------------------------------------------------------------------------------------


def test_the_number_of_batches_is_restored() -> None:
    model = fill_statistics(SmallResNet())
    snapshot = take_snapshot(model)
    counter = model.bn1.num_batches_tracked
    model(images())
    assert int(model.bn1.num_batches_tracked) == 8
    restore_snapshot(model, snapshot)
    assert int(model.bn1.num_batches_tracked) == 7
    assert model.bn1.num_batches_tracked is counter


def test_a_number_of_batches_beyond_32_bits_is_restored() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    layer.num_batches_tracked.fill_(2**53 + 1)
    snapshot = take_snapshot(layer)
    layer.num_batches_tracked.zero_()
    restore_snapshot(layer, snapshot)
    assert int(layer.num_batches_tracked) == 2**53 + 1


def test_a_layer_without_a_counter_is_restored_without_one() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    layer.num_batches_tracked = None
    mean, snapshot = bits(layer.running_mean), take_snapshot(nn.Sequential(layer))
    assert snapshot.num_batches_tracked.tolist() == [-1]
    layer.running_mean.zero_()
    restore_snapshot(nn.Sequential(layer), snapshot)
    assert bits(layer.running_mean) == mean
    assert layer.num_batches_tracked is None


# --- what does not fit -------------------------------------------------------------------------------------------


def pair() -> nn.ModuleDict:
    return fill_statistics(nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(4)}))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("culprit", "model"),
    [
        ("b", nn.ModuleDict({"a": nn.BatchNorm2d(3)})),
        ("b", nn.ModuleDict({"a": nn.BatchNorm2d(3), "c": nn.BatchNorm2d(4)})),
        ("b", nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(5)})),
        ("b", nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(1)})),
        ("b", nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.InstanceNorm2d(4, track_running_stats=True)})),
        ("b", nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(4, track_running_stats=False)})),
        ("b", nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.LazyBatchNorm2d()})),
    ],
    ids=["missing", "renamed", "more_channels", "one_channel", "other_norm", "no_statistics", "uninitialized"],
)
def test_what_does_not_fit_is_an_error_that_names_the_layer_and_nothing_is_written(
    culprit: str, model: nn.ModuleDict
) -> None:
    snapshot = take_snapshot(pair())
    before = state_bits(model["a"])
    with pytest.raises(ValueError, match=rf"\b{culprit}\b"):
        restore_snapshot(model, snapshot)
    assert state_bits(model["a"]) == before


@pytest.mark.parametrize("narrower", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_the_buffers_cannot_hold_are_an_error_and_nothing_is_written(narrower: torch.dtype) -> None:
    model = pair().double()
    model["b"].running_var.fill_(1 / 3)
    snapshot = take_snapshot(model)
    other = pair().to(narrower)
    fill_statistics(other, seed=1)
    before = state_bits(other)
    with pytest.raises(ValueError, match=r"\b[ab]\b"):
        restore_snapshot(other, snapshot)
    assert state_bits(other) == before


def test_two_layers_that_swapped_their_channels_are_an_error() -> None:
    snapshot = take_snapshot(pair())
    other = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(3)})
    before = state_bits(other)
    with pytest.raises(ValueError, match=r"\b[ab]\b"):
        restore_snapshot(other, snapshot)
    assert state_bits(other) == before


def test_layers_in_another_order_are_restored_by_name() -> None:
    snapshot = take_snapshot(pair())
    other = nn.ModuleDict({"b": nn.BatchNorm2d(4), "a": nn.BatchNorm2d(3)})
    restore_snapshot(other, snapshot)
    assert torch.equal(other["a"].running_mean, pair()["a"].running_mean)
    assert torch.equal(other["b"].running_var, pair()["b"].running_var)


# --- comparing ---------------------------------------------------------------------------------------------------


def test_same_bits_counts_nan_as_itself() -> None:
    model = with_odd_values(fill_statistics(SmallResNet()))
    assert take_snapshot(model).same_bits(take_snapshot(model))


@pytest.mark.parametrize("change", ["mean", "var", "count", "sign_of_zero", "nan_to_inf"])
def test_same_bits_sees_one_changed_bit(change: str) -> None:
    model = with_odd_values(fill_statistics(SmallResNet()))
    before = take_snapshot(model)
    layer = model.layer10[0].bn2
    if change == "mean":
        layer.running_mean[2] = torch.nextafter(layer.running_mean[2], torch.tensor(INF))
    elif change == "var":
        layer.running_var[3] = torch.nextafter(layer.running_var[3], torch.tensor(INF))
    elif change == "count":
        layer.num_batches_tracked += 1
    elif change == "sign_of_zero":
        model.bn1.running_mean[2] = 0.0
    else:
        model.bn1.running_mean[0] = INF
    assert not take_snapshot(model).same_bits(before)
    assert not before.same_bits(take_snapshot(model))


def test_snapshots_of_different_layers_are_not_the_same_bits() -> None:
    a = take_snapshot(fill_statistics(nn.ModuleDict({"a": nn.BatchNorm2d(3)})))
    b = take_snapshot(fill_statistics(nn.ModuleDict({"b": nn.BatchNorm2d(3)})))
    split = take_snapshot(nn.ModuleDict({"a": nn.BatchNorm2d(1), "b": nn.BatchNorm2d(2)}))
    joined = take_snapshot(nn.ModuleDict({"a": nn.BatchNorm2d(2), "b": nn.BatchNorm2d(1)}))
    assert not a.same_bits(b)
    assert not split.same_bits(joined)


# --- saving ------------------------------------------------------------------------------------------------------


def saved_and_loaded(state: dict[str, object]) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, object] = torch.load(file, weights_only=True)
    return loaded


def only_plain(value: object) -> bool:
    if type(value) is dict:
        return all(type(key) is str and only_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(only_plain(item) for item in value)  # type: ignore[attr-defined]
    return type(value) in (Tensor, str, int, float, bool, type(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_state_dict_goes_through_a_checkpoint_read_with_weights_only(dtype: torch.dtype) -> None:
    model = with_odd_values(fill_statistics(SmallResNet().to(dtype)))
    snapshot = take_snapshot(model)
    state = snapshot.state_dict()
    assert only_plain(state)
    again = Snapshot.from_state_dict(saved_and_loaded(state))
    assert again.same_bits(snapshot)
    assert (again.layout, again.eps) == (snapshot.layout, snapshot.eps)
    assert bits(again.weight) == bits(snapshot.weight)
    assert again.layout.slices == snapshot.layout.slices
    before = state_bits(model)
    scramble(model)
    restore_snapshot(model, again)
    assert state_bits(model) == before


def test_a_missing_counter_survives_the_checkpoint() -> None:
    layer = nn.BatchNorm2d(3)
    layer.num_batches_tracked = None
    snapshot = take_snapshot(nn.Sequential(layer))
    assert Snapshot.from_state_dict(saved_and_loaded(snapshot.state_dict())).num_batches_tracked.tolist() == [-1]


# --- moving ------------------------------------------------------------------------------------------------------


def test_moving_a_snapshot_keeps_it_whole() -> None:
    snapshot = take_snapshot(fill_statistics(SmallResNet()))
    assert snapshot.to("cpu").same_bits(snapshot)
    moved = snapshot.to(torch.device("meta"))
    assert (moved.layout, moved.eps) == (snapshot.layout, snapshot.eps)
    assert moved.mean.device.type == moved.var.device.type == moved.weight.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_snapshot_goes_between_devices_bit_by_bit() -> None:
    model = with_odd_values(fill_statistics(SmallResNet())).cuda()
    before, snapshot = state_bits(model), take_snapshot(model).to("cpu")
    scramble(model)
    restore_snapshot(model, snapshot)
    assert state_bits(model) == before


def test_a_snapshot_cannot_be_reassigned() -> None:
    snapshot = take_snapshot(fill_statistics(SmallResNet()))
    with pytest.raises(AttributeError):
        snapshot.mean = torch.zeros(1)  # type: ignore[misc]


def test_a_state_of_another_version_is_read_as_far_as_it_is_known() -> None:
    snapshot = take_snapshot(fill_statistics(SmallResNet()))
    state = snapshot.state_dict()
    assert state["format"] == 1
    again = Snapshot.from_state_dict({**state, "format": 99, "something new": "unknown"})
    assert again.same_bits(snapshot)
    older = {key: state[key] for key in ("names", "channels", "mean", "var")}
    least = Snapshot.from_state_dict(older)
    assert least.num_batches_tracked.tolist() == [-1] * len(snapshot)
    assert least.weight.tolist() == [1.0] * snapshot.layout.channels
    assert least.eps == snapshot.eps
