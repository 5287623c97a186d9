"""Population statistics are those of the batches, and everything else is afterwards as it was."""

import copy
import itertools
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.nn.precise_bn import update_bn_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_bn.functional import (
    SelectionError,
    freeze_batch_norm,
    is_frozen,
    recalibrate,
    restore_snapshot,
    take_snapshot,
    unfreeze_batch_norm,
)
from tests.models import (
    SMALL_RESNET_NAMES,
    BatchNormAct2d,
    SharedNorm,
    SmallResNet,
    bits,
    fill_statistics,
    images,
    seeded,
    state_bits,
    warmed,
)
from tests.oracle import assert_all_statistics, assert_statistics_of, everything, first, generators, layer_inputs

SIZES = (1, 2, 257, 3, 64, 31, 5)


def normal(*shape: int, seed: int = 0, mean: float = 1.5, std: float = 2.0) -> Tensor:
    return mean + std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_batches(*sizes: int, **kwargs: Any) -> list[Tensor]:
    return [images(size, seed=seed, **kwargs) for seed, size in enumerate(sizes)]


def resnet() -> SmallResNet:
    return fill_statistics(seeded(SmallResNet))  # type: ignore[return-value]


def small(*parts: nn.Module) -> nn.Sequential:
    """Convolution, BatchNorm, the parts in between, BatchNorm; input (N, 3, H, W)."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *parts, nn.BatchNorm2d(4))


# The statistics


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (3,)),
        (nn.BatchNorm1d(3), (3, 7)),
        (nn.BatchNorm2d(3), (3, 4, 5)),
        (nn.BatchNorm3d(3), (3, 2, 3, 2)),
        (nn.SyncBatchNorm(3), (3, 4, 5)),
    ],
    ids=["1d", "1d-positions", "2d", "3d", "sync"],
)
def test_statistics_equal_float64_statistics_whatever_the_sizes_of_the_batches(layer, shape):
    sizes = SIZES if len(shape) > 1 else SIZES[1:]
    batches = [normal(size, *shape, seed=seed) for seed, size in enumerate(sizes)]
    result = recalibrate(layer, batches)
    assert_statistics_of(layer, torch.cat(batches).double().transpose(0, 1).flatten(1))
    assert (result.num_batches, result.num_samples, result.skipped_batches) == (len(sizes), sum(sizes), 0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [-100.0, 0.0, 1.0, 10.0, 100.0])
def test_statistics_hold_up_to_a_mean_of_100_standard_deviations(mean, memory_format):
    batches = [
        normal(size, 8, 6, 6, seed=seed, mean=mean, std=1).contiguous(memory_format=memory_format)
        for seed, size in enumerate(SIZES)
    ]
    layer = nn.BatchNorm2d(8)
    recalibrate(layer, batches)
    assert_statistics_of(layer, torch.cat(batches).double().transpose(0, 1).flatten(1))


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_statistics_hold_whatever_the_unit_of_the_input(scale):
    batches = [normal(size, 4, 3, 3, seed=seed, mean=scale, std=scale) for seed, size in enumerate(SIZES)]
    layer = nn.BatchNorm2d(4)
    recalibrate(layer, batches)
    assert_statistics_of(layer, torch.cat(batches).double().transpose(0, 1).flatten(1))


def test_variance_between_batches_counts():
    # Alternating at +-3: the mean of batch variances would be 1.
    batches = [normal(64, 2, seed=seed, mean=3.0 * (-1) ** seed, std=1) for seed in range(20)]
    layer = nn.BatchNorm1d(2)
    recalibrate(layer, batches)
    assert (layer.running_var > 9).all()
    assert_statistics_of(layer, torch.cat(batches).double().T)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_layer_of_a_deep_network_is_right_with_batches_from_a_loader(workers):
    data = TensorDataset(images(70), torch.zeros(70))
    loader = DataLoader(data, batch_size=16, num_workers=workers)
    net = resnet()
    inputs = layer_inputs(net, DataLoader(data, batch_size=16))
    result = recalibrate(net, loader)
    assert list(inputs) == list(result.layers) == SMALL_RESNET_NAMES
    assert_all_statistics(net, inputs)
    assert (result.num_batches, result.num_samples, result.requested_batches) == (5, 70, None)


def test_result_holds_the_statistics_before_and_after():
    net = resnet()
    was = take_snapshot(net)
    result = recalibrate(net, image_batches(8, 8))
    assert result.before.same_bits(was)
    assert result.after.same_bits(take_snapshot(net))
    assert not result.after.same_bits(was)
    assert result.seconds > 0
    assert (result.unreached, result.frozen, result.nonfinite, result.skipped_batches) == ((), (), {}, 0)


def test_last_batch_with_one_value_per_channel_is_skipped_and_counted():
    net = resnet()
    batches = image_batches(8, 8, 1)
    inputs = layer_inputs(net, batches[:2])
    result = recalibrate(net, batches)
    assert_all_statistics(net, inputs)
    assert (result.num_batches, result.num_samples, result.skipped_batches) == (2, 16, 1)
    assert "1 " in str(result)
    assert "one value per channel" in str(result)


def test_skipped_batch_leaves_nothing_in_a_layer_that_saw_part_of_it():
    # The shared layer was already used twice when the head finds one value per channel.
    net = nn.Sequential(SharedNorm(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    batches = image_batches(8, 6, 1)
    batches[2] = batches[2] + 50
    inputs = layer_inputs(net, batches[:2])
    result = recalibrate(net, batches)
    assert (result.num_batches, result.skipped_batches) == (2, 1)
    assert_all_statistics(net, inputs)


def test_one_value_per_channel_at_a_layer_that_is_no_target_skips_the_batch_too():
    # A layer without running statistics normalizes with the batch in eval as well, and torch refuses one value.
    net = nn.Sequential(small(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False))
    batches = image_batches(8, 6, 1)
    inputs = layer_inputs(net, batches[:2])
    result = recalibrate(net, batches)
    assert (result.num_batches, result.skipped_batches) == (2, 1)
    assert_all_statistics(net, inputs)


def test_batch_of_no_samples_changes_nothing():
    layer = nn.BatchNorm2d(3)
    batches = [*image_batches(8, 8), torch.zeros(0, 3, 6, 6)]
    recalibrate(layer, batches)
    assert_statistics_of(layer, torch.cat(batches).double().transpose(0, 1).flatten(1))


def test_layer_used_several_times_pools_all_uses():
    net = SharedNorm()
    inputs = layer_inputs(net, image_batches(4, 9))
    assert inputs["first.norm"].shape[1] == 2 * 13 * 36
    recalibrate(net, image_batches(4, 9))
    assert_all_statistics(net, inputs)


def test_shared_layer_is_listed_once():
    assert recalibrate(SharedNorm(), image_batches(4)).layers == ("first.norm", "own")


@pytest.mark.parametrize("momentum", [None, 0.0, 0.5])
def test_momentum_plays_no_part_and_is_kept(momentum):
    layer = nn.BatchNorm2d(3, momentum=momentum)
    layer.num_batches_tracked.fill_(5)
    batches = image_batches(8, 3)
    recalibrate(layer, batches)
    assert_statistics_of(layer, torch.cat(batches).double().transpose(0, 1).flatten(1))
    assert layer.momentum == momentum
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("affine", [True, False])
def test_layer_without_affine_parameters_is_recalibrated(affine):
    net = nn.Sequential(nn.BatchNorm2d(3, affine=affine), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, affine=affine))
    inputs = layer_inputs(net, image_batches(8, 5))
    recalibrate(net, image_batches(8, 5))
    assert_all_statistics(net, inputs)


def test_layer_whose_track_running_stats_was_switched_off_later_is_recalibrated_and_stays_off():
    net = small(nn.ReLU())
    net[1].track_running_stats = False
    inputs = layer_inputs(net, image_batches(8, 5))
    recalibrate(net, image_batches(8, 5))
    assert_all_statistics(net, inputs)
    assert net[1].track_running_stats is False


def test_switched_off_layer_used_several_times_pools_all_uses():
    net = SharedNorm()
    net.own.track_running_stats = net.first["norm"].track_running_stats = False
    inputs = layer_inputs(net, image_batches(8, 5))
    recalibrate(net, image_batches(8, 5))
    assert_all_statistics(net, inputs)


def test_subclass_with_the_activation_inside_is_recalibrated():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.Conv2d(4, 4, 1), BatchNormAct2d(4, momentum=None))
    inputs = layer_inputs(net, image_batches(8, 5))
    recalibrate(net, image_batches(8, 5))
    assert_all_statistics(net, inputs)


def test_input_given_by_keyword_counts():
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(input=x)

    net = ByKeyword()
    batches = image_batches(8, 5)
    recalibrate(net, batches)
    assert_statistics_of(net.bn, torch.cat(batches).double().transpose(0, 1).flatten(1))


def test_pre_hook_of_the_user_that_changes_the_input_is_seen():
    layer = nn.BatchNorm2d(3)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    batches = image_batches(8, 5)
    recalibrate(layer, batches)
    assert_statistics_of(layer, 3 * torch.cat(batches).double().transpose(0, 1).flatten(1))


def test_model_in_bf16_gets_statistics_to_the_precision_of_bf16_however_many_batches():
    layer = nn.BatchNorm2d(3).to(torch.bfloat16)
    batches = [images(4, seed=seed, dtype=torch.bfloat16) for seed in range(300)]
    recalibrate(layer, batches)
    # Eight bits of mantissa: a relative error of 2^-9 in what is stored, and as much in what is read of each batch.
    assert_statistics_of(layer, torch.cat(batches).double().transpose(0, 1).flatten(1), tolerance=2**-8)
    assert layer.running_mean.dtype == torch.bfloat16


def test_layers_of_several_dtypes_in_one_model_are_each_right():
    class ChainOfDtypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn32, self.bn64 = nn.BatchNorm2d(3), nn.BatchNorm2d(3).double()
            self.bn16, self.kept = nn.BatchNorm2d(3).bfloat16(), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn64(1 + self.bn32(x).double())
            # The last one is common: bf16 activations, a BatchNorm layer kept in float32.
            return self.kept(2 + self.bn16((x + 1).bfloat16()))

    net = ChainOfDtypes()
    inputs = layer_inputs(net, image_batches(8, 5, 64))
    recalibrate(net, image_batches(8, 5, 64))
    assert_statistics_of(net.bn32, inputs["bn32"])
    assert_statistics_of(net.bn64, inputs["bn64"], tolerance=1e-12)
    assert_statistics_of(net.bn16, inputs["bn16"], tolerance=2**-8)
    assert_statistics_of(net.kept, inputs["kept"])


def test_under_autocast_statistics_are_those_of_the_activations_that_autocast_makes():
    def run(model: nn.Module, batch: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    net = small(nn.ReLU(), nn.Conv2d(4, 4, 3))
    inputs = layer_inputs(net, image_batches(8, 5), run=run)
    recalibrate(net, image_batches(8, 5), forward=run)
    assert_all_statistics(net, inputs)
    plain = layer_inputs(net, image_batches(8, 5))
    assert not torch.equal(plain["4"], inputs["4"])


def test_model_in_channels_last_is_recalibrated():
    net = resnet().to(memory_format=torch.channels_last)
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in image_batches(16, 5, 64)]
    inputs = layer_inputs(net, batches)
    recalibrate(net, batches)
    assert_all_statistics(net, inputs)


def test_non_contiguous_input_is_counted_right():
    layer = nn.BatchNorm2d(3)
    batches = [images(8).permute(0, 1, 3, 2)[:, :, ::2], images(3, seed=1)[:, :, 1:4, 2:]]
    recalibrate(layer, batches)
    assert_statistics_of(layer, torch.cat([b.double().transpose(0, 1).flatten(1) for b in batches], 1))


# Compiled


# Tracing looks at `.grad` of tensors between compiled parts; torch hides that warning, and as an error it cannot.
traced = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_whole(net: SmallResNet, backend: Any) -> nn.Module:
    return torch.compile(net, backend=backend)


def compile_submodule(net: SmallResNet, backend: Any) -> nn.Module:
    net.layer1 = torch.compile(net.layer1, backend=backend)
    return net


def compile_in_place(net: SmallResNet, backend: Any) -> nn.Module:
    net.compile(backend=backend)
    return net


def compile_layer_in_place(net: SmallResNet, backend: Any) -> nn.Module:
    net.layer1[0].bn1.compile(backend=backend)
    net.head.compile(backend=backend)
    return net


@traced
@pytest.mark.parametrize("compiled", [compile_whole, compile_submodule, compile_in_place, compile_layer_in_place])
def test_compiled_model_is_recalibrated_like_an_eager_one_and_not_compiled_again(compiled, dynamo):
    graphs = []

    def counting(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    eager = resnet()
    net = compiled(copy.deepcopy(eager), counting)
    net.train()
    eager.train()
    for model in (net, eager):
        model(images(8))
    assert graphs
    before = len(graphs)
    expected = recalibrate(eager, image_batches(8, 8))
    result = recalibrate(net, image_batches(8, 8))
    assert result.layers == tuple(SMALL_RESNET_NAMES)
    assert torch.allclose(result.after.mean, expected.after.mean, rtol=1e-5, atol=1e-6)
    assert torch.allclose(result.after.var, expected.after.var, rtol=1e-5)
    net(images(8))
    assert len(graphs) == before, "training after a recalibration compiled again"


@traced
def test_model_compiled_through_aot_autograd_is_recalibrated(dynamo):
    net = resnet()
    inputs = layer_inputs(net, image_batches(8, 8))
    net.layer1 = torch.compile(net.layer1, backend="aot_eager")
    net.train()
    net(images(8)).sum().backward()
    recalibrate(net, image_batches(8, 8))
    net.layer1 = net.layer1._orig_mod
    assert_all_statistics(net, inputs)


# Which layers


def test_frozen_layers_are_untouched_and_listed():
    net = resnet()
    freeze_batch_norm(net, ["layer1", "head"])
    held = [name for name in SMALL_RESNET_NAMES if name.startswith(("layer1.", "head"))]
    free = [name for name in SMALL_RESNET_NAMES if name not in held]
    found = everything(net, free)
    inputs = layer_inputs(net, image_batches(8, 5), free)
    result = recalibrate(net, image_batches(8, 5))
    assert everything(net, free) == found
    assert_all_statistics(net, inputs)
    assert (list(result.layers), list(result.frozen)) == (free, held)
    assert f"{len(held)} frozen" in str(result)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_layers_stay_frozen_whatever_the_mode_of_the_model(mode):
    net = resnet()
    freeze_batch_norm(net, "layer1")
    getattr(net, mode)()
    held = {name: state_bits(net.get_submodule(name)) for name in SMALL_RESNET_NAMES if name.startswith("layer1.")}
    assert recalibrate(net, image_batches(8)).frozen == tuple(held)
    assert {name: state_bits(net.get_submodule(name)) for name in held} == held
    assert all(is_frozen(net.get_submodule(name)) for name in held)


def test_layers_in_eval_in_a_model_in_training_are_untouched_and_listed():
    net = resnet().train()
    net.layer1.eval()
    free = [name for name in SMALL_RESNET_NAMES if not name.startswith("layer1.")]
    found = everything(net, free)
    inputs = layer_inputs(net, image_batches(8, 5), free)
    result = recalibrate(net, image_batches(8, 5))
    assert everything(net, free) == found
    assert_all_statistics(net, inputs)
    assert set(result.frozen) == set(SMALL_RESNET_NAMES) - set(free)


def test_model_that_is_wholly_in_eval_is_recalibrated_and_stays_in_eval():
    net = resnet().eval()
    inputs = layer_inputs(net, image_batches(8, 5))
    result = recalibrate(net, image_batches(8, 5))
    assert_all_statistics(net, inputs)
    assert result.frozen == ()
    assert not any(module.training for module in net.modules())


def test_layer_recalibrates_after_it_is_unfrozen():
    net = resnet()
    freeze_batch_norm(net)
    with pytest.raises(ValueError, match=r"all frozen.*[Uu]nfreeze"):
        recalibrate(net, image_batches(8))
    unfreeze_batch_norm(net)
    assert recalibrate(net, image_batches(8)).layers == tuple(SMALL_RESNET_NAMES)


def test_affine_only_frozen_layers_are_recalibrated():
    net = resnet()
    freeze_batch_norm(net, stats=False, affine=True)
    assert recalibrate(net, image_batches(8)).layers == tuple(SMALL_RESNET_NAMES)


def test_only_selected_layers_are_recalibrated_and_the_others_normalize_with_what_they_have():
    net = resnet()
    chosen = [name for name in SMALL_RESNET_NAMES if name.startswith("layer1.")]
    found = everything(net, chosen)
    inputs = layer_inputs(net, image_batches(8, 5), chosen)
    result = recalibrate(net, image_batches(8, 5), modules="layer1")
    assert everything(net, chosen) == found
    assert list(result.layers) == chosen
    assert_all_statistics(net, inputs)


def test_selection_takes_root_and_exclude():
    net = nn.ModuleDict({"model": resnet()})
    result = recalibrate(
        net,
        image_batches(8),
        modules=["layer1", "head"],
        exclude="**.bn1",
        root="model",
        forward=lambda module, batch: module["model"](batch),
    )
    assert result.layers == ("model.layer1.0.bn2", "model.layer1.1.bn2", "model.head.bn")


def test_selection_that_means_nothing_is_an_error():
    with pytest.raises(SelectionError, match="laier1"):
        recalibrate(resnet(), image_batches(8), modules="laier1")


class TwoPaths(nn.Module):
    """`used` always runs, `spare` never."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_unreached_layer_is_untouched_and_listed():
    net = fill_statistics(TwoPaths())
    found = everything(net, ["used"])
    result = recalibrate(net, image_batches(8, 8))
    assert everything(net, ["used"]) == found
    assert (result.layers, result.unreached) == (("used",), ("spare",))
    assert "spare" in str(result)


