"""What one layer's next forward does: the truth is established by running it, then compared with `describe`."""

import copy
import itertools
import re

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional.freezing.freeze import freeze_batch_norm
from lightning_bn.functional.layers.behavior import LayerBehavior, describe
from tests.models import SMALL_RESNET_NAMES, BatchNormAct2d, Holder, SmallResNet, fill_statistics, state_bits, warmed

CHANNELS = 3
KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SPATIAL = {1: (), 2: (3, 2), 3: (2, 3, 2)}


def build(
    dim: int = 2,
    *,
    training: bool = True,
    buffers: bool = True,
    flipped: bool = False,
    affine: bool = True,
    momentum: float | None = 0.3,
) -> nn.Module:
    """A float64 layer in the given state, with statistics and parameters that no batch of `batch_of` would give."""
    layer = KINDS[dim](
        CHANNELS, momentum=momentum, affine=affine, track_running_stats=buffers, eps=1e-3, dtype=torch.float64
    )
    fill_statistics(layer)
    if flipped:
        layer.track_running_stats = not layer.track_running_stats
    return layer.train(training)


def batch_of(dim: int, batch: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(dim)
    scale = torch.tensor([0.5, 3.0, 10.0], dtype=torch.float64).view(1, -1, *[1] * len(SPATIAL[dim]))
    return 4.0 + scale * torch.randn(batch, CHANNELS, *SPATIAL[dim], generator=generator, dtype=torch.float64)


def by_hand(layer: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The normalization formula, channel by channel, in float64."""
    out = torch.empty_like(x)
    for c in range(CHANNELS):
        y = (x[:, c] - mean[c]) / (var[c] + layer.eps) ** 0.5
        out[:, c] = y * layer.weight[c] + layer.bias[c] if layer.affine else y
    return out.detach()


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of each channel, by the definition."""
    values = [x[:, c].reshape(-1) for c in range(CHANNELS)]
    count = values[0].numel()
    mean = torch.stack([v.sum() / count for v in values])
    squares = torch.stack([((v - m) ** 2).sum() for v, m in zip(values, mean, strict=True)])
    return mean, squares / count, squares / (count - 1)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def observed(layer: nn.Module, x: Tensor) -> dict[str, object]:
    """Runs the layer once and decides from output and buffers alone which statistics it used, and what it stored."""
    before = copy.deepcopy(layer)
    with torch.no_grad():
        out = layer(x)
    mean, biased, unbiased = batch_statistics(x)

    with_batch = close(out, by_hand(before, x, mean, biased))
    with_running = before.running_mean is not None and close(
        out, by_hand(before, x, before.running_mean, before.running_var)
    )
    assert with_batch != with_running, "exactly one formula has to explain the output"

    averaging, updates = "none", False
    if before.running_mean is not None:
        updates = not (
            torch.equal(layer.running_mean, before.running_mean) and torch.equal(layer.running_var, before.running_var)
        )
    if updates:
        factors = {"cumulative": 1.0 / (int(before.num_batches_tracked) + 1)}
        if before.momentum is not None:
            factors["exponential"] = before.momentum
        explained = [
            name
            for name, factor in factors.items()
            if close(layer.running_mean, (1 - factor) * before.running_mean + factor * mean)
            and close(layer.running_var, (1 - factor) * before.running_var + factor * unbiased)
        ]
        assert len(explained) == 1, "exactly one average, of the unbiased variance, has to explain the buffers"
        averaging = explained[0]
    return {"normalizes_with": "batch" if with_batch else "running", "updates_running": updates, "averaging": averaging}


COMBINATIONS = list(itertools.product((1, 2, 3), *[(True, False)] * 4, (0.3, None, 0.0)))


@pytest.mark.parametrize(("dim", "training", "buffers", "flipped", "affine", "momentum"), COMBINATIONS)
def test_describe_agrees_with_what_the_layer_does(
    dim: int, training: bool, buffers: bool, flipped: bool, affine: bool, momentum: float | None
) -> None:
    layer = build(dim, training=training, buffers=buffers, flipped=flipped, affine=affine, momentum=momentum)
    tracked = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    (said,) = describe(nn.ModuleDict({"norm": layer}))
    seen = observed(layer, batch_of(dim))
    assert {name: getattr(said, name) for name in seen} == seen
    assert said.name == "norm"
    assert said.kind == f"BatchNorm{dim}d"
    assert said.channels == CHANNELS
    assert said.training is training
    assert said.momentum == momentum
    assert said.affine is affine
    assert said.affine_trainable is affine
    assert said.num_batches_tracked == tracked
    assert (said.averaging == "none") is (not said.updates_running)


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_describe_agrees_on_inputs_without_positions(training: bool, buffers: bool) -> None:
    layer = build(1, training=training, buffers=buffers)
    (said,) = describe(layer)
    x = torch.randn(5, CHANNELS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 3 + 2
    assert {name: getattr(said, name) for name in observed(copy.deepcopy(layer), x)} == observed(layer, x)


@pytest.mark.parametrize("momentum", [0.3, None, 0.0, 1.0])
def test_describe_agrees_for_a_layer_without_a_counter(momentum: float | None) -> None:
    # Torch takes the factor 0.0 where momentum is None and there is nothing to count with.
    layer = build(2, momentum=momentum)
    layer.num_batches_tracked = None
    (said,) = describe(nn.ModuleDict({"norm": layer}))
    before = copy.deepcopy(layer)
    layer(batch_of(2))
    assert said.updates_running is (not torch.equal(layer.running_mean, before.running_mean))
    assert (said.averaging == "none") is (not said.updates_running)
    assert said.num_batches_tracked is None


def test_the_first_update_of_a_cumulative_average_is_said_to_be_cumulative() -> None:
    layer = nn.BatchNorm2d(CHANNELS, momentum=None, dtype=torch.float64)
    (said,) = describe(layer)
    assert (said.updates_running, said.averaging) == (True, "cumulative")
    assert observed(layer, batch_of(2))["averaging"] == "cumulative"


def test_momentum_one_is_exponential() -> None:
    layer = build(2, momentum=1.0)
    (said,) = describe(layer)
    assert said.averaging == "exponential" == observed(layer, batch_of(2))["averaging"]


def test_a_subclass_with_an_activation_inside_is_described_under_its_own_name() -> None:
    (said,) = describe(nn.ModuleDict({"norm": BatchNormAct2d(CHANNELS)}))
    assert said.kind == "BatchNormAct2d"
    assert (said.normalizes_with, said.updates_running, said.averaging) == ("batch", True, "exponential")


@pytest.mark.parametrize("training", [True, False])
def test_sync_batch_norm_is_described_as_the_layer_it_replaces(training: bool) -> None:
    plain = warmed(SmallResNet()).train(training)
    expected = describe(plain)
    sync = describe(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)).train(training))
    assert [entry.kind for entry in sync] == ["SyncBatchNorm"] * len(SMALL_RESNET_NAMES)
    for a, b in zip(expected, sync, strict=True):
        assert (a.normalizes_with, a.updates_running, a.averaging) == (
            b.normalizes_with,
            b.updates_running,
            b.averaging,
        )


def test_a_lazy_layer_can_be_described_before_it_knows_its_channels() -> None:
    (said,) = describe(nn.ModuleDict({"lazy": nn.LazyBatchNorm2d()}))
    assert (said.normalizes_with, said.updates_running) == ("batch", True)


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (False, False)])
def test_affine_trainable_follows_requires_grad(weight: bool, bias: bool) -> None:
    layer = build(2)
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    (said,) = describe(layer)
    assert said.affine is True
    assert said.affine_trainable is weight


