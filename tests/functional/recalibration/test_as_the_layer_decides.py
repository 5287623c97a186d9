"""Of the forwards inside a pass those count that training would take for an update, as the layer takes it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.func import functional_call
from torch.nn import functional as F

from lightning_bn.functional import AllFrozenError, NoUsableBatchError, RecalibrationError, SelectionError, recalibrate
from tests.models import (
    BatchRenorm2d,
    ChunkedBatchNorm2d,
    GhostBatchNorm2d,
    HalfByHand,
    SplitBatchNorm2d,
    bits,
    fill_statistics,
    images,
    seeded,
)
from tests.oracle import everything, per_channel

Forward = Callable[[Any, Tensor], Any]


def batches(count: int = 4, size: int = 8) -> list[Tensor]:
    return [images(size, seed=seed) for seed in range(count)]


def network() -> nn.Sequential:
    return fill_statistics(seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))).train()  # type: ignore


def assert_statistics(layer: nn.Module, values: Tensor) -> None:
    """Of all values, (C, n), to float32's precision."""
    assert torch.allclose(layer.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)  # type: ignore
    assert torch.allclose(layer.running_var.double(), values.var(1), rtol=1e-5)  # type: ignore


def of_the_batches(net: nn.Sequential) -> Tensor:
    with torch.no_grad():
        return per_channel(torch.cat([net[0](batch) for batch in batches()]))


def pseudo_labels(model: Any, batch: Tensor) -> Any:
    model[1].eval()
    model(batch * 5 + 7)
    model[1].train()
    return model(batch)


def not_tracked(model: Any, batch: Tensor) -> Any:
    model[1].track_running_stats = False
    model(batch * 5 + 7)
    model[1].track_running_stats = True
    return model(batch)


def momentum_of_zero(model: Any, batch: Tensor) -> Any:
    momentum, model[1].momentum = model[1].momentum, 0.0
    model(batch * 5 + 7)
    model[1].momentum = momentum
    return model(batch)


def not_tracked_afterwards(model: Any, batch: Tensor) -> Any:
    model(batch)
    momentum, model[1].momentum = model[1].momentum, 0.0
    model(batch * 5 + 7)
    model[1].momentum = momentum


def other_buffers(model: Any, batch: Tensor) -> Any:
    functional_call(model, {name: buffer.clone() for name, buffer in model.named_buffers()}, (batch * 5 + 7,))
    return model(batch)


def own_buffers(model: Any, batch: Tensor) -> Any:
    return functional_call(model, dict(model.named_buffers()), (batch,))


def a_schedule(model: Any, batch: Tensor) -> Any:
    model[1].momentum *= 0.9
    return model(batch)


@pytest.mark.parametrize(
    "forward",
    [pseudo_labels, not_tracked, momentum_of_zero, not_tracked_afterwards, other_buffers, own_buffers, a_schedule],
)
def test_a_forward_counts_if_training_would_update_with_it(forward: Forward) -> None:
    net = network()
    expected = of_the_batches(net)
    recalibrate(net, batches(), forward=forward)
    assert_statistics(net[1], expected)
    assert net[1].momentum == 0.1
    assert net[1].track_running_stats is True


def test_own_buffers_that_were_kept_from_before_are_the_layers_own() -> None:
    net = network()
    expected, kept = of_the_batches(net), dict(net.named_buffers())
    recalibrate(net, batches(), forward=lambda model, batch: functional_call(model, kept, (batch,)))
    assert_statistics(net[1], expected)
    assert net[1].running_mean is kept["1.running_mean"]


@pytest.mark.parametrize("forward", [pseudo_labels, not_tracked, momentum_of_zero, other_buffers])
def test_such_a_forward_gives_what_it_gives_outside_of_a_pass(forward: Forward) -> None:
    def seen(run: Callable[[nn.Module], Any]) -> list[Tensor]:
        net, found = network(), []
        net[1].register_forward_hook(lambda module, args, output: found.append(output.detach().clone()))
        run(net)
        return found

    once = batches(1)
    inside = seen(lambda net: recalibrate(net, once, forward=forward))
    assert [bits(output) for output in inside] == [bits(output) for output in seen(lambda net: forward(net, once[0]))]