def test_no_layer_reached_is_an_error_that_names_them_and_changes_nothing():
    net = fill_statistics(TwoPaths())
    found = everything(net)
    with pytest.raises(ValueError, match="spare"):
        recalibrate(net, image_batches(8, 8), modules="spare")
    assert everything(net) == found


def test_layer_reached_by_some_batches_only_pools_those():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.small(x) if len(x) < 8 else self.large(x)

    net = Routed()
    batches = image_batches(4, 16, 5, 32)
    result = recalibrate(net, batches)
    assert_statistics_of(net.small, torch.cat(batches[::2]).double().transpose(0, 1).flatten(1))
    assert_statistics_of(net.large, torch.cat(batches[1::2]).double().transpose(0, 1).flatten(1))
    assert result.unreached == ()


# Modes: what the pass must not move, and what it must


class Detector(nn.Module):
    """Returns losses in training and detections in eval, as detectors do; only training runs the loss branch."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.loss_branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Any:
        self.modes.append(self.training)
        x = self.backbone(x)
        return {"loss": self.loss_branch(x).mean()} if self.training else [x]


def test_containers_keep_their_training_flag():
    net = Detector().train()
    inputs = layer_inputs(net, image_batches(8, 5))
    result = recalibrate(net, image_batches(8, 5))
    assert net.modes == [True, True]
    assert result.unreached == ()
    assert_all_statistics(net, inputs)


def test_containers_in_eval_stay_in_eval():
    net = Detector().eval()
    result = recalibrate(net, image_batches(8, 5))
    assert net.modes == [False, False]
    assert result.unreached == ("loss_branch.1",)


class Codebook(nn.Module):
    """A leaf that moves a buffer in training, as vector quantizers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.mean()
        return x


