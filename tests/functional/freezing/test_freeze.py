"""Frozen means frozen: through modes, copies, files and training steps; and given back as it was found."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules

from lightning_bn.functional.freezing.freeze import (
    freeze_batch_norm,
    freeze_layers,
    frozen_batch_norm,
    unfreeze_batch_norm,
    unfreeze_layers,
)
from lightning_bn.functional.layers.patterns import SelectionError
from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.layers.status import is_frozen
from tests.models import (
    SMALL_RESNET_NAMES,
    BatchNormAct2d,
    Holder,
    SharedNorm,
    SmallResNet,
    bits,
    fill_statistics,
    images,
    seeded,
    state_bits,
    warmed,
)

LAYER1 = tuple(name for name in SMALL_RESNET_NAMES if name.startswith("layer1."))


def network() -> SmallResNet:
    """Ten layers with statistics that are not initial, in train mode."""
    return warmed(seeded(SmallResNet))  # type: ignore[return-value]


def norm_bits(model: nn.Module, names: object = None) -> dict[str, bytes]:
    """The bytes of statistics, counters and parameters of the BatchNorm layers."""
    layers = batch_norm_layers(model)
    return {
        f"{name}.{key}": value
        for name in (layers if names is None else names)  # type: ignore[attr-defined]
        for key, value in state_bits(layers[name]).items()
    }


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def grads(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def train(model: nn.Module, steps: int = 3, optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> None:
    """Real training steps, in train mode."""
    model.train()
    build = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05))
    stepper = build(model.parameters())
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        stepper.zero_grad()
        model(images(seed=step, dtype=dtype)).square().mean().backward()
        stepper.step()


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)  # type: ignore[arg-type]


def adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]


# --- frozen means frozen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_statistics_and_parameters_are_bit_identical_after_training(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    model = network()
    names = freeze_batch_norm(model, "layer1")
    assert names == LAYER1
    frozen, others = norm_bits(model, LAYER1), norm_bits(model, ["layer2.0.bn1", "layer10.0.bn1"])
    train(model, optimizer=optimizer)
    assert norm_bits(model, LAYER1) == frozen
    after = norm_bits(model, ["layer2.0.bn1", "layer10.0.bn1"])
    assert all(after[key] != others[key] for key in others)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_freezing_in_the_middle_of_training_holds_what_is_there(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    model = network()
    stepper = optimizer(model.parameters())
    before: dict[str, bytes] = {}
    for step in range(6):
        if step == 3:
            freeze_batch_norm(model)
            before = norm_bits(model)
        stepper.zero_grad()
        model(images(seed=step)).square().mean().backward()
        stepper.step()
    assert norm_bits(model) == before


def test_a_gradient_that_was_already_there_does_not_move_a_frozen_parameter() -> None:
    model = network()
    stepper = sgd(model.parameters())
    model(images()).square().mean().backward()
    freeze_batch_norm(model)
    before = norm_bits(model)
    stepper.step()
    assert norm_bits(model) == before


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_momentum_gathered_before_freezing_does_not_move_a_frozen_parameter(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    model = network()
    stepper = optimizer(model.parameters())
    for step in range(2):
        stepper.zero_grad()
        model(images(seed=step)).square().mean().backward()
        stepper.step()
    freeze_batch_norm(model)
    before = norm_bits(model)
    for step in range(2):
        stepper.zero_grad(set_to_none=False)
        model(images(seed=step)).square().mean().backward()
        stepper.step()
    assert norm_bits(model) == before


@pytest.mark.parametrize(
    "to_train",
    [
        lambda model: model.train(),
        lambda model: model.train(True),
        lambda model: model.layer1.train(),
        lambda model: model.layer1[0].bn1.train(),
        lambda model: model.layer1[0].bn1.train(mode=True),
        lambda model: model.apply(lambda module: module.train()),
        lambda model: Holder(model).train(),
        lambda model: nn.Sequential(nn.Sequential(model)).train(),
        lambda model: model.eval().train(),
        lambda model: [module.train() for module in model.modules()],
    ],
    ids=["model", "mode", "parent", "itself", "keyword", "apply", "holder", "grandparent", "eval_and_back", "each"],
)
def test_train_on_itself_or_any_parent_changes_nothing(to_train: Callable[[SmallResNet], object]) -> None:
    model = network()
    freeze_batch_norm(model, "layer1")
    before = norm_bits(model, LAYER1)
    to_train(model)
    layer = model.layer1[0].bn1
    assert layer.training is False
    assert is_frozen(layer)
    with torch.no_grad():
        model(images())
    assert norm_bits(model, LAYER1) == before


def test_train_still_reaches_everything_else() -> None:
    model = network().eval()
    freeze_batch_norm(model, "layer1")
    assert model.train() is model
    frozen = set(batch_norm_layers(model, "layer1").values())
    assert all(module.training is (module not in frozen) for module in model.modules())
    model.eval()
    assert not any(modes(model))


def test_train_and_eval_of_a_frozen_layer_return_the_layer() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    freeze_batch_norm(layer)
    assert layer.train() is layer
    assert layer.eval() is layer
    assert layer.train(False) is layer
    with pytest.raises(ValueError, match="boolean"):
        layer.train("yes")  # type: ignore[arg-type]


def test_a_frozen_layer_normalizes_with_its_running_statistics() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3, eps=1e-3).double())
    x = images(dtype=torch.float64)
    freeze_batch_norm(layer)
    out = layer.train()(x)
    for c in range(3):
        y = (x[:, c] - layer.running_mean[c]) / (layer.running_var[c] + 1e-3).sqrt()
        assert torch.allclose(out[:, c], y * layer.weight[c] + layer.bias[c], rtol=1e-12, atol=1e-12)


def test_a_frozen_layer_takes_a_batch_with_one_value_per_channel() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    x = torch.ones(1, 3, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(x)
    freeze_batch_norm(layer)
    assert layer.train()(x).isfinite().all()


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False], ids=["affine_frozen", "affine_trains"])
def test_gradients_through_a_frozen_layer_are_those_of_the_layer_in_eval(affine: bool) -> None:
    model = network().double()
    by_hand = copy.deepcopy(model)
    for layer in batch_norm_layers(by_hand).values():
        layer.eval()
    freeze_batch_norm(model, affine=affine)
    x = images(dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for net, values in zip((model.train(), by_hand), inputs, strict=True):
        net(values).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-12)
    assert inputs[0].grad is not None
    assert inputs[0].grad.abs().sum() > 0
    expected = dict(by_hand.named_parameters())
    norms = {id(p) for layer in batch_norm_layers(model).values() for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if affine and id(parameter) in norms:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-11)


def test_gradients_of_a_frozen_layer_are_numerically_right() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3).double())
    freeze_batch_norm(layer, affine=False)
    x = images(2, size=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer.train(), (x,))


def test_a_network_with_every_batch_norm_frozen_still_learns() -> None:
    model = network()
    freeze_batch_norm(model)
    before = norm_bits(model)
    x, target = images(16), torch.linspace(-1, 1, 32).view(16, 2)
    stepper = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        stepper.zero_grad()
        loss = (model.train()(x) - target).square().mean()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert norm_bits(model) == before


def test_earlier_layers_learn_through_a_frozen_one() -> None:
    model = network()
    freeze_batch_norm(model)
    before = bits(model.conv1.weight)
    train(model)
    assert bits(model.conv1.weight) != before


# --- the two switches --------------------------------------------------------------------------------------------


def test_freezing_statistics_alone_leaves_the_parameters_training() -> None:
    model = network()
    freeze_batch_norm(model, affine=False)
    assert all(grads(model))
    layer = model.layer1[0].bn1
    statistics, weight = (bits(layer.running_mean), bits(layer.running_var)), bits(layer.weight)
    train(model)
    assert (bits(layer.running_mean), bits(layer.running_var)) == statistics
    assert bits(layer.weight) != weight


def test_freezing_affine_alone_leaves_the_statistics_moving() -> None:
    model = network()
    freeze_batch_norm(model, stats=False)
    layer = model.layer1[0].bn1
    assert layer.training
    assert not is_frozen(layer)
    mean, weight, bias = bits(layer.running_mean), bits(layer.weight), bits(layer.bias)
    train(model, optimizer=sgd)
    assert bits(layer.running_mean) != mean
    assert (bits(layer.weight), bits(layer.bias)) == (weight, bias)


@pytest.mark.parametrize("affine", [True, False])
def test_only_batch_norm_is_frozen(affine: bool) -> None:
    model = network()
    freeze_batch_norm(model, affine=affine)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "bn" not in name)


STATS, AFFINE = {"stats": True, "affine": False}, {"stats": False, "affine": True}


@pytest.mark.parametrize("found_training", [True, False])
@pytest.mark.parametrize("found_grad", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("first", [STATS, AFFINE], ids=["stats_first", "affine_first"])
@pytest.mark.parametrize("back_first", [STATS, AFFINE], ids=["stats_back_first", "affine_back_first"])
def test_the_switches_are_independent_in_every_order(
    found_training: bool, found_grad: tuple[bool, bool], first: dict[str, bool], back_first: dict[str, bool]
) -> None:
    layer = fill_statistics(nn.BatchNorm2d(3)).train(found_training)
    layer.weight.requires_grad_(found_grad[0])
    layer.bias.requires_grad_(found_grad[1])

    def check(stats: bool, affine: bool) -> None:
        assert is_frozen(layer) is stats
        assert layer.training is (False if stats else found_training)
        expected = (False, False) if affine else found_grad
        assert (layer.weight.requires_grad, layer.bias.requires_grad) == expected

    second = AFFINE if first is STATS else STATS
    back_second = AFFINE if back_first is STATS else STATS
    state = {"stats": False, "affine": False}
    for call, which in (
        (freeze_batch_norm, first),
        (freeze_batch_norm, second),
        (unfreeze_batch_norm, back_first),
        (unfreeze_batch_norm, back_second),
    ):
        call(layer, **which)  # type: ignore[operator]
        for switch, used in which.items():
            if used:
                state[switch] = call is freeze_batch_norm
        check(**state)


OPERATIONS = st.tuples(st.sampled_from(["freeze", "unfreeze"]), st.booleans(), st.booleans()).filter(
    lambda operation: operation[1] or operation[2]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(OPERATIONS, max_size=8), st.booleans(), st.booleans(), st.booleans())
def test_any_sequence_of_freezing_and_unfreezing_ends_where_a_simple_model_ends(
    operations: list[tuple[str, bool, bool]], training: bool, weight: bool, bias: bool
) -> None:
    layer = fill_statistics(nn.BatchNorm2d(3)).train(training)
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    before = state_bits(layer)
    stats_frozen = affine_frozen = False
    for verb, stats, affine in operations:
        (freeze_batch_norm if verb == "freeze" else unfreeze_batch_norm)(layer, stats=stats, affine=affine)
        stats_frozen = (verb == "freeze") if stats else stats_frozen
        affine_frozen = (verb == "freeze") if affine else affine_frozen
        assert is_frozen(layer) is stats_frozen
        assert layer.training is (training and not stats_frozen)
        assert layer.weight.requires_grad is (weight and not affine_frozen)
        assert layer.bias.requires_grad is (bias and not affine_frozen)
    unfreeze_batch_norm(layer)
    assert (layer.training, layer.weight.requires_grad, layer.bias.requires_grad) == (training, weight, bias)
    assert type(layer) is nn.BatchNorm2d
    assert state_bits(layer) == before


def test_freezing_twice_is_freezing_once() -> None:
    model = network()
    found, found_grads = modes(model), grads(model)
    first = freeze_batch_norm(model)
    frozen, kinds = (modes(model), grads(model)), [type(module) for module in model.modules()]
    assert freeze_batch_norm(model) == first
    assert (modes(model), grads(model)) == frozen
    assert [type(module) for module in model.modules()] == kinds
    unfreeze_batch_norm(model)
    assert (modes(model), grads(model)) == (found, found_grads)
    assert not any(map(is_frozen, model.modules()))


# --- giving back -------------------------------------------------------------------------------------------------


def test_unfreezing_brings_back_modes_and_requires_grad_as_found() -> None:
    model = network()
    model.layer1[0].bn1.eval()
    model.layer2.eval()
    model.layer1[1].bn1.weight.requires_grad_(False)
    model.head.bn.requires_grad_(False)
    found, found_grads = modes(model), grads(model)
    freeze_batch_norm(model)
    unfreeze_batch_norm(model)
    assert modes(model) == found
    assert grads(model) == found_grads


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_unfreezing_gives_the_mode_that_was_last_asked_for(found: bool, asked: bool) -> None:
    layer = fill_statistics(nn.BatchNorm2d(3)).train(found)
    freeze_batch_norm(layer)
    layer.train(asked)
    unfreeze_batch_norm(layer)
    assert layer.training is asked


def test_an_unfrozen_layer_is_an_ordinary_layer_again() -> None:
    model, twin = network(), network()
    freeze_batch_norm(model)
    unfreeze_batch_norm(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in twin.modules()]
    assert [sorted(vars(module)) for module in model.modules()] == [sorted(vars(module)) for module in twin.modules()]
    train(model, optimizer=sgd)
    train(twin, optimizer=sgd)
    assert state_bits(model) == state_bits(twin)


def test_unfreezing_a_part_leaves_the_rest_frozen() -> None:
    model = network()
    freeze_batch_norm(model)
    assert unfreeze_batch_norm(model, "layer1", exclude="layer1.0") == ("layer1.1.bn1", "layer1.1.bn2")
    frozen = {name for name, layer in batch_norm_layers(model).items() if is_frozen(layer)}
    assert frozen == set(SMALL_RESNET_NAMES) - {"layer1.1.bn1", "layer1.1.bn2"}
    assert model.layer1[1].bn1.weight.requires_grad
    assert not model.layer1[0].bn1.weight.requires_grad


def test_unfreezing_what_was_never_frozen_changes_nothing() -> None:
    model = network()
    model.layer1.eval()
    model.layer2.requires_grad_(False)
    found, found_grads, before = modes(model), grads(model), state_bits(model)
    unfreeze_batch_norm(model)
    assert (modes(model), grads(model), state_bits(model)) == (found, found_grads, before)


def test_a_layer_put_in_eval_by_hand_is_not_frozen() -> None:
    layer = nn.BatchNorm2d(3).eval().requires_grad_(False)
    assert not is_frozen(layer)
    assert not is_frozen(nn.Linear(2, 2))


@pytest.mark.parametrize("first", ["one", "other"])
def test_a_layer_of_two_owners_stays_frozen_until_both_release_it(first: str) -> None:
    model = network()
    found, layers = everything(model), batch_norm_layers(model, "layer1.0.bn1")
    layer = layers["layer1.0.bn1"]
    for owner in ("one", "other"):
        freeze_layers(layers, stats=True, affine=True, owner=owner)
    held = everything(model)
    unfreeze_batch_norm(model)  # a third, who owns nothing
    assert everything(model) == held
    unfreeze_layers(layers, stats=True, affine=True, owner=first)
    assert everything(model) == held
    assert is_frozen(layer.train())
    assert not layer.weight.requires_grad
    unfreeze_layers(layers, stats=True, affine=True, owner="other" if first == "one" else "one")
    assert everything(model) == found


# --- the context manager -----------------------------------------------------------------------------------------


def everything(model: nn.Module) -> tuple[object, ...]:
    return modes(model), grads(model), [type(module) for module in model.modules()], state_bits(model)


def test_inside_the_block_the_layers_are_frozen_and_afterwards_as_before() -> None:
    model = network()
    model.layer1[0].bn1.eval()
    model.layer1[1].bn2.weight.requires_grad_(False)
    before = everything(model)
    with frozen_batch_norm(model, "layer1") as names:
        assert tuple(names) == LAYER1
        assert all(is_frozen(layer) for layer in batch_norm_layers(model, "layer1").values())
        assert not is_frozen(model.layer2[0].bn1)
        assert not model.layer1[0].bn1.weight.requires_grad
        held = norm_bits(model, LAYER1)
        model.layer1.train()
        with torch.no_grad():
            model.layer1(torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(0)))
        assert norm_bits(model, LAYER1) == held
    assert everything(model) == before


def test_after_an_exception_everything_is_as_before() -> None:
    model = network()
    model.layer2.eval()
    before = everything(model)
    with pytest.raises(RuntimeError, match="stop"), frozen_batch_norm(model):
        raise RuntimeError("stop")
    assert everything(model) == before


def test_nested_blocks_give_back_one_after_the_other() -> None:
    model = network()
    start = everything(model)
    with frozen_batch_norm(model, "layer1", affine=False):
        outer = everything(model)
        with frozen_batch_norm(model, affine=True):
            assert all(is_frozen(layer) for layer in batch_norm_layers(model).values())
            with frozen_batch_norm(model, "layer1", stats=False):
                pass
            assert not model.layer1[0].bn1.weight.requires_grad
        assert everything(model) == outer
        assert model.layer1[0].bn1.weight.requires_grad
    assert everything(model) == start


@pytest.mark.parametrize("already", [STATS, AFFINE, {}], ids=["stats", "affine", "both"])
@pytest.mark.parametrize("inside", [STATS, AFFINE, {}], ids=["stats", "affine", "both"])
def test_a_layer_that_was_frozen_already_stays_so(already: dict[str, bool], inside: dict[str, bool]) -> None:
    model = network()
    model.layer1[0].bn2.eval()
    found = everything(model)
    freeze_batch_norm(model, "layer1.0", **already)  # type: ignore[arg-type]
    before = everything(model)
    with frozen_batch_norm(model, "layer1", **inside):  # type: ignore[arg-type]
        pass
    assert everything(model) == before
    assert is_frozen(model.layer1[0].bn1) is (already is not AFFINE)
    unfreeze_batch_norm(model)
    assert everything(model) == found


def test_a_layer_unfrozen_inside_the_block_is_frozen_again_after_it() -> None:
    model = network()
    freeze_batch_norm(model, "layer1.0.bn1")
    before = everything(model)
    with frozen_batch_norm(model, "layer1"):
        unfreeze_batch_norm(model)
        assert not is_frozen(model.layer1[0].bn1)
    assert everything(model) == before
    assert is_frozen(model.layer1[0].bn1.train())
    unfreeze_batch_norm(model)
    assert model.layer1[0].bn1.training


def test_modes_changed_inside_the_block_come_back() -> None:
    model = network()
    model.layer1[0].bn1.eval()
    found = {name: layer.training for name, layer in batch_norm_layers(model).items()}
    with frozen_batch_norm(model, "layer1"):
        model.layer1.eval()
    after = {name: layer.training for name, layer in batch_norm_layers(model).items()}
    assert after == found


def test_a_context_that_cannot_freeze_changes_nothing() -> None:
    model = network()
    before = everything(model)
    with pytest.raises(SelectionError), frozen_batch_norm(model, "nowhere"):
        pass
    assert everything(model) == before


# --- copies and files --------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, pickled, torch_saved])


@COPIES
@pytest.mark.parametrize("kind", [SmallResNet, lambda: nn.Sequential(BatchNormAct2d(3))], ids=["resnet", "subclass"])
def test_a_copy_of_a_frozen_model_is_frozen(
    copied: Callable[[nn.Module], nn.Module], kind: Callable[[], nn.Module]
) -> None:
    model = fill_statistics(kind())
    freeze_batch_norm(model)
    other = copied(model)
    assert state_bits(other) == state_bits(model)
    other.train()
    layers = batch_norm_layers(other)
    assert list(layers) == list(batch_norm_layers(model))
    assert all(is_frozen(layer) and not layer.training for layer in layers.values())
    assert not any(p.requires_grad for layer in layers.values() for p in layer.parameters())
    before = norm_bits(other)
    other(images())
    assert norm_bits(other) == before
    assert torch.equal(other.eval()(images()), model.eval()(images()))


@COPIES
def test_a_copy_can_be_unfrozen_and_its_original_stays_frozen(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    model.layer1[0].bn1.eval()
    model.layer1[0].bn2.bias.requires_grad_(False)
    found = everything(model)
    freeze_batch_norm(model)
    frozen = everything(model)
    other = copied(model)
    unfreeze_batch_norm(other)
    assert everything(other) == found
    assert everything(model) == frozen
    assert all(is_frozen(layer) for layer in batch_norm_layers(model).values())
    third = copied(model)
    unfreeze_batch_norm(model)
    assert everything(model) == found
    assert all(is_frozen(layer) for layer in batch_norm_layers(third).values())


@COPIES
def test_an_unfrozen_layer_leaves_no_trace_in_its_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    freeze_batch_norm(model)
    unfreeze_batch_norm(model)
    other = copied(model)
    assert everything(other) == everything(model)
    assert not any(map(is_frozen, other.modules()))


def test_a_single_frozen_layer_can_be_copied() -> None:
    layer = fill_statistics(nn.BatchNorm1d(3))
    freeze_batch_norm(layer)
    for copied in (copy.deepcopy, pickled, torch_saved):
        other = copied(layer)
        assert is_frozen(other)
        assert other.train().training is False
        assert isinstance(other, nn.BatchNorm1d)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_works(protocol: int) -> None:
    model = network()
    freeze_batch_norm(model)
    other = pickle.loads(pickle.dumps(model, protocol=protocol))
    assert all(is_frozen(layer) for layer in batch_norm_layers(other.train()).values())


def test_a_frozen_model_is_frozen_in_a_new_process(tmp_path: Path) -> None:
    model = fill_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    model[2].eval()
    freeze_batch_norm(model)
    torch.save(model, tmp_path / "model.pt")
    program = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
model[0:2].train()
assert [layer.training for layer in model] == [True, False, False]
before = model[1].running_mean.clone()
model(torch.randn(4, 3, 5, 5))
assert torch.equal(model[1].running_mean, before)
from lightning_bn.functional import is_frozen, unfreeze_batch_norm
assert is_frozen(model[1]) and isinstance(model[1], torch.nn.BatchNorm2d)
unfreeze_batch_norm(model)
assert [layer.training for layer in model[1:]] == [True, False]
assert all(p.requires_grad for p in model.parameters())
print("as frozen as it was")
"""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "as frozen as it was", done.stderr


