"""Exchanges nest, last in, first out; what was there before is back afterwards, the very objects."""

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from lightning_bn.functional.layers.exchange import Entries, ExchangeError, exchanged, holders_of
from tests.models import fill_statistics
from tests.oracle import everything


def layer() -> nn.BatchNorm1d:
    return fill_statistics(nn.BatchNorm1d(3))  # type: ignore[return-value]


def others(value: float, name: str = "bn") -> "dict[str, torch.Tensor | None]":
    return {"running_mean": torch.full((3,), value), "running_var": torch.full((3,), value + 1)}


def test_inside_the_entries_are_there_and_afterwards_the_very_objects() -> None:
    bn = layer()
    before, attributes = everything(bn), set(bn.__dict__)
    mean, weight = bn.running_mean, bn.weight
    new, parameter = others(5.0), torch.ones(3)
    entries = Entries("bn", bn, new, {"weight": parameter}, {"momentum": 1.0, "forward": lambda x: x + 1})
    with exchanged("somebody", [entries]):
        assert bn.running_mean is new["running_mean"]
        assert bn.weight is parameter
        assert bn.momentum == 1.0
        assert bn(torch.zeros(2, 3)).tolist() == [[1.0] * 3] * 2
        assert holders_of(bn) == ("somebody",)
    assert bn.running_mean is mean
    assert bn.weight is weight
    assert set(bn.__dict__) == attributes
    assert everything(bn) == before


def test_exchanges_nest_and_each_gives_back_what_it_found() -> None:
    bn = layer()
    mean, outer, inner = bn.running_mean, others(1.0), others(2.0)
    with exchanged("outer", [Entries("bn", bn, outer)]):
        with exchanged("inner", [Entries("bn", bn, inner)]):
            assert bn.running_mean is inner["running_mean"]
            assert holders_of(bn) == ("outer", "inner")
        assert bn.running_mean is outer["running_mean"]
    assert bn.running_mean is mean
    assert holders_of(bn) == ()


def test_out_of_order_is_an_error_with_the_layer_and_both_holders_and_changes_nothing() -> None:
    bn, free = layer(), layer()
    outer, inner = others(1.0), others(2.0)
    first, second = ExitStack(), ExitStack()
    first.enter_context(exchanged("freezer", [Entries("free", free, others(9.0)), Entries("net.bn", bn, outer)]))
    second.enter_context(exchanged("recalibrate", [Entries("net.bn", bn, inner)]))
    with pytest.raises(ExchangeError, match=r"'net\.bn'.*'freezer'.*'recalibrate'"):
        first.close()
    assert bn.running_mean is inner["running_mean"]
    assert holders_of(free) == ("freezer",)
    second.close()
    assert bn.running_mean is outer["running_mean"]
    assert holders_of(bn) == ("freezer",)


def test_one_that_fails_takes_out_what_was_left_on_top_of_it() -> None:
    bn = layer()
    before, left = everything(bn), ExitStack()

    def fail() -> None:
        with exchanged("recalibrate", [Entries("bn", bn, others(1.0))]):
            left.enter_context(exchanged("forgotten", [Entries("bn", bn, others(2.0))]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert everything(bn) == before
    with pytest.raises(ExchangeError, match=r"'forgotten'.*it is not there any more"):
        left.close()
    assert everything(bn) == before


def test_an_exception_inside_the_inner_one_gives_both_back() -> None:
    bn = layer()
    before = everything(bn)
    outer = exchanged("outer", [Entries("bn", bn, others(1.0))])
    inner = exchanged("inner", [Entries("bn", bn, others(2.0), {"bias": torch.ones(3)})])
    with pytest.raises(ZeroDivisionError), outer, inner:
        raise ZeroDivisionError
    assert everything(bn) == before


def test_one_that_fails_half_way_gives_back_what_it_had_put() -> None:
    bn = layer()
    before = everything(bn)
    broken = Entries("no module", "bn")  # type: ignore[arg-type]
    with pytest.raises(AttributeError), exchanged("somebody", [Entries("bn", bn, others(1.0)), broken]):
        pass
    assert everything(bn) == before


def test_the_same_module_twice_in_one_exchange_is_given_back() -> None:
    bn = layer()
    before = everything(bn)
    with exchanged("somebody", [Entries("a", bn, others(1.0)), Entries("b", bn, others(2.0))]):
        assert holders_of(bn) == ("somebody", "somebody")
    assert everything(bn) == before


def test_what_others_replaced_meanwhile_is_replaced_again() -> None:
    bn = layer()
    mean = bn.running_mean
    with exchanged("somebody", [Entries("bn", bn, others(1.0))]):
        bn.running_mean = torch.zeros(3)
    assert bn.running_mean is mean


def test_copies_made_inside_are_ordinary_modules_afterwards() -> None:
    bn = layer()
    with exchanged("somebody", [Entries("bn", bn, others(1.0))]):
        twins = [copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))]
    for twin in twins:
        mean = twin.running_mean
        with exchanged("later", [Entries("bn", twin, others(2.0))]):
            assert float(twin.running_mean[0]) == 2.0
        assert twin.running_mean is mean


def test_exchanges_of_other_entries_of_one_module_do_not_mind_the_order() -> None:
    bn = layer()
    before, first, second = everything(bn), ExitStack(), ExitStack()
    first.enter_context(exchanged("statistics", [Entries("bn", bn, others(1.0))]))
    second.enter_context(exchanged("affine", [Entries("bn", bn, parameters={"weight": torch.ones(3)})]))
    first.close()
    assert holders_of(bn) == ("affine",)
    assert bn.weight.tolist() == [1.0] * 3
    second.close()
    assert everything(bn) == before


def test_a_refused_end_can_be_tried_again() -> None:
    bn = layer()
    before = everything(bn)
    first = exchanged("first", [Entries("bn", bn, others(1.0))])
    second = exchanged("second", [Entries("bn", bn, others(2.0))])
    first.__enter__()
    second.__enter__()
    with pytest.raises(ExchangeError):
        first.__exit__(None)
    second.__exit__(None)
    first.__exit__(None)
    assert everything(bn) == before


def test_copies_made_inside_are_nobodys() -> None:
    bn = layer()
    with exchanged("somebody", [Entries("bn", bn, others(1.0))]):
        twins = [copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))]
    assert [holders_of(twin) for twin in twins] == [(), ()]