class Attention(nn.Module):
    """Self-attention over positions with dropout inside."""

    def __init__(self, kind: type[nn.MultiheadAttention] = nn.MultiheadAttention) -> None:
        super().__init__()
        self.attend = kind(4, 2, dropout=0.9, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attend(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


class OwnAttention(nn.MultiheadAttention):
    """Somebody's subclass."""


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.9, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def old_spectral() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))


def parametrized_spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))


STATEFUL = {
    "dropout": lambda: nn.Dropout(0.9),
    "instance norm": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    "codebook": Codebook,
    "attention": Attention,
    "attention subclass": lambda: Attention(OwnAttention),
    "transformer layer": Encoder,
    "rrelu": nn.RReLU,
}


@pytest.mark.parametrize("part", STATEFUL)
def test_what_is_random_or_keeps_state_is_in_eval_during_the_pass(part):
    net = fill_statistics(seeded(lambda: small(STATEFUL[part](), nn.Conv2d(4, 4, 1)))).train()
    norms = ["1", str(len(net) - 1)]
    alone = copy.deepcopy(net)
    # Independent of how the modes are chosen: everything in eval, then the two layers in training.
    alone.eval()
    for name in norms:
        alone.get_submodule(name).training = True
    inputs = layer_inputs(alone, image_batches(8, 5), norms)
    found = everything(net, norms)
    recalibrate(net, image_batches(8, 5))
    assert everything(net, norms) == found
    assert_all_statistics(net, inputs)