def test_the_state_dict_has_the_same_keys_and_values_as_before() -> None:
    model = network()
    before = {name: bits(value) for name, value in model.state_dict().items()}
    freeze_batch_norm(model)
    after = {name: bits(value) for name, value in model.state_dict().items()}
    assert list(after) == list(before)
    assert after == before
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in network().named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in network().named_buffers()]


def test_state_dicts_go_between_frozen_and_ordinary_models(tmp_path: Path) -> None:
    frozen, plain = network(), fill_statistics(SmallResNet(), seed=5)
    freeze_batch_norm(frozen)
    torch.save(frozen.state_dict(), tmp_path / "weights.pt")
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    assert state_bits(plain) == state_bits(frozen)
    assert not any(map(is_frozen, plain.modules()))
    assert plain.bn1.training
    assert plain.bn1.weight.requires_grad


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_leaves_a_layer_frozen(assign: bool) -> None:
    model, other = network(), fill_statistics(SmallResNet(), seed=5)
    freeze_batch_norm(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), strict=True, assign=assign)
    assert state_bits(model) == state_bits(other)
    model.train()
    assert all(is_frozen(layer) and not layer.training for layer in batch_norm_layers(model).values())
    before = norm_bits(model)
    train(model, optimizer=sgd)
    assert norm_bits(model) == before


