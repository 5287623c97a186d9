"""Gradients of affine parameters: blocked in one forward, dropped before a step, never touched elsewhere."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bn.functional.freezing.gradients import blocked_gradients, drop_gradients, drop_zero_gradients
from lightning_bn.functional.freezing.shadow_statistics import shadow_statistics
from lightning_bn.functional.layers.exchange import Entries, ExchangeError, exchanged, holders_of
from tests.models import BatchNormAct2d, fill_statistics, seeded, state_bits


class TwoNorms(nn.Module):
    """Two BatchNorm layers around convolutions; input (N, 3, 4, 4), output (N, 2)."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first, self.held = norm(3), norm(4)
        self.conv = nn.Conv2d(3, 4, 1)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.held(self.conv(self.first(x))).mean((2, 3)))


def model(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> TwoNorms:
    return fill_statistics(seeded(lambda: TwoNorms(norm))).double()  # type: ignore[return-value]


def images(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, 4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def backward(net: nn.Module, seed: int = 0) -> dict[str, Tensor | None]:
    net.zero_grad()
    net(images(seed)).square().sum().backward()
    return gradients(net)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_with_blocked_gradients_is_the_same_and_all_other_gradients_are_too(
    norm: Any, training: bool
) -> None:
    net = model(norm).train(training)
    expected_net = copy.deepcopy(net)
    expected, output = backward(expected_net), copy.deepcopy(net)(images())
    with blocked_gradients({"held": net.held}):
        result = net(images())
    result.square().sum().backward()
    assert torch.equal(result, output)
    for name, gradient in gradients(net).items():
        assert gradient is not None, name
        assert torch.equal(gradient, torch.zeros_like(gradient) if "held" in name else expected[name]), name
    assert state_bits(net) == state_bits(expected_net)


def test_the_parameters_come_back_as_the_objects_they_were() -> None:
    net = model()
    before = {name: id(p) for name, p in net.named_parameters()}
    with blocked_gradients({"first": net.first, "held": net.held}):
        assert not isinstance(net.held._parameters["weight"], nn.Parameter)
    assert {name: id(p) for name, p in net.named_parameters()} == before
    assert all(isinstance(p, nn.Parameter) for p in net.held._parameters.values())


def test_what_went_before_and_what_comes_after_in_one_backward_is_not_changed() -> None:
    net = model().eval()
    alone = [backward(net, seed) for seed in (1, 2, 3)]
    net.zero_grad()
    before = net(images(1)).square().sum()
    with blocked_gradients({"held": net.held}):
        inside = net(images(2)).square().sum()
    (before + inside + net(images(3)).square().sum()).backward()
    for name, gradient in gradients(net).items():
        parts = [one[name] for one in (alone if "held" not in name else (alone[0], alone[2]))]
        torch.testing.assert_close(gradient, sum(parts), rtol=1e-12, atol=0)  # type: ignore[arg-type]


def test_a_second_backward_through_what_was_blocked_adds_nothing_either() -> None:
    net = model().eval()
    with blocked_gradients({"held": net.held}):
        loss = net(images()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert net.held.weight.grad is not None
    assert not net.held.weight.grad.any()


def test_parameters_that_need_no_gradient_or_do_not_exist_are_left_alone() -> None:
    net = model(lambda channels: nn.BatchNorm2d(channels, affine=False))
    with blocked_gradients({"held": net.held}):
        pass
    net = model()
    net.held.weight.requires_grad_(False)
    with blocked_gradients({"held": net.held}):
        assert net.held.weight.is_leaf
        net(images()).sum().backward()
    assert net.held.weight.grad is None


def test_a_parameter_shared_by_two_layers_still_learns_through_the_other_one() -> None:
    net = fill_statistics(seeded(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)))).eval()
    net[2].weight = net[0].weight
    x = torch.randn(6, 3)
    # The same through other objects, so that each use has a gradient of its own.
    apart = copy.deepcopy(net)
    apart[2].weight = nn.Parameter(apart[0].weight.detach().clone())
    apart(x).square().sum().backward()
    with blocked_gradients({"2": net[2]}):
        loss = net(x).square().sum()
    loss.backward()
    torch.testing.assert_close(net[0].weight.grad, apart[0].weight.grad)


def test_it_works_where_gradients_are_switched_off_and_while_recording_nothing() -> None:
    net = model().eval()
    expected = net(images())
    with torch.no_grad(), blocked_gradients({"held": net.held}):
        assert torch.equal(net(images()), expected)
    assert net.held.weight.is_leaf


def test_numerical_gradients_agree_for_everything_else() -> None:
    net = model().eval()
    x = images().requires_grad_()
    with blocked_gradients({"held": net.held}):
        assert torch.autograd.gradcheck(net, (x,))


# dropping


def test_dropping_takes_the_gradients_of_the_layers_and_of_nothing_else() -> None:
    net = model()
    expected = backward(net)
    drop_gradients(net.held.parameters())
    for name, gradient in gradients(net).items():
        assert gradient is None if "held" in name else torch.equal(gradient, expected[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_skips_a_parameter_whose_gradient_was_dropped_and_moves_one_of_zeros(optimizer: Any) -> None:
    for drop in (True, False):
        net = model()
        stepping = optimizer(net.parameters(), lr=0.1, weight_decay=0.1)
        backward(net)
        net.held.weight.grad.zero_()  # type: ignore[union-attr]
        before = net.held.weight.detach().clone()
        if drop:
            drop_zero_gradients(net.held.parameters())
        stepping.step()
        assert torch.equal(net.held.weight, before) == drop


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from(["none", "zeros", "negative zeros", "one value", "all", "nan"]), min_size=4, max_size=4)
)
def test_only_gradients_that_are_zero_throughout_are_dropped(kinds: list[str]) -> None:
    net = model()
    parameters = [net.first.weight, net.first.bias, net.held.weight, net.held.bias]
    for parameter, kind in zip(parameters, kinds, strict=True):
        parameter.grad = {
            "none": None,
            "zeros": torch.zeros_like(parameter),
            "negative zeros": -torch.zeros_like(parameter),
            "one value": torch.zeros_like(parameter).index_fill_(0, torch.tensor([1]), 1e-300),
            "all": torch.ones_like(parameter),
            "nan": torch.full_like(parameter, float("nan")),
        }[kind]
    drop_zero_gradients(parameters)
    assert [p.grad is None for p in parameters] == ["none" in kind or "zeros" in kind for kind in kinds]


def test_dropping_where_there_is_nothing_is_no_error() -> None:
    for drop in (drop_gradients, drop_zero_gradients):
        drop([])
        drop(model().parameters())


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_while_it_is_blocked_reach_the_forwards_that_follow(steps: int) -> None:
    net, expected = model(), model()
    own = list(net.held.parameters())
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9) for module in (net, expected)]
    with blocked_gradients({"held": net.held}):
        for module, stepping in zip((net, expected), optimizers, strict=True):
            held = own if module is net else list(module.held.parameters())
            for seed in range(steps):
                stepping.zero_grad()
                module(images(seed)).square().sum().backward()
                drop_gradients(held)
                stepping.step()
                with torch.no_grad():
                    held[1].add_(1)  # another writer
    assert state_bits(net) == state_bits(expected)