class Restless(nn.Module):
    """Touches everything it can in every forward, whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("rebound", torch.zeros(3))
        self.register_buffer("vanishing", torch.ones(2))
        self.register_buffer("optional", None)

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.rebound = self.rebound + x.detach().mean()
        self.vanishing = None
        self.optional = torch.ones(1)
        self.register_buffer("new", torch.ones(1))
        random.random()
        np.random.rand()
        return x + 0 * torch.rand_like(x)


def test_buffers_generators_gradients_hooks_modes_and_counters_are_as_before():
    net = fill_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Restless(), nn.Dropout())).train()
    handles = [net[1].register_forward_hook(lambda *_: None), net[1].register_forward_pre_hook(lambda *_: None)]
    net(images(4)).sum().backward()
    fill_statistics(net)
    found, state = everything(net, ["1"]), generators()
    recalibrate(net, image_batches(8, 5))
    assert everything(net, ["1"]) == found
    assert generators() == state
    assert net[1].num_batches_tracked == 7
    assert len(handles) == len(net[1]._forward_hooks) + len(net[1]._forward_pre_hooks)


def test_model_that_keeps_a_moving_average_in_a_container_is_left_as_it_was():
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean.lerp_(x.mean(), 0.1)
            return self.bn(x)

    net = Average().train()
    found = everything(net, ["bn"])
    recalibrate(net, image_batches(8, 5))
    assert everything(net, ["bn"]) == found


def test_statistics_are_written_into_the_same_tensors():
    net = resnet()
    views = {name: net.get_submodule(name).running_mean for name in SMALL_RESNET_NAMES}
    recalibrate(net, image_batches(8))
    for name, view in views.items():
        assert net.get_submodule(name).running_mean is view
        assert view is dict(net.named_buffers())[f"{name}.running_mean"]


def test_no_gradient_is_taken():
    net = resnet()
    grads = []
    net.head.out.register_forward_hook(lambda module, args, output: grads.append(output.requires_grad))
    recalibrate(net, image_batches(8))
    assert grads == [False]
    assert torch.is_grad_enabled()


def test_training_goes_on_bit_identically():
    net, twin = resnet().train(), resnet().train()
    runs = []
    for model in (net, twin):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for step in range(4):
            if model is net and step in (1, 3):
                recalibrate(model, image_batches(8, 5))
            loss = F.dropout(model(images(8, seed=step)), 0.5).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, [bits(parameter) for parameter in model.parameters()]))
    assert runs[0] == runs[1]


# Failures: nothing has changed, and training can go on


class FailsAt(nn.Module):
    def __init__(self, inner: nn.Module, call: int, error: BaseException) -> None:
        super().__init__()
        self.inner, self.left, self.error = inner, call, error

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        self.left -= 1
        if self.left == 0:
            raise self.error
        return x


def assert_trains_as_if_nothing_had_happened(net: nn.Module, twin: nn.Module) -> None:
    outcomes = []
    for model in (net, twin):
        model.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model(images(8)).square().sum().backward()
        outcomes.append((state_bits(model), [bits(p.grad) for p in model.parameters() if p.grad is not None]))
    assert outcomes[0] == outcomes[1]


def assert_failure_leaves_no_trace(
    net: nn.Module, batches: Any, error: type[BaseException], match: str | None = None, **kwargs: Any
) -> None:
    net.train()
    twin = copy.deepcopy(net)
    random.random(), np.random.rand(), torch.rand(1)
    found, state = everything(net), generators()
    with pytest.raises(error, match=match):
        recalibrate(net, batches, **kwargs)
    assert everything(net) == found
    assert generators() == state
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert_trains_as_if_nothing_had_happened(net, twin)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 2])
def test_loader_that_fails_leaves_no_trace(after, error):
    def batches() -> Iterator[Tensor]:
        for seed in range(after):
            torch.rand(1), np.random.rand(), random.random()
            yield images(8, seed=seed)
        raise error("the disk is gone")

    assert_failure_leaves_no_trace(resnet(), batches(), error, "the disk is gone")


def test_loader_that_cannot_be_started_leaves_no_trace():
    class Broken:
        def __iter__(self) -> Iterator[Tensor]:
            raise OSError("no such folder")

    assert_failure_leaves_no_trace(resnet(), Broken(), OSError, "no such folder")


PLACES = (
    "conv1",
    "bn1",
    "layer1.0.conv1",
    "layer1.0.bn1",
    "layer1.1",
    "layer2.0.bn2",
    "layer10",
    "head.bn",
    "head.out",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", [1, 3])
def test_forward_that_fails_at_any_depth_leaves_no_trace(place, call):
    net = resnet()
    freeze_batch_norm(net, "layer2")

    def forward(model: nn.Module, batch: Tensor, calls: list[int] = [0]) -> Any:  # noqa: B006
        calls[0] += 1
        fails = calls[0] == call

        def raise_it(*_: Any) -> None:
            raise ArithmeticError(place)

        handle = model.get_submodule(place).register_forward_hook(raise_it) if fails else None
        try:
            return model(batch)
        finally:
            if handle is not None:
                handle.remove()

    assert_failure_leaves_no_trace(net, image_batches(8, 8, 8, 8), ArithmeticError, place, forward=forward)


def test_keyboard_interrupt_in_the_forward_leaves_no_trace():
    def forward(model: nn.Module, batch: Tensor) -> Any:
        model(batch)
        raise KeyboardInterrupt

    net = nn.Sequential(resnet(), nn.Dropout(0.5))
    assert_failure_leaves_no_trace(net, image_batches(8, 8), KeyboardInterrupt, forward=forward)


class DiesAt(Dataset[Tensor]):
    """Ends the process that reads item 20."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        if index == 20:
            time.sleep(0.5)  # the batches before have been taken over
            os._exit(3)
        return images(1, seed=index)[0]