def test_flipping_affine_after_construction_changes_nothing_that_is_said() -> None:
    layer = build(2)
    layer.affine = False
    out = layer.eval()(batch_of(2))
    assert not close(out, (batch_of(2) - layer.running_mean.view(1, -1, 1, 1)) / layer.running_var.view(1, -1, 1, 1))
    (said,) = describe(layer)
    assert said.affine is True  # the parameters are still there and still applied


def test_describe_lists_the_selected_layers_in_order() -> None:
    model = SmallResNet()
    assert [entry.name for entry in describe(model)] == SMALL_RESNET_NAMES
    assert [entry.name for entry in describe(model, "layer1", exclude="layer1.0")] == ["layer1.1.bn1", "layer1.1.bn2"]
    assert [entry.name for entry in describe(Holder(model), "head", root="model")] == ["model.head.bn"]


def test_describe_changes_nothing() -> None:
    model = fill_statistics(SmallResNet()).eval()
    model.layer1.train()
    before, modes = state_bits(model), [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    describe(model)
    assert state_bits(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_behavior_is_a_frozen_value() -> None:
    (said,) = describe(build(2))
    assert isinstance(said, LayerBehavior)
    assert said == describe(build(2))[0]
    with pytest.raises(AttributeError):
        said.name = "other"  # type: ignore[misc]


def test_a_frozen_layer_is_described_as_its_own_kind_that_reads_its_running_statistics() -> None:
    model = fill_statistics(SmallResNet())
    freeze_batch_norm(model, "layer1")
    model.train()
    said = {entry.name: entry for entry in describe(model)}
    frozen = said["layer1.0.bn1"]
    assert frozen.kind == "BatchNorm2d"
    assert frozen.training is False
    assert (frozen.normalizes_with, frozen.updates_running, frozen.averaging) == ("running", False, "none")
    assert frozen.affine_trainable is False
    assert said["layer2.0.bn1"].updates_running is True


# --- two claims of blogs, refuted --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_eval_without_statistics_normalizes_with_the_biased_variance_not_the_unbiased(dim: int) -> None:
    layer = build(dim, training=False, buffers=False)
    x = batch_of(dim, batch=3)
    mean, biased, unbiased = batch_statistics(x)
    assert close(layer(x), by_hand(layer, x, mean, biased))
    assert not close(layer(x), by_hand(layer, x, mean, unbiased))


def test_what_is_stored_is_the_unbiased_variance() -> None:
    layer = build(2, momentum=1.0)
    x = batch_of(2, batch=2)
    mean, biased, unbiased = batch_statistics(x)
    layer(x)
    assert close(layer.running_mean, mean)
    assert close(layer.running_var, unbiased)
    assert not close(layer.running_var, biased)


def test_running_statistics_are_buffers_not_parameters() -> None:
    layer = nn.BatchNorm2d(CHANNELS)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert {name for name, _ in layer.named_buffers()} == {"running_mean", "running_var", "num_batches_tracked"}
    assert set(layer.state_dict()) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert layer.double().running_mean.dtype == torch.float64  # moved by .to
    layer(batch_of(2)).square().sum().backward()
    assert layer.running_mean.grad is None
    assert not layer.running_mean.requires_grad


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_optimizer_owns_the_running_statistics(optimizer: type[torch.optim.Optimizer]) -> None:
    layer = build(2)
    steps = optimizer(layer.parameters(), lr=1.0, weight_decay=0.5)
    layer(batch_of(2)).square().sum().backward()
    after_forward = layer.running_mean.clone(), layer.running_var.clone()
    weight = layer.weight.detach().clone()
    steps.step()
    assert not torch.equal(layer.weight, weight)
    assert torch.equal(layer.running_mean, after_forward[0])
    assert torch.equal(layer.running_var, after_forward[1])


# --- surprises ---------------------------------------------------------------------------------------------------


def surprises(layer: nn.Module) -> tuple[str, ...]:
    (said,) = describe(nn.ModuleDict({"norm": layer}))
    assert isinstance(said.surprises, tuple)
    assert all(isinstance(sentence, str) and len(sentence.split()) >= 4 for sentence in said.surprises)
    return said.surprises


def says(layer: nn.Module, pattern: str) -> bool:
    return any(re.search(pattern, sentence, re.IGNORECASE) for sentence in surprises(layer))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_an_ordinary_layer_has_no_surprises(dim: int, affine: bool, momentum: float | None, training: bool) -> None:
    assert surprises(build(dim, training=training, affine=affine, momentum=momentum)) == ()


def test_a_new_layer_about_to_train_has_no_surprises() -> None:
    assert surprises(nn.BatchNorm2d(CHANNELS)) == ()


def test_a_layer_built_without_statistics_that_trains_has_no_flag_to_mention() -> None:
    assert not says(build(2, buffers=False), "track_running_stats.*(off|after)")


@pytest.mark.parametrize("training", [True, False])
def test_a_flag_switched_off_after_construction_is_a_surprise(training: bool) -> None:
    assert says(build(2, flipped=True, training=training), "track_running_stats")


def test_statistics_that_move_while_the_parameters_are_frozen_are_a_surprise() -> None:
    layer = build(2)
    layer.requires_grad_(False)
    assert says(layer, "requires_grad|weight|affine")
    assert says(layer, "running|statistics")
    assert surprises(layer.eval()) == ()


def test_an_eval_layer_without_statistics_is_a_surprise() -> None:
    assert says(build(2, buffers=False, training=False), "batch")


def test_statistics_that_are_still_initial_in_eval_are_a_surprise() -> None:
    layer = nn.BatchNorm2d(CHANNELS).eval()
    assert surprises(layer)
    assert says(layer, r"initial|never|no batch|\b0 and 1\b|mean 0")
    layer.train()(batch_of(2).float())
    assert surprises(layer.eval()) == ()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_statistics_that_are_not_finite_are_a_surprise(buffer: str, value: float, training: bool) -> None:
    layer = build(2, training=training)
    getattr(layer, buffer)[1] = value
    assert says(layer, "finite|nan|inf")


def test_one_inf_in_a_training_batch_is_a_surprise_ever_after() -> None:
    layer = build(2)
    x = batch_of(2)
    x[0, 0, 0, 0] = float("inf")
    layer(x)
    layer(batch_of(2))
    assert says(layer, "finite|nan|inf")
    assert says(layer.eval(), "finite|nan|inf")


def test_several_surprises_are_all_told() -> None:
    layer = build(2, flipped=True, training=False)
    layer.running_var[0] = float("nan")
    assert says(layer, "track_running_stats")
    assert says(layer, "finite|nan")