def test_a_block_nests_around_another_and_inside_a_shadow_and_what_was_first_is_there_again() -> None:
    net = model().eval()
    objects = {name: id(value) for name, value in (*net.named_parameters(), *net.named_buffers())}
    layers = {"held": net.held}
    with shadow_statistics(layers) as changes, blocked_gradients(layers):
        with blocked_gradients(layers):
            loss = net(images()).square().sum()
        assert holders_of(net.held) == ("shadow_statistics", "blocked_gradients")
    loss.backward()
    assert changes == []
    assert net.held.weight.grad is not None
    assert not net.held.weight.grad.any()
    assert {name: id(value) for name, value in (*net.named_parameters(), *net.named_buffers())} == objects
    assert holders_of(net.held) == ()


def test_a_block_that_is_taken_out_before_what_lies_on_top_is_an_error_that_names_both() -> None:
    net = model().eval()
    own, other = net.held.weight, torch.ones_like(net.held.weight)
    entries = [Entries("held", net.held, parameters={"weight": other})]
    below, above = blocked_gradients({"held": net.held}), exchanged("somebody", entries)
    below.__enter__()
    above.__enter__()
    with pytest.raises(ExchangeError, match=r"layer 'held'.*'blocked_gradients'.*'somebody' put something on top"):
        below.__exit__(None, None, None)
    assert holders_of(net.held) == ("blocked_gradients", "somebody")
    assert net.held.weight is other
    above.__exit__(None, None, None)
    assert net.held.weight is not own
    assert holders_of(net.held) == ("blocked_gradients",)