def feed_from_a_worker_that_dies() -> None:
    loader = DataLoader(DiesAt(), batch_size=8, num_workers=1)
    assert_failure_leaves_no_trace(resnet(), loader, RuntimeError, "worker")


def test_worker_that_dies_leaves_no_trace():
    # In a process of its own: torch raises in the parent of a dead worker whenever, and whatever it is doing.
    process = multiprocessing.get_context("fork").Process(target=feed_from_a_worker_that_dies)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_forward_that_breaks_the_model_and_fails_is_undone():
    def forward(model: nn.Module, batch: Tensor) -> Any:
        model(batch)
        model.eval()
        model.bn1.running_mean = torch.full((4,), 9.0)
        model.head.bn.num_batches_tracked = torch.tensor(99)
        model.layer1[0].bn1.momentum = 0.7
        raise RuntimeError("broken")

    assert_failure_leaves_no_trace(resnet(), image_batches(8), RuntimeError, "broken", forward=forward)


# Values that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_batch_is_skipped_by_the_layers_it_reaches_and_the_next_one_counts(value):
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hit, self.spared = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            return self.hit(x), self.spared(x.nan_to_num(0, 0, 0))

    net = Parallel()
    batches = image_batches(8, 5, 16, 3)
    batches[1][0, 1, 0, 0] = value
    result = recalibrate(net, batches)
    good = torch.cat([batches[0], *batches[2:]])
    assert_statistics_of(net.hit, good.double().transpose(0, 1).flatten(1))
    spared = torch.cat(batches).nan_to_num(0, 0, 0)
    assert_statistics_of(net.spared, spared.double().transpose(0, 1).flatten(1))
    assert result.nonfinite == {"hit": 1}
    assert (result.num_batches, result.skipped_batches) == (4, 0)
    assert "hit" in str(result)


