"""The collector gathers what layers compute anyway, and gives them back exactly as they were."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from lightning_bn.functional.recalibration.collector import Collector, collecting
from lightning_bn.functional.recalibration.one_value_per_channel import OneValuePerChannelError
from lightning_bn.functional.statistics.sample_moments import Moments, variance
from tests.models import fill_statistics, images
from tests.oracle import everything, per_channel


class Gathered(NamedTuple):
    """What a collector gathered of one layer."""

    moments: Moments
    uses: int
    nonfinite: int


def gathered_by(collector: Collector) -> dict[str, Gathered]:
    population = collector.population()
    uses, nonfinite = population.by_layer(population.uses), population.by_layer(population.nonfinite)
    return {
        name: Gathered(Moments(*(values[part] for values in population.moments)), uses[name], nonfinite[name])
        for name, part in population.layout.slices.items()
    }


def two_layers() -> nn.ModuleDict:
    return fill_statistics(nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(3)})).train()  # type: ignore


def test_moments_are_those_of_all_values_a_layer_was_given():
    net = two_layers()
    batches = [images(size, seed=size) for size in (8, 1, 5)]
    with collecting(dict(net.items())) as collector:
        for batch in batches:
            with collector.batch():
                net["a"](batch)
                net["a"](2 * batch)
    found = gathered_by(collector)
    values = per_channel(torch.cat([torch.cat([batch, 2 * batch]) for batch in batches]))
    assert list(found) == ["a", "b"]
    assert found["a"].moments.count.tolist() == [values.shape[1]] * 3
    assert found["a"].moments.mean.dtype == torch.float64
    assert torch.allclose(found["a"].moments.mean, values.mean(1), rtol=1e-6)
    assert torch.allclose(variance(found["a"].moments), values.var(1), rtol=1e-6)
    assert (found["a"].uses, found["a"].nonfinite) == (6, 0)
    assert (found["b"].uses, float(found["b"].moments.count.sum())) == (0, 0)


def test_layers_are_afterwards_as_they_were():
    net = two_layers()
    found = everything(net)
    with collecting(dict(net.items())) as collector, collector.batch():
        net["b"](net["a"](images(8)))
    assert everything(net) == found


def test_layers_are_as_they_were_after_an_exception():
    net = two_layers()
    found = everything(net)

    def fail() -> None:
        with collecting(dict(net.items())) as collector, collector.batch():
            net["a"](images(8))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert everything(net) == found


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_nothing_of_a_batch_that_failed_is_kept(uses):
    net = two_layers()
    with collecting(dict(net.items())) as collector:
        for fails in (False, True, False):
            try:
                with collector.batch():
                    net["b"](images(8, seed=int(fails)))
                    for _ in range(uses):
                        net["a"](images(8, seed=int(fails)))
                    if fails:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass
    values = per_channel(images(8))
    for name, count in (("a", uses), ("b", 1)):
        found = gathered_by(collector)[name]
        assert found.uses == 2 * count
        assert found.moments.count.tolist() == [2 * count * values.shape[1]] * 3
        assert torch.allclose(found.moments.mean, values.mean(1), rtol=1e-6)


def test_one_value_per_channel_is_an_error_that_names_the_layer():
    layer = nn.BatchNorm1d(3)
    with (
        collecting({"head.bn": layer}) as collector,
        pytest.raises(OneValuePerChannelError, match=r"head\.bn") as caught,
        collector.batch(),
    ):
        layer(torch.zeros(1, 3))
    assert caught.value.layer == "head.bn"
    assert gathered_by(collector)["head.bn"].uses == 0


def test_forward_that_is_not_finite_is_counted_and_left_out_for_that_layer_alone():
    net = two_layers()
    spoiled = images(8)
    spoiled[0, 1, 2, 3] = torch.nan
    with collecting(dict(net.items())) as collector:
        for batch in (images(8), spoiled, images(8)):
            with collector.batch():
                net["a"](batch)
                net["b"](batch.nan_to_num(0))
    found = gathered_by(collector)
    assert (found["a"].uses, found["a"].nonfinite) == (2, 1)
    assert (found["b"].uses, found["b"].nonfinite) == (3, 0)
    assert torch.isfinite(found["a"].moments.m2).all()


def test_layer_without_running_statistics_is_refused_by_name():
    with (
        pytest.raises(ValueError, match=r"'stem\.bn'"),
        collecting({"stem.bn": nn.BatchNorm2d(3, track_running_stats=False)}),
    ):
        pass


def test_memory_grows_with_channels_and_not_with_batches():
    layer = nn.BatchNorm2d(3)
    seen = []
    with collecting({"bn": layer}) as collector:
        for seed in range(3):
            with collector.batch():
                layer(images(8, seed=seed))
            seen.append(sum(value.numel() for value in collector.population().moments))
    assert seen == [9, 9, 9]
    assert layer.running_mean.untyped_storage().nbytes() == 3 * 4


def test_population_is_a_state_and_not_a_view_of_what_is_to_come():
    layer = nn.BatchNorm2d(3)
    with collecting({"bn": layer}) as collector:
        with collector.batch():
            layer(images(8))
        early = gathered_by(collector)["bn"]
        mean = early.moments.mean.clone()
        with collector.batch():
            layer(5 + images(8))
    assert torch.equal(early.moments.mean, mean)