def test_the_buffers_and_parameters_are_the_same_objects() -> None:
    model = network()
    before = [id(tensor) for tensor in itertools.chain(model.parameters(), model.buffers(), model.modules())]
    freeze_batch_norm(model)
    assert before == [id(tensor) for tensor in itertools.chain(model.parameters(), model.buffers(), model.modules())]
    unfreeze_batch_norm(model)
    assert before == [id(tensor) for tensor in itertools.chain(model.parameters(), model.buffers(), model.modules())]


def test_a_change_of_dtype_leaves_a_layer_frozen() -> None:
    model = network()
    freeze_batch_norm(model)
    model.double().train()
    before = norm_bits(model)
    train(model, optimizer=sgd)
    assert norm_bits(model) == before


# --- types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d])
def test_a_frozen_layer_keeps_its_type(kind: type[nn.Module]) -> None:
    layer = fill_statistics(kind(3))  # type: ignore[call-arg]
    shown = repr(layer)
    freeze_batch_norm(layer)
    assert isinstance(layer, kind)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert list(batch_norm_layers(nn.Sequential(layer)).values()) == [layer]
    assert kind.__name__ in repr(layer)
    unfreeze_batch_norm(layer)
    assert type(layer) is kind
    assert repr(layer) == shown


def test_frozen_layers_of_one_kind_are_of_one_type() -> None:
    layers = [fill_statistics(nn.BatchNorm2d(3)) for _ in range(3)]
    for layer in layers:
        freeze_batch_norm(layer)
    assert len({type(layer) for layer in layers}) == 1