def test_non_finite_batch_is_left_out_by_every_layer_behind_it():
    net = resnet()
    batches = image_batches(8, 5, 16)
    batches[1][0, 0, 0, 0] = torch.nan
    inputs = layer_inputs(net, [batches[0], batches[2]])
    result = recalibrate(net, batches)
    assert_all_statistics(net, inputs)
    assert result.nonfinite == dict.fromkeys(SMALL_RESNET_NAMES, 1)


def test_non_finite_use_of_a_layer_used_several_times_is_left_out_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            return self.bn(x), self.bn(x.nan_to_num(0))

    net = Twice()
    batches = image_batches(8, 5)
    batches[0][0, 0, 0, 0] = torch.nan
    result = recalibrate(net, batches)
    good = torch.cat([batches[0].nan_to_num(0), batches[1], batches[1]])
    assert_statistics_of(net.bn, good.double().transpose(0, 1).flatten(1))
    assert result.nonfinite == {"bn": 1}


def test_layer_that_only_ever_sees_non_finite_values_is_untouched_and_counted():
    class Spoilt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.spoiled = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            return self.fine(x), self.spoiled(x / 0)

    net = fill_statistics(Spoilt())
    found = everything(net, ["fine"])
    result = recalibrate(net, image_batches(8, 8))
    assert everything(net, ["fine"]) == found
    assert (result.layers, result.nonfinite) == (("fine",), {"spoiled": 2})


def test_data_that_are_never_finite_are_an_error_that_names_layers_and_change_nothing():
    batches = [torch.full((8, 3, 6, 6), torch.nan)] * 2
    assert_failure_leaves_no_trace(resnet(), batches, ValueError, "bn1")


def test_statistics_that_were_not_finite_are_repaired():
    net = resnet()
    net.bn1.running_mean.fill_(torch.inf)
    net.bn1.running_var.fill_(torch.nan)
    inputs = layer_inputs(net, image_batches(8, 5))
    result = recalibrate(net, image_batches(8, 5))
    assert_all_statistics(net, inputs)
    assert "bn1" in str(result), "a layer that was not finite is what was off most"


def test_constant_channel_gets_a_variance_of_zero():
    layer = nn.BatchNorm2d(3)
    batches = image_batches(8, 5)
    for batch in batches:
        batch[:, 1] = 4.0
    recalibrate(layer, batches)
    assert layer.running_mean[1] == 4
    assert layer.running_var[1] == 0


# Bad input


@pytest.mark.parametrize("number", [0, -3])
def test_fewer_batches_than_one_are_refused(number):
    assert_failure_leaves_no_trace(resnet(), image_batches(8), ValueError, f"num_batches={number}", num_batches=number)


@pytest.mark.parametrize("batches", [[], iter(()), DataLoader(TensorDataset(torch.zeros(0, 3)))])
def test_empty_loader_is_an_error(batches):
    assert_failure_leaves_no_trace(resnet(), batches, ValueError, "no batch|empty")


@pytest.mark.parametrize(
    "batches", [images(8), {"x": images(8)}, "train", 7, None], ids=["tensor", "dict", "string", "number", "none"]
)
def test_what_is_no_iterable_of_batches_is_refused(batches):
    assert_failure_leaves_no_trace(resnet(), batches, TypeError, type(batches).__name__)


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ({"image": images(8)}, "image"),
        ({"x": images(8), "label": torch.zeros(8)}, "label"),
        ({}, "keys"),
        (("a.png", images(8)), "str"),
        ([], "list"),
        (object(), "object"),
        (None, "NoneType"),
    ],
    ids=["wrong key", "key too many", "no keys", "path first", "empty list", "object", "none"],
)
def test_batch_that_cannot_be_fed_is_an_error_that_says_what_to_do(batch, named):
    assert_failure_leaves_no_trace(resnet(), [batch], TypeError, rf"{named}(?s:.*)forward=")


def test_error_of_the_model_itself_on_a_dict_is_not_taken_for_wrong_keys():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) + "a"  # type: ignore[operator]

    with pytest.raises(TypeError, match=r"unsupported operand"):
        recalibrate(Picky(), [{"x": images(8)}])


def test_only_batches_with_one_value_per_channel_are_an_error_that_names_the_layer():
    assert_failure_leaves_no_trace(resnet(), image_batches(1, 1), ValueError, r"head\.bn")


def test_model_without_batch_norm_is_an_error():
    with pytest.raises(SelectionError):
        recalibrate(nn.Linear(2, 2), [torch.zeros(4, 2)])