def test_momentum_that_a_forward_reads_is_the_layers_own() -> None:
    net, seen = network(), []

    def forward(model: Any, batch: Tensor) -> Any:
        seen.append((model[1].momentum, bits(model[1].running_mean)))
        return model(batch)

    own = bits(net[1].running_mean)  # type: ignore
    recalibrate(net, batches(2), forward=forward)
    assert seen == [(0.1, own)] * 2


@pytest.mark.parametrize("switch", [{"momentum": 0.0}, {"track_running_stats": False}])
def test_what_was_switched_off_before_the_pass_is_what_it_mends(switch: dict[str, Any]) -> None:
    net = network()
    vars(net[1]).update(switch)
    expected = of_the_batches(net)
    recalibrate(net, batches())
    assert_statistics(net[1], expected)
    assert {name: getattr(net[1], name) for name in switch} == switch


def test_layer_that_only_runs_with_other_buffers_is_named_and_nothing_changed() -> None:
    net = network()
    before, others = everything(net), {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises(RecalibrationError, match="layer '1'"):
        recalibrate(net, batches(), forward=lambda model, batch: functional_call(model, others, (batch,)))
    assert everything(net) == before


def test_fused_convolution_and_batch_norm_reads_its_own_statistics() -> None:
    def fused() -> nn.Module:
        block = qat.ConvBn2d(3, 4, 1, qconfig=get_default_qat_qconfig("fbgemm"))
        block.bn.running_var.fill_(9.0)
        # Without observers the fused forward is exactly a convolution and a BatchNorm.
        block.weight_fake_quant = nn.Identity()
        return block

    net = seeded(fused).train()
    with torch.no_grad():
        conv = F.conv2d(torch.cat(batches()), net.weight, net.bias)  # type: ignore
    recalibrate(net, batches())
    assert_statistics(net.bn, per_channel(conv))  # type: ignore


def test_layers_frozen_by_torchs_own_function_are_told_its_counterpart() -> None:
    net = qat.ConvBn2d(3, 4, 1, qconfig=get_default_qat_qconfig("fbgemm")).train()
    net.weight_fake_quant = nn.Identity()
    net.apply(qat.freeze_bn_stats)
    with pytest.raises(AllFrozenError, match=r"freeze_bn_stats.*model\.apply\(torch\..*update_bn_stats\)"):
        recalibrate(net, batches())
    net.apply(qat.update_bn_stats)
    assert recalibrate(net, batches()).layers == ("bn",)


def test_layer_that_reads_its_running_statistics_while_it_trains_begins_every_forward_from_its_own() -> None:
    net = fill_statistics(BatchRenorm2d(3)).train()
    once, seen = copy.deepcopy(net), []
    net.register_forward_hook(lambda module, args, output: seen.append(module.corrections))  # type: ignore
    recalibrate(net, batches(2))
    assert_statistics(net, per_channel(torch.cat(batches(2))))
    for batch, corrections in zip(batches(2), seen, strict=True):
        copy.deepcopy(once)(batch)
        fresh = copy.deepcopy(once)
        fresh(batch)
        assert torch.allclose(fresh.corrections, corrections)  # type: ignore


def test_own_statistics_that_are_not_finite_do_no_harm() -> None:
    net = network()
    net[1].running_mean.fill_(torch.nan)  # type: ignore
    net[1].running_var.fill_(torch.inf)  # type: ignore
    recalibrate(net, batches())
    assert_statistics(net[1], of_the_batches(net))


def test_layer_that_normalizes_a_part_counts_that_part() -> None:
    net = SplitBatchNorm2d(3)
    recalibrate(net, batches())
    clean, other = (torch.cat(parts) for parts in zip(*(batch.chunk(2) for batch in batches()), strict=True))
    assert_statistics(net, per_channel(clean))
    assert_statistics(net.aux, per_channel(other))


def test_layer_that_normalizes_in_chunks_counts_them_all() -> None:
    net = ChunkedBatchNorm2d(3)
    recalibrate(net, batches(3, 7))
    assert_statistics(net, per_channel(torch.cat(batches(3, 7))))


def test_layer_that_normalizes_with_others_than_its_inputs_statistics_is_refused() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), fill_statistics(HalfByHand(3)))
    before = everything(net)
    with pytest.raises(RecalibrationError, match=r"layer '1'.*other statistics than those of its input"):
        recalibrate(net, batches())
    assert everything(net) == before