def test_a_subclass_with_an_activation_inside_works_when_frozen() -> None:
    layer = fill_statistics(BatchNormAct2d(3)).double()
    x = images(dtype=torch.float64)
    expected = copy.deepcopy(layer).eval()(x)
    assert expected.min() == 0  # the activation is at work
    before = state_bits(layer)
    freeze_batch_norm(layer)
    torch.testing.assert_close(layer.train()(x), expected, rtol=1e-12, atol=1e-12)
    assert state_bits(layer) == before
    assert layer.act.training  # what is inside is not BatchNorm and follows .train()


class NoisyTrain(nn.BatchNorm2d):
    """A subclass with a `train` of its own and an argument its constructor cannot do without."""

    def __init__(self, channels: int, *, calls: list[bool]) -> None:
        super().__init__(channels)
        self.calls = calls

    def train(self, mode: bool = True) -> "NoisyTrain":
        if hasattr(self, "calls"):
            self.calls.append(mode)
        super().train(mode)
        return self


def test_a_subclass_with_a_train_and_a_constructor_of_its_own_can_be_frozen() -> None:
    layer = fill_statistics(NoisyTrain(3, calls=[]))
    freeze_batch_norm(layer)
    assert layer.train().training is False
    other = pickled(copy.deepcopy(layer))
    assert is_frozen(other)
    assert other.train().training is False
    unfreeze_batch_norm(layer)
    assert type(layer) is NoisyTrain
    assert layer.training