def test_named_layer_without_running_statistics_is_an_error():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(SelectionError, match="'1'"):
        recalibrate(net, image_batches(8), modules="1")
    assert recalibrate(net, image_batches(8)).layers == ("0",)


def test_loader_that_ends_early_is_used_and_said():
    net = resnet()
    inputs = layer_inputs(net, image_batches(8, 5, 4))
    result = recalibrate(net, image_batches(8, 5, 4), num_batches=20)
    assert_all_statistics(net, inputs)
    assert (result.num_batches, result.requested_batches) == (3, 20)
    assert "3 of 20" in str(result)


def test_iterator_is_not_advanced_beyond_num_batches():
    source = iter(image_batches(8, 8, 8, 8))
    assert recalibrate(resnet(), source, num_batches=2).num_batches == 2
    assert len(list(source)) == 2


def test_skipped_batches_count_towards_num_batches():
    source = iter(image_batches(8, 1, 8, 8))
    result = recalibrate(resnet(), source, num_batches=3)
    assert (result.num_batches, result.skipped_batches) == (2, 1)
    assert len(list(source)) == 1


def test_result_is_one_sentence_of_plain_numbers():
    text = str(recalibrate(resnet(), image_batches(8, 5)))
    assert "\n" not in text
    assert "10 BatchNorm layers" in text
    assert "13 samples" in text


# What is fed


def test_dict_is_fed_as_keywords_and_a_tuple_by_its_first_element():
    net = resnet()
    data = images(8)
    results = [
        recalibrate(net, [batch]).after
        for batch in (data, (data, torch.zeros(8)), [data, "meta"], {"x": data}, (data,))
    ]
    assert all(result.same_bits(results[0]) for result in results)


def test_forward_is_given_the_model_and_each_batch():
    calls = []
    net = resnet()

    def forward(model: nn.Module, batch: dict[str, Any]) -> Any:
        calls.append((model is net, sorted(batch)))
        return model(batch["image"])

    result = recalibrate(net, [{"image": images(8), "path": ["a"] * 8}] * 2, forward=forward)
    assert calls == [(True, ["image", "path"])] * 2
    assert result.num_samples == 16


def test_samples_are_unknown_where_a_batch_has_no_tensor():
    result = recalibrate(resnet(), [[1, 2], [3]], forward=lambda model, seeds: model(images(8, seed=seeds[0])))
    assert (result.num_batches, result.num_samples) == (2, None)
    assert "2 batches" in str(result)


def test_batches_move_to_the_device_of_the_model_whatever_they_are_made_of():
    class Graphs:
        def __init__(self, x: Tensor) -> None:
            self.x, self.moved = x, []

        def to(self, device: torch.device) -> "Graphs":
            self.moved.append(device)
            return self

    batch = {"graphs": [Graphs(images(8))]}
    recalibrate(resnet(), [batch], forward=lambda model, batch: model(batch["graphs"][0].x))
    assert batch["graphs"][0].moved == [torch.device("cpu")]


# Surroundings


def test_it_works_under_inference_mode_and_training_works_afterwards():
    net, twin = resnet().train(), resnet().train()
    batches = image_batches(8, 5)
    with torch.inference_mode():
        recalibrate(net, batches)
        recalibrate(net, image_batches(8, 5))
    recalibrate(twin, image_batches(8, 5))
    assert not any(buffer.is_inference() for buffer in net.buffers())
    assert_trains_as_if_nothing_had_happened(net, twin)


def test_result_made_under_inference_mode_can_be_written_back_later():
    net = resnet()
    found = state_bits(net)
    with torch.inference_mode():
        result = recalibrate(net, image_batches(8, 5))
    restore_snapshot(net, result.before)
    assert state_bits(net) == found
    net.train()(images(8)).sum().backward()


def test_it_can_be_called_from_another_thread():
    net = resnet()
    inputs = layer_inputs(net, image_batches(8, 5))
    thread = threading.Thread(target=recalibrate, args=(net, image_batches(8, 5)))
    thread.start()
    thread.join()
    assert_all_statistics(net, inputs)


def test_recalibrating_twice_changes_nothing_more():
    net = resnet()
    once = recalibrate(net, image_batches(8, 5)).after
    again = recalibrate(net, image_batches(8, 5))
    assert again.before.same_bits(once)
    assert again.after.same_bits(once)


def test_layer_that_is_not_yet_initialized_and_no_batch_norm_does_not_stop_it():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.LazyInstanceNorm2d(track_running_stats=True))
    batches = image_batches(8, 5)
    recalibrate(net, batches)
    assert_statistics_of(net[0], torch.cat(batches).double().transpose(0, 1).flatten(1))


def test_forward_may_read_the_counter_of_its_layers():
    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) if self.bn.num_batches_tracked.item() >= 0 else x

    net = Curious()
    assert recalibrate(net, image_batches(8, 5)).layers == ("bn",)
    assert net.bn.num_batches_tracked == 0


@given(
    cuts=st.lists(st.integers(2, 58), max_size=12),
    seed=st.integers(0, 2**16),
    mean=st.floats(-100, 100),
    std=st.floats(0.01, 100),
)
@settings(max_examples=60)
def test_any_split_of_the_data_into_batches_gives_the_same_statistics(cuts, seed, mean, std):
    mean = max(-100 * std, min(100 * std, mean))
    data = normal(60, 3, 4, seed=seed, mean=mean, std=std)
    ends = sorted({0, *cuts, 60})
    batches = [data[a:b] for a, b in itertools.pairwise(ends)]
    layer = nn.BatchNorm1d(3)
    recalibrate(layer, batches)
    assert_statistics_of(layer, data.double().transpose(0, 1).flatten(1))


# Against others: the same where they are right, right where they are not