def test_layer_with_statistics_of_another_size_is_refused_by_name() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), GhostBatchNorm2d(3, 2))
    before = everything(net)
    with pytest.raises(SelectionError, match=r"'1'.*6.*3 channels.*exclude"):
        recalibrate(net, batches())
    assert everything(net) == before
    assert recalibrate(net, batches(), exclude="1").layers == ("0",)


@pytest.mark.parametrize("shape", [(0, 3, 6, 6), (4, 3, 0, 6)])
def test_empty_batches_are_not_counted_and_their_layer_was_reached(shape: tuple[int, ...]) -> None:
    net = nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(3), "c": nn.BatchNorm2d(3)})

    def forward(model: Any, batch: Tensor) -> None:
        model["a"](batch)
        model["a"](torch.zeros(shape))
        model["b"](torch.zeros(shape))

    found = recalibrate(net, batches(), forward=forward)
    assert (found.layers, found.empty, found.unreached) == (("a",), ("b",), ("c",))
    assert "given only empty batches and left unchanged: 'b'" in str(found)
    assert_statistics(net["a"], per_channel(torch.cat(batches())))


def test_nothing_but_empty_batches_is_an_error_that_says_so() -> None:
    with pytest.raises(NoUsableBatchError, match="were empty"):
        recalibrate(nn.BatchNorm2d(3), [torch.zeros(0, 3, 2, 2)])


class DropsAsFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.dropout(self.conv(x), 0.5, self.training))


class SkipsAsFunction(DropsAsFunction):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        keep = torch.rand(len(x), 1, 1, 1) < 0.5 if self.training else 1
        return self.bn(x * keep)


@pytest.mark.parametrize("kind", [DropsAsFunction, SkipsAsFunction])
def test_dropout_that_a_container_calls_is_noticed_and_can_be_turned_off(kind: type[DropsAsFunction]) -> None:
    net = seeded(kind).train()
    noticed = recalibrate(net, batches())
    assert noticed.drew_random_numbers
    assert "drew random numbers" in str(noticed)
    told = recalibrate(net, batches(), containers_in_eval=False)
    assert "random" not in str(told)
    done = recalibrate(net, batches(), containers_in_eval=True)
    assert "random" not in str(done)
    with torch.no_grad():
        assert_statistics(net.bn, per_channel(torch.cat([net.conv(batch) for batch in batches()])))
    assert net.training


def test_a_forward_that_draws_nothing_says_nothing() -> None:
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3))
    assert not recalibrate(net, batches()).drew_random_numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_in_half_precision_are_collected_in_float32(dtype: torch.dtype) -> None:
    net = nn.BatchNorm2d(3, dtype=dtype)
    many = [(images(8, seed=seed) * 20 + 100).to(dtype) for seed in range(40)]
    found = recalibrate(net, many)
    values = per_channel(torch.cat(many))
    assert torch.equal(net.running_mean, values.mean(1).to(dtype))  # type: ignore
    assert torch.equal(net.running_var, values.var(1).to(dtype))  # type: ignore
    assert found.nonfinite == {}


def test_variance_that_float16_cannot_hold_is_named_and_left() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).half()

    def forward(model: Any, batch: Tensor) -> None:
        model[0](batch.half())
        model[1](batch.half() * 400)

    before = everything(net, ["0"])
    found = recalibrate(net, batches(), forward=forward)
    assert (found.layers, list(found.unheld)) == (("0",), ["1"])
    assert "left unchanged, since their dtype cannot hold the new statistics: '1' (variance" in str(found)
    assert "in float16" in str(found)
    assert everything(net, ["0"]) == before
    with pytest.raises(NoUsableBatchError, match=r"variance .* in float16.*float32"):
        recalibrate(net[1], [batch.half() * 400 for batch in batches()])


def test_batches_that_overflow_in_float16_are_not_left_out() -> None:
    """Of every second batch the variance is above what float16 holds, of all of them it is not."""
    net = nn.BatchNorm2d(3).half()
    many = [(images(8, seed=seed) * (140 if seed % 2 else 30)).half() for seed in range(8)]
    assert max(float(batch.double().var()) for batch in many) > 65504
    found = recalibrate(net, many)
    assert torch.equal(net.running_var, per_channel(torch.cat(many)).var(1).half())  # type: ignore
    assert "standard error" in str(found)


