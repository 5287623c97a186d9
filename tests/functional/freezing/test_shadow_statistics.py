"""Copies of statistics for a while: a backward reads what its forward used, and writes to the copies have no effect."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from lightning_bn.functional.freezing.shadow_statistics import shadow_statistics
from lightning_bn.functional.layers.exchange import Entries, ExchangeError, exchanged, holders_of
from tests.models import bits, fill_statistics, state_bits

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def layer(**arguments: bool) -> nn.BatchNorm1d:
    return fill_statistics(nn.Sequential(nn.BatchNorm1d(3, **arguments)))[0].eval()  # type: ignore[index]


def test_the_same_tensors_come_back_with_the_same_bits() -> None:
    norm = layer()
    before, tensors = state_bits(norm), {name: id(buffer) for name, buffer in norm.named_buffers()}
    with shadow_statistics({"norm": norm}) as changes:
        assert state_bits(norm) == before
        assert all(id(buffer) != tensors[name] for name, buffer in norm.named_buffers())
    assert changes == []
    assert state_bits(norm) == before
    assert {name: id(buffer) for name, buffer in norm.named_buffers()} == tensors


def test_a_backward_reads_what_its_forward_used_though_the_layer_trained_in_between() -> None:
    x, other = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    weights = torch.randn(8, 3)
    norm = layer()
    (expected,) = torch.autograd.grad((norm(x) * weights).sum(), x)

    def in_between(shadow: bool) -> torch.Tensor:
        norm = layer()
        with shadow_statistics({"norm": norm} if shadow else {}):
            loss = (norm(x) * weights).sum()
        norm.train()(5 * other)
        (gradient,) = torch.autograd.grad(loss, x)
        return gradient

    assert torch.equal(in_between(shadow=True), expected)
    # Why it is needed: torch reads the running statistics again, and moves them unseen.
    assert not torch.equal(in_between(shadow=False), expected)


def write(norm: nn.BatchNorm1d) -> None:
    norm.running_mean.add_(2)  # type: ignore[union-attr]


def replace(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = norm.running_mean + 2  # type: ignore[operator]


def take_away(norm: nn.BatchNorm1d) -> None:
    norm.running_mean = None


@pytest.mark.parametrize("alter", [write, replace, take_away], ids=lambda alter: alter.__name__)
def test_what_is_done_to_a_copy_is_told_and_has_no_effect(alter: Callable[[nn.BatchNorm1d], None]) -> None:
    norm = layer()
    before = state_bits(norm)
    with shadow_statistics({"norm": norm}) as changes:
        alter(norm)
    (change,) = changes
    assert (change.layer, change.value) == ("norm", "running_mean")
    assert state_bits(norm) == before


def test_a_forward_in_train_mode_on_the_copies_is_told_for_every_value() -> None:
    norm = layer().train()
    before = state_bits(norm)
    with shadow_statistics({"norm": norm}) as changes:
        norm(torch.randn(8, 3))
    assert {change.value for change in changes} == set(STATISTICS)
    assert state_bits(norm) == before


def test_a_layer_without_a_counter_has_a_shadow_of_what_it_has() -> None:
    norm = layer()
    norm.num_batches_tracked = None
    with shadow_statistics({"norm": norm}) as changes:
        pass
    assert changes == []
    assert norm.num_batches_tracked is None


def test_of_two_shadows_one_inside_the_other_the_first_tensors_are_there_at_the_end() -> None:
    norm = layer()
    tensors = {name: id(buffer) for name, buffer in norm.named_buffers()}
    with shadow_statistics({"norm": norm}) as outer, shadow_statistics({"norm": norm}) as inner:
        norm(torch.randn(8, 3))
    assert (inner, outer) == ([], [])
    assert {name: id(buffer) for name, buffer in norm.named_buffers()} == tensors


def test_what_is_written_after_the_end_stays() -> None:
    norm = layer()
    with shadow_statistics({"norm": norm}) as changes:
        pass
    norm.running_mean.add_(1)  # type: ignore[union-attr]
    after = bits(norm.running_mean)  # type: ignore[arg-type]
    assert changes == []
    assert bits(norm.running_mean) == after  # type: ignore[arg-type]


def other_statistics(norm: nn.BatchNorm1d) -> AbstractContextManager[None]:
    given = {name: torch.zeros_like(buffer) for name, buffer in norm.named_buffers()}
    return exchanged("somebody", [Entries("norm", norm, buffers=given)])


def test_a_shadow_that_is_taken_out_before_what_lies_on_top_is_an_error_that_names_both() -> None:
    norm = layer()
    shadow, above = shadow_statistics({"norm": norm}), other_statistics(norm)
    shadow.__enter__()
    copies = dict(norm.named_buffers())
    above.__enter__()
    with pytest.raises(ExchangeError, match=r"layer 'norm'.*'shadow_statistics'.*'somebody' put something on top"):
        shadow.__exit__(None, None, None)
    assert not any(buffer is copies[name] for name, buffer in norm.named_buffers())
    above.__exit__(None, None, None)
    assert all(buffer is copies[name] for name, buffer in norm.named_buffers())


def test_a_shadow_may_be_taken_out_again_inside_of_another_exchange() -> None:
    norm = layer()
    tensors = dict(norm.named_buffers())
    with other_statistics(norm):
        others = dict(norm.named_buffers())
        with shadow_statistics({"norm": norm}) as changes:
            norm.train()(torch.randn(8, 3))
        assert all(buffer is others[name] for name, buffer in norm.named_buffers())
    assert {change.value for change in changes} == set(STATISTICS)
    assert all(buffer is tensors[name] for name, buffer in norm.named_buffers())


def test_after_an_exception_in_the_inner_exchange_all_is_as_it_was() -> None:
    norm = layer()
    before, tensors = state_bits(norm), dict(norm.named_buffers())
    with pytest.raises(RuntimeError, match="as planned"), shadow_statistics({"norm": norm}), other_statistics(norm):
        raise RuntimeError("as planned")
    assert all(buffer is tensors[name] for name, buffer in norm.named_buffers())
    assert state_bits(norm) == before
    assert holders_of(norm) == ()