def test_another_tool_that_swaps_the_class_of_a_frozen_layer_does_not_confuse_unfreezing() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    freeze_batch_norm(layer)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    assert layer.train().training is False
    unfreeze_batch_norm(layer)
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.train().training is True
    before = bits(layer.running_mean)
    layer(images())
    assert bits(layer.running_mean) != before


def test_a_frozen_layer_is_still_a_leaf_to_a_tracer() -> None:
    model = fill_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    freeze_batch_norm(model)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    before = norm_bits(model)
    torch.testing.assert_close(traced.train()(images()), model.eval()(images()))
    assert norm_bits(model) == before


def test_a_sync_batch_norm_is_frozen_like_any_other() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    expected = copy.deepcopy(model).eval()(images())
    freeze_batch_norm(model)
    before = norm_bits(model)
    torch.testing.assert_close(model.train()(images()), expected)
    assert norm_bits(model) == before


# --- wrappers and shared layers ----------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> object:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_can_be_frozen_and_unfrozen() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    compiled(images())  # compiled with layers that move
    assert freeze_batch_norm(compiled, "layer1") == LAYER1  # type: ignore[arg-type]
    before = norm_bits(model, LAYER1)
    train(compiled, optimizer=sgd)  # type: ignore[arg-type]
    assert norm_bits(model, LAYER1) == before
    torch.testing.assert_close(compiled(images()), copy.deepcopy(model)(images()))
    unfreeze_batch_norm(compiled)  # type: ignore[arg-type]
    compiled(images())
    after = norm_bits(model, LAYER1)
    assert after["layer1.0.bn1.running_mean"] != before["layer1.0.bn1.running_mean"]


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_frozen_model_can_be_compiled() -> None:
    model = network()
    freeze_batch_norm(model)
    before = norm_bits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    train(compiled, optimizer=sgd)  # type: ignore[arg-type]
    assert norm_bits(model) == before


