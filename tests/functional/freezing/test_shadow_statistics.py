"""Statistics lent for a while: a backward reads what its forward used, and writes to the copies have no effect."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_bn.functional.freezing.shadow_statistics import LentStatistics
from tests.models import bits, fill_statistics, state_bits

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def layer(**arguments: bool) -> nn.BatchNorm1d:
    return fill_statistics(nn.Sequential(nn.BatchNorm1d(3, **arguments)))[0].eval()  # type: ignore[index]


def test_the_same_tensors_come_back_with_the_same_bits() -> None:
    norm = layer()
    before, tensors = state_bits(norm), {name: id(buffer) for name, buffer in norm.named_buffers()}
    lent = LentStatistics({"norm": norm})
    assert state_bits(norm) == before
    assert all(id(buffer) != tensors[name] for name, buffer in norm.named_buffers())
    assert lent.take_back() == []
    assert state_bits(norm) == before
    assert {name: id(buffer) for name, buffer in norm.named_buffers()} == tensors


def test_a_backward_reads_what_its_forward_used_though_the_layer_trained_in_between() -> None:
    x, other = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    weights = torch.randn(8, 3)
    norm = layer()
    (expected,) = torch.autograd.grad((norm(x) * weights).sum(), x)

    def in_between(lend: bool) -> torch.Tensor:
        norm = layer()
        lent = LentStatistics({"norm": norm} if lend else {})
        loss = (norm(x) * weights).sum()
        lent.take_back()
        norm.train()(5 * other)
        (gradient,) = torch.autograd.grad(loss, x)
        return gradient

    assert torch.equal(in_between(lend=True), expected)
    # Why it is needed: torch reads the running statistics again, and moves them unseen.
    assert not torch.equal(in_between(lend=False), expected)


def write(norm: nn.BatchNorm1d) -> None:
    norm.running_mean.add_(2)  # type: ignore[union-attr]


def replace(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = norm.running_mean + 2  # type: ignore[operator]


def take_away(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = None


@pytest.mark.parametrize("change", [write, replace, take_away], ids=lambda change: change.__name__)
def test_what_is_done_to_a_copy_is_told_and_has_no_effect(change: Callable[[nn.BatchNorm1d], None]) -> None:
    norm = layer()
    before = state_bits(norm)
    lent = LentStatistics({"norm": norm})
    change(norm)
    (moved,) = lent.take_back()
    assert (moved.layer, moved.value) == ("norm", "running_mean")
    assert state_bits(norm) == before


def test_a_forward_in_train_mode_on_the_copies_is_told_for_every_value() -> None:
    norm = layer().train()
    before = state_bits(norm)
    lent = LentStatistics({"norm": norm})
    norm(torch.randn(8, 3))
    assert {moved.value for moved in lent.take_back()} == set(STATISTICS)
    assert state_bits(norm) == before


def test_a_layer_without_a_counter_is_lent_what_it_has() -> None:
    norm = layer()
    norm.num_batches_tracked = None
    lent = LentStatistics({"norm": norm})
    assert lent.take_back() == []
    assert norm.num_batches_tracked is None


def test_lent_twice_and_taken_back_in_turn_the_first_tensors_are_there() -> None:
    norm = layer()
    tensors = {name: id(buffer) for name, buffer in norm.named_buffers()}
    first = LentStatistics({"norm": norm})
    second = LentStatistics({"norm": norm})
    assert second.take_back() == []
    assert first.take_back() == []
    assert {name: id(buffer) for name, buffer in norm.named_buffers()} == tensors


def test_taking_back_twice_is_harmless() -> None:
    norm = layer()
    lent = LentStatistics({"norm": norm})
    lent.take_back()
    norm.running_mean.add_(1)  # type: ignore[union-attr]
    after = bits(norm.running_mean)  # type: ignore[arg-type]
    assert lent.take_back() == []
    assert bits(norm.running_mean) == after  # type: ignore[arg-type]
