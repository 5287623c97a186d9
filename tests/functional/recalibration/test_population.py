"""What was gathered of many layers: both estimators, and layers whose statistics lie apart."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_bn.functional import recalibrate
from tests.models import SharedNorm, SmallResNet, fill_statistics, images, seeded
from tests.oracle import assert_statistics_of, captured_inputs, layer_inputs

SIZES = (8, 3, 16, 5)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [images(size, seed=seed, dtype=dtype) for seed, size in enumerate(SIZES)]


def cumulative(model: nn.Module) -> nn.Module:
    """torch's own mean over batches: momentum=None from a fresh start."""
    twin = copy.deepcopy(model).train()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in batches(next(model.parameters()).dtype):
            twin(batch)
    return twin


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.double() for name, value in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("build", [SmallResNet, SharedNorm])
def test_mean_of_batches_is_the_cumulative_average_of_momentum_none(build):
    model = fill_statistics(seeded(build)).double()
    expected = statistics(cumulative(model))
    recalibrate(model, batches(torch.float64), estimator="mean_of_batches")
    for name, value in statistics(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


def test_mean_of_batches_equals_update_bn():
    model = fill_statistics(seeded(SmallResNet))
    theirs = copy.deepcopy(model)
    update_bn(batches(), theirs)
    recalibrate(model, batches(), estimator="mean_of_batches")
    for name, value in statistics(model).items():
        torch.testing.assert_close(value, statistics(theirs)[name], rtol=1e-5, atol=1e-6)


def test_mean_of_batches_weighs_batches_equally_and_pooled_by_their_values():
    small, large = torch.full((2, 1), 10.0), torch.zeros(98, 1)
    means = {}
    for estimator in ("pooled", "mean_of_batches"):
        layer = nn.BatchNorm1d(1)
        recalibrate(layer, [small, large], estimator=estimator)
        means[estimator] = (float(layer.running_mean), float(layer.running_var))
    assert means["mean_of_batches"] == (5.0, 0.0)
    everything = torch.cat([small, large]).double()
    assert means["pooled"] == pytest.approx((float(everything.mean()), float(everything.var())))


@given(sizes=st.lists(st.integers(2, 30), min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_mean_of_batches_is_the_plain_mean_of_means_and_unbiased_variances(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    data = [3 + 2 * torch.randn(size, 2, generator=generator) for size in sizes]
    layer = nn.BatchNorm1d(2)
    recalibrate(layer, data, estimator="mean_of_batches")
    mean = torch.stack([batch.double().mean(0) for batch in data]).mean(0)
    var = torch.stack([batch.double().var(0) for batch in data]).mean(0)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=1e-6)


def test_batch_that_is_not_finite_is_no_part_of_the_mean_of_batches():
    layer = nn.BatchNorm2d(3)
    data = batches()
    recalibrate(layer, [data[0], torch.full_like(data[1], torch.inf), data[2]], estimator="mean_of_batches")
    expected = torch.stack([batch.double().mean((0, 2, 3)) for batch in (data[0], data[2])]).mean(0)
    torch.testing.assert_close(layer.running_mean.double(), expected, rtol=1e-5, atol=1e-6)


def test_estimator_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'median'.*pooled, mean_of_batches"):
        recalibrate(nn.BatchNorm2d(3), batches(), estimator="median")


class DtypesInTurns(nn.Module):
    """Six layers in three dtypes, in turns, and of unequal width: none of one dtype lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        dtypes = (torch.float32, torch.float64, torch.bfloat16) * 2
        widths = (3, 5, 2, 4, 3, 6)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width).to(dtype) for width, dtype in zip(widths, dtypes, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(())
        for index, norm in enumerate(self.norms):
            part = x.repeat(1, 2, 1, 1)[:, : norm.num_features] * (index + 1) + index
            out = out + norm(part.to(norm.running_mean.dtype)).float().sum()
        return out


@pytest.mark.parametrize("estimator", ["pooled", "mean_of_batches"])
def test_layers_of_several_dtypes_in_turns_each_get_their_own_statistics(estimator):
    net = fill_statistics(DtypesInTurns())
    names = [f"norms.{index}" for index in range(6)]
    data = [torch.cat(batches())] if estimator == "mean_of_batches" else batches()
    inputs = layer_inputs(net, data, names)
    result = recalibrate(net, data, estimator=estimator)
    assert list(result.layers) == names
    for name, tolerance in zip(names, (1e-5, 1e-12, 2**-8) * 2, strict=True):
        assert_statistics_of(net.get_submodule(name), inputs[name], tolerance)
    widths = [net.get_submodule(name).num_features for name in names]
    assert list(result.after.layout.sizes) == widths


def test_error_over_layers_of_several_dtypes_is_the_largest_of_theirs():
    from tests.functional.recalibration.test_standard_error import errors_of

    net = DtypesInTurns()
    data = [images(8, seed=seed) for seed in range(10)]
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    with torch.no_grad(), captured_inputs(layers) as seen:
        for batch in data:
            net(batch)
    exact = {name: errors_of(values).largest() for name, values in seen.items()}
    # What bf16 makes of a batch's statistics is a spread of its own.
    assert recalibrate(net, data).standard_error == pytest.approx(max(exact.values()), rel=0.1)
    assert recalibrate(net, data, exclude=["norms.2", "norms.5"]).standard_error == pytest.approx(
        max(error for name, error in exact.items() if name not in ("norms.2", "norms.5")), rel=1e-4
    )