@pytest.mark.usefixtures("_fresh_compiler")
def test_freezing_a_compiled_network_of_many_layers_stays_compiled() -> None:
    model = fill_statistics(nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(12)]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # raises where the recompile limit is reached
    compiled(images())
    freeze_batch_norm(model)
    compiled(images())
    before = norm_bits(model)
    compiled.train()
    compiled(images())
    assert norm_bits(model) == before


@pytest.mark.parametrize(
    "wrapped",
    [
        nn.DataParallel,
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
    ids=["data_parallel", "compiled_inside", "compiled_outside"],
)
@pytest.mark.usefixtures("_fresh_compiler")
def test_layers_inside_a_wrapper_are_frozen(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    inner = network()
    model = wrapped(inner)
    assert freeze_batch_norm(model, "layer1") == LAYER1
    before = norm_bits(inner, LAYER1)
    train(model, optimizer=sgd)
    assert norm_bits(inner, LAYER1) == before
    unfreeze_batch_norm(model, "layer1")
    assert all(modes(inner.train()))


@pytest.mark.parametrize("pattern", ["first", "second.norm"])
def test_a_shared_layer_is_frozen_under_either_name(pattern: str) -> None:
    model = warmed(seeded(SharedNorm))
    assert freeze_batch_norm(model, pattern) == ("first.norm",)
    shared = model.first["norm"]
    before, own = state_bits(shared), state_bits(model.own)
    train(model, optimizer=sgd)
    assert is_frozen(model.second["norm"])
    assert state_bits(shared) == before
    assert state_bits(model.own) != own
    other = pickled(model)
    assert other.first["norm"] is other.second["norm"]
    unfreeze_batch_norm(model, pattern)
    assert model.train().first["norm"].training
    assert shared.weight.requires_grad


def sharing_their_weight() -> nn.Sequential:
    """Statistics per domain, one weight for all: what domain-specific BatchNorm often is."""
    model = fill_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    model[1].weight = model[0].weight
    return model  # type: ignore[return-value]


def test_a_parameter_shared_by_two_layers_comes_back_as_found() -> None:
    model = sharing_their_weight()
    freeze_batch_norm(model)
    assert not any(grads(model))
    unfreeze_batch_norm(model)
    assert all(grads(model))


def test_a_parameter_shared_by_two_layers_comes_back_as_found_from_a_context() -> None:
    model = sharing_their_weight()
    with frozen_batch_norm(model):
        assert not any(grads(model))
    assert all(grads(model))


def test_a_parameter_shared_by_two_layers_comes_back_as_found_when_they_were_frozen_one_by_one() -> None:
    model = sharing_their_weight()
    freeze_batch_norm(model, "0")
    freeze_batch_norm(model, "1")
    unfreeze_batch_norm(model)
    assert all(grads(model))


def test_selection_speaks_the_one_grammar() -> None:
    model = Holder(network())
    assert freeze_batch_norm(model, ["layer1.*.bn1", "head"], exclude="layer1.0", root="model") == (
        "model.layer1.1.bn1",
        "model.head.bn",
    )
    assert unfreeze_batch_norm(model, "re:head.*", root="model") == ("model.head.bn",)
    with frozen_batch_norm(model, exclude="layer*", root="model") as names:
        assert tuple(names) == ("model.bn1", "model.head.bn")


# --- what is said ------------------------------------------------------------------------------------------------


def test_freezing_initial_statistics_is_warned_of_by_name() -> None:
    model = nn.ModuleDict({"new": nn.BatchNorm2d(3), "used": fill_statistics(nn.BatchNorm2d(3))})
    with pytest.warns(UserWarning, match="new") as caught:
        freeze_batch_norm(model)
    assert len(caught) == 1
    assert "used" not in str(caught[0].message)
    assert all(map(is_frozen, model.values()))


def test_a_model_of_many_new_layers_gives_one_warning() -> None:
    with pytest.warns(UserWarning, match="bn1") as caught:
        freeze_batch_norm(SmallResNet())
    assert len(caught) == 1
    assert "10" in str(caught[0].message)


@pytest.mark.parametrize("found", ["trained", "loaded", "affine_only", "frozen_already"])
def test_there_is_no_warning_where_there_is_nothing_to_say(found: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    if found == "trained":
        model(images())
    elif found == "loaded":  # statistics of a converted checkpoint that never counted
        model[0].running_mean.fill_(0.5)
    elif found == "frozen_already":
        with pytest.warns(UserWarning, match="0"):
            freeze_batch_norm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if found != "frozen_already":
            freeze_batch_norm(model, stats=found != "affine_only")
        unfreeze_batch_norm(model)


@pytest.mark.parametrize("modules", ["untracked", ["kept", "untracked"], None])
@pytest.mark.parametrize("call", [freeze_batch_norm, lambda *args: frozen_batch_norm(*args).__enter__()])
def test_a_layer_without_running_statistics_is_an_error_and_nothing_is_frozen(
    modules: object, call: Callable[..., object]
) -> None:
    model = nn.ModuleDict({"kept": nn.BatchNorm2d(3), "untracked": nn.BatchNorm2d(3, track_running_stats=False)})
    before = everything(model)
    with pytest.raises(SelectionError, match="untracked"):
        call(model, modules)
    assert everything(model) == before
    assert not any(map(is_frozen, model.modules()))


def test_affine_of_a_layer_without_running_statistics_can_be_frozen() -> None:
    model = nn.ModuleDict({"untracked": nn.BatchNorm2d(3, track_running_stats=False)})
    assert freeze_batch_norm(model, stats=False) == ("untracked",)
    assert not any(grads(model))
    unfreeze_batch_norm(model, stats=False)
    assert all(grads(model))


def test_a_layer_without_parameters_can_be_frozen() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3, affine=False))
    freeze_batch_norm(layer)
    before = state_bits(layer)
    layer.train()(images())
    assert state_bits(layer) == before
    unfreeze_batch_norm(layer)
    assert layer.training


def test_a_layer_whose_flag_was_switched_off_is_frozen_too() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    layer.track_running_stats = False
    freeze_batch_norm(layer)
    expected = copy.deepcopy(layer).eval()(images())
    torch.testing.assert_close(layer.train()(images()), expected)
    unfreeze_batch_norm(layer)
    assert layer.track_running_stats is False


@pytest.mark.parametrize("call", [freeze_batch_norm, unfreeze_batch_norm])
def test_a_pattern_that_matches_nothing_is_an_error_and_nothing_is_changed(call: Callable[..., object]) -> None:
    model = network()
    before = everything(model)
    with pytest.raises(SelectionError, match="layr1"):
        call(model, ["bn1", "layr1"])
    assert everything(model) == before


def test_an_uninitialized_lazy_layer_cannot_be_frozen_by_its_statistics() -> None:
    model = nn.ModuleDict({"lazy": nn.LazyBatchNorm2d(), "plain": fill_statistics(nn.BatchNorm2d(3))})
    with pytest.raises(SelectionError, match="lazy"):
        freeze_batch_norm(model)
    assert not is_frozen(model["plain"])


def test_freezing_leaves_the_random_state_alone() -> None:
    model = network()
    before = torch.random.get_rng_state()
    freeze_batch_norm(model)
    unfreeze_batch_norm(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_frozen_layer_can_be_read_where_gradients_are_off() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3))
    freeze_batch_norm(layer)
    before: Tensor = layer(images()).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(layer.train()(images()), before)


def test_unfrozen_layers_are_fused_by_torch_as_those_that_never_were_frozen():
    net = fill_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    expected = net(images(4))
    freeze_batch_norm(net)
    with pytest.raises(AssertionError, match="fuser method"):
        fuse_modules(net, ["0", "1"])
    unfreeze_batch_norm(net)
    fused = fuse_modules(net, ["0", "1"])
    assert isinstance(fused[1], nn.Identity)
    assert torch.allclose(fused(images(4)), expected, atol=1e-5)