def test_no_standard_error_is_said_of_what_remains_after_some_batches_were_left_out() -> None:
    spoiled = torch.full((8, 3, 6, 6), torch.inf)
    found = recalibrate(nn.BatchNorm2d(3), [*batches(), spoiled])
    assert "batches that were not finite left out" in str(found)
    assert "standard error" not in str(found)


@pytest.mark.parametrize(("prior", "count"), [(16, 2), (8, 1), (0.5, 4)])
def test_prior_weighs_what_the_layer_held_as_so_many_samples(prior: float, count: int) -> None:
    net = network()
    mean, var = net[1].running_mean.double(), net[1].running_var.double()  # type: ignore
    with torch.no_grad():
        values = per_channel(torch.cat([net[0](batch) for batch in batches(count)]))
    recalibrate(net, batches(count), prior=prior)
    weight = 8 * count / (8 * count + prior)
    blended = (mean + weight * (values.mean(1) - mean), var + weight * (values.var(1) - var))
    assert torch.allclose(net[1].running_mean.double(), blended[0], rtol=1e-5, atol=1e-6)  # type: ignore
    assert torch.allclose(net[1].running_var.double(), blended[1], rtol=1e-5)  # type: ignore


@pytest.mark.parametrize("prior", [0, -1, True, "16", float("nan")])
def test_prior_that_is_no_number_of_samples_is_refused(prior: Any) -> None:
    with pytest.raises(ValueError, match="prior="):
        recalibrate(nn.BatchNorm2d(3), batches(), prior=prior)


def test_prior_needs_samples_that_can_be_counted() -> None:
    net = network()
    before = everything(net)
    with pytest.raises(ValueError, match=r"prior=16 needs the number of samples"):
        recalibrate(net, [object()], forward=lambda model, batch: model(images(4)), prior=16)
    assert everything(net) == before


class OwnMomentum(nn.BatchNorm2d):
    """Gives torch's function a weight of its own, by position or by name."""

    def __init__(self, channels: int, by_name: bool) -> None:
        super().__init__(channels)
        self.by_name = by_name

    def forward(self, x: Tensor) -> Tensor:
        momentum = max(0.1, 1 / (float(self.num_batches_tracked or 0) + 1))
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if self.by_name:
            return F.batch_norm(x, mean, var, weight=weight, bias=bias, training=self.training, momentum=momentum)
        return torch.batch_norm(x, weight, bias, mean, var, self.training, momentum, self.eps, True)


@pytest.mark.parametrize("by_name", [True, False])
def test_weight_that_a_layer_gives_torchs_function_is_not_in_the_result(by_name: bool) -> None:
    net = fill_statistics(OwnMomentum(3, by_name)).train()
    recalibrate(net, batches())
    assert_statistics(net, per_channel(torch.cat(batches())))


def undone_by_loading(model: Any, batch: Tensor) -> Any:
    kept = copy.deepcopy(model.state_dict())
    model(batch * 5 + 7)
    model.load_state_dict(kept)
    return model(batch)


def undone_by_copying(model: Any, batch: Tensor) -> Any:
    kept = model[1].running_mean.clone()
    model(batch * 5 + 7)
    model[1].running_mean.copy_(kept)
    return model(batch)


@pytest.mark.parametrize("forward", [undone_by_loading, undone_by_copying])
def test_step_that_writes_to_the_statistics_itself_is_refused_by_the_layers_name(forward: Forward) -> None:
    net = network()
    before = everything(net)
    with pytest.raises(RecalibrationError, match=r"writes to the running statistics of BatchNorm layer '1'"):
        recalibrate(net, batches(), forward=forward)
    assert everything(net) == before


@pytest.mark.parametrize(
    "arguments",
    [{"distributed": "yes"}, {"distributed": 1}, {"distributed": True}, {"forward": True}, {"forward": "forward"}],
    ids=str,
)
def test_forward_and_distributed_are_refused_by_their_names(arguments: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        recalibrate(nn.BatchNorm2d(3), batches(), **arguments)