def test_fvcore_agrees_after_the_bessel_factor():
    ours, theirs = resnet().train(), resnet().train()
    # Even batches: fvcore weighs them rightly, and 64-bit layers keep its difference of squares harmless.
    ours.double(), theirs.double()
    batches = image_batches(16, 16, 9, dtype=torch.float64)
    recalibrate(ours, batches)
    update_bn_stats(theirs, batches, num_iters=3)
    for name in SMALL_RESNET_NAMES:
        count = 41 if name == "head.bn" else 41 * 36
        a, b = ours.get_submodule(name), theirs.get_submodule(name)
        assert torch.allclose(a.running_mean, b.running_mean, rtol=1e-9, atol=1e-12)
        assert torch.allclose(a.running_var, b.running_var * count / (count - 1), rtol=1e-9)


def test_fvcore_writes_zeros_to_an_unreached_layer_and_we_do_not():
    theirs = fill_statistics(TwoPaths()).train()
    update_bn_stats(theirs, image_batches(8), num_iters=1)
    assert (theirs.spare.running_var == 0).all()
    ours = fill_statistics(TwoPaths()).train()
    found = state_bits(ours.spare)
    recalibrate(ours, image_batches(8))
    assert state_bits(ours.spare) == found


def test_fvcore_leaves_its_momentum_and_hooks_behind_when_the_loader_ends_early_and_we_use_what_came():
    theirs = resnet().train()
    with pytest.raises(AssertionError):
        update_bn_stats(theirs, image_batches(8), num_iters=5)
    assert theirs.bn1.momentum == 1.0
    assert theirs.bn1._forward_pre_hooks
    ours = resnet().train()
    assert recalibrate(ours, image_batches(8), num_batches=5).num_batches == 1
    assert ours.bn1.momentum == 0.1
    assert not ours.bn1._forward_pre_hooks


def test_fvcore_replaces_buffers_and_we_write_into_them():
    theirs, ours = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    theirs_found, ours_found = theirs.running_mean, ours.running_mean
    update_bn_stats(theirs, image_batches(8), num_iters=1)
    recalibrate(ours, image_batches(8))
    assert theirs.running_mean is not theirs_found
    assert ours.running_mean is ours_found


def test_fvcore_refuses_a_layer_used_twice_and_we_pool_its_uses():
    with pytest.raises(AssertionError):
        update_bn_stats(SharedNorm(), image_batches(8), num_iters=1)
    net = SharedNorm()
    inputs = layer_inputs(net, image_batches(8))
    recalibrate(net, image_batches(8))
    assert_all_statistics(net, inputs)


def test_fvcore_counts_batches_and_we_count_values_at_a_large_mean():
    # Its E[x^2] - E[x]^2 in float32 loses the variance that the pooled merge keeps.
    batches = [normal(64, 2, 4, 4, seed=seed, mean=1000, std=1) for seed in range(8)]
    values = torch.cat(batches).double().transpose(0, 1).flatten(1)
    theirs, ours = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    update_bn_stats(theirs, batches, num_iters=8)
    recalibrate(ours, batches)
    truth = values.var(1)
    assert ((theirs.running_var - truth).abs() / truth).max() > 0.01
    assert ((ours.running_var - truth).abs() / truth).max() < 1e-4


def test_update_bn_weighs_batches_equally_and_misses_the_variance_between_them_and_we_do_not():
    batches = [normal(64, 2, seed=0, mean=3, std=1), normal(8, 2, seed=1, mean=-3, std=1)]
    values = torch.cat(batches).double().T
    theirs, ours = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    update_bn(batches, theirs)
    recalibrate(ours, batches)
    assert (theirs.running_var < 2).all()
    assert_statistics_of(ours, values)


def test_update_bn_resets_an_unreached_layer_and_we_leave_it():
    theirs, ours = fill_statistics(TwoPaths()), fill_statistics(TwoPaths())
    found = state_bits(ours.spare)
    update_bn(image_batches(8), theirs)
    recalibrate(ours, image_batches(8))
    assert (theirs.spare.running_mean == 0).all()
    assert state_bits(ours.spare) == found


def test_update_bn_rewrites_layers_in_eval_and_we_leave_them():
    theirs, ours = resnet().train(), resnet().train()
    for net in (theirs, ours):
        net.layer1.eval()
    found = state_bits(ours.layer1)
    update_bn(image_batches(8), theirs)
    recalibrate(ours, image_batches(8))
    assert state_bits(theirs.layer1) != found
    assert state_bits(ours.layer1) == found


def test_update_bn_disturbs_other_layers_and_we_do_not():
    theirs, ours = (small(nn.InstanceNorm2d(4, track_running_stats=True), nn.Dropout()) for _ in range(2))
    state = generators()
    recalibrate(ours, image_batches(8))
    assert generators() == state
    assert (ours[2].running_mean == 0).all()
    update_bn(image_batches(8), theirs)
    assert (theirs[2].running_mean != 0).any()
    assert generators() != state


def test_fewer_samples_than_a_batch_are_used_and_not_written_as_zeros():
    # pycls and mmpretrain run no iteration where fewer samples are asked for than a batch has.
    layer = nn.BatchNorm2d(3)
    recalibrate(layer, image_batches(257), num_batches=1)
    assert (layer.running_var > 1).all()


def test_warmed_models_are_what_they_say():
    # The oracle itself: with one batch it agrees with what torch stores at momentum 1.
    net = warmed(seeded(SmallResNet))
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    inputs = layer_inputs(net, image_batches(16), run=first)
    with torch.no_grad():
        net(images(16, seed=0))
    assert_all_statistics(net, inputs)
