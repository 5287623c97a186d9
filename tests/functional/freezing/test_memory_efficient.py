"""A frozen layer keeps nothing of its input for the backward, and gives what torch's layer in evaluation gives."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn import functional as of_torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_bn.functional import (
    FreezeSelection,
    FreezeSession,
    batch_norm_layers,
    freeze_batch_norm,
    frozen_batch_norm,
    unfreeze_batch_norm,
)
from lightning_bn.functional.freezing.freeze import freeze_layers, unfreeze_layers
from lightning_bn.functional.freezing.memory_efficient import LEAST, LEAST_ON_ACCELERATORS
from tests.models import BatchNormAct2d, SmallResNet, bits, fill_statistics, images, seeded, warmed


@pytest.fixture(autouse=True)
def _small_inputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bn.functional.freezing.memory_efficient.LEAST", 0)


class ActivationAfter(nn.BatchNorm2d):
    """An activation inside, after torch's own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


class ByPosition(nn.BatchNorm2d):
    """A forward of its own that comes to torch's function with positions only."""

    def forward(self, values: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return of_torch.batch_norm(values, mean, variance, self.weight, self.bias, self.training, 0.1, self.eps)


class Twofold(nn.BatchNorm2d):
    """A second layer inside, in eval mode, whose parameters train."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.inner = fill_statistics(nn.BatchNorm2d(channels)).eval()

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(super().forward(input))


class OfTheBatch(nn.BatchNorm2d):
    """It normalizes with the batch whatever its mode is."""

    def forward(self, input: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(input, mean, variance, self.weight, self.bias, training=True, momentum=0.0, eps=self.eps)


KINDS = [nn.BatchNorm2d, nn.SyncBatchNorm, ActivationAfter, BatchNormAct2d, ByPosition]
SHAPES: dict[Any, list[tuple[int, ...]]] = {
    nn.BatchNorm1d: [(32, 5), (8, 5, 11)],
    nn.BatchNorm2d: [(4, 5, 7, 6), (2, 16, 8, 8)],
    nn.BatchNorm3d: [(3, 5, 4, 3, 2)],
}
CHANNELS_LAST: dict[int, torch.memory_format] = {4: torch.channels_last, 5: torch.channels_last_3d}


def layer_of(kind: Any = nn.BatchNorm2d, channels: int = 5, **arguments: Any) -> Any:
    """With values that are not those of construction."""
    return fill_statistics(seeded(lambda: kind(channels, **arguments)))


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (4, 5, 7, 6), generator=generator, dtype=torch.float64).to(dtype)


def leaf(*shape: int, **arguments: Any) -> Tensor:
    return batch(*shape, **arguments).requires_grad_()


def freeze_for_a_session(layer: Any) -> None:
    """Freeze as a session does, which keeps ``requires_grad`` and drops the gradients before the step."""
    required = [parameter.requires_grad for parameter in layer.parameters()]
    freeze_layers(batch_norm_layers(layer), stats=True, affine=True, owner="a session", constant=True)
    for parameter, one in zip(layer.parameters(), required, strict=True):
        parameter.requires_grad_(one)


def by_hand(layer: Any) -> Any:
    """A copy in eval mode."""
    return copy.deepcopy(layer).eval()


def kept(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of storages that are kept for the backward, beside those of the model's parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(found.values())


def pulled_back(layer: nn.Module, input: Tensor) -> list[Tensor]:
    """What the layer gives, and the gradient of its input."""
    x = input.detach().clone().requires_grad_()
    output = layer(x)
    last = CHANNELS_LAST.get(output.dim())
    form = last if last and output.is_contiguous(memory_format=last) else torch.contiguous_format
    output.backward(batch(*output.shape, seed=1).to(output).contiguous(memory_format=form))
    assert x.grad is not None
    return [output.detach(), x.grad]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, torchs in zip(found, wanted, strict=True):
        assert (mine.dtype, mine.stride()) == (torchs.dtype, torchs.stride())
        assert bits(mine) == bits(torchs)


# values and gradients


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("dtype", "of_layer"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False])
def test_values_and_gradients_have_the_bits_of_torchs_layer_in_evaluation(
    kind: Any, dtype: torch.dtype, of_layer: torch.dtype, affine: bool
) -> None:
    for shape, last, required in itertools.product(SHAPES[kind], (False, True), (False, True)):
        layer = layer_of(kind, shape[1], affine=affine).to(of_layer)
        expected = by_hand(layer.requires_grad_(required))
        freeze_for_a_session(layer)
        x = batch(*shape, dtype=dtype)
        x = x.to(memory_format=CHANNELS_LAST[x.dim()]) if last and x.dim() in CHANNELS_LAST else x
        assert_same_bits(pulled_back(layer.train(), x), pulled_back(expected, x))
        for parameter in layer.parameters():
            assert (parameter.grad is not None) is required
            assert not required or not parameter.grad.count_nonzero()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_layer_gives_the_bits_of_its_own_evaluation(kind: Any) -> None:
    layer = layer_of(kind)
    expected = by_hand(layer)
    freeze_batch_norm(layer)
    assert_same_bits(pulled_back(layer, batch()), pulled_back(expected, batch()))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_first_and_second_derivatives_are_those_of_finite_differences(affine: bool, last: bool) -> None:
    layer = layer_of(affine=affine).double()
    freeze_batch_norm(layer)
    x = batch(3, 5, 2, 2, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_penalty_is_that_of_torchs_layer(dtype: torch.dtype) -> None:
    layer = layer_of()
    expected = by_hand(layer).requires_grad_(False)
    freeze_batch_norm(layer)
    found = []
    for one in (layer, expected):
        x = leaf(dtype=dtype)
        (gradient,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_any_layout_give_the_layout_that_torchs_layer_gives(dtype: torch.dtype, last: bool) -> None:
    layer = layer_of()
    expected = by_hand(layer)
    freeze_batch_norm(layer)
    for form in (torch.contiguous_format, torch.channels_last):
        for reduce in (Tensor.sum, lambda y: y.mean((2, 3)).square().sum(), lambda y: y.flatten(1).square().sum()):
            found = []
            for one in (layer, expected):
                x = leaf(dtype=dtype).detach().contiguous(memory_format=form).requires_grad_()
                y = reduce(one(x).transpose(2, 3) if last else one(x))
                found.append([*torch.autograd.grad(y, x)])  # as it is: a leaf's own has the layout of the leaf
            assert_same_bits(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 7, 6), (4, 5, 0, 6)])
def test_an_empty_batch_has_an_empty_gradient(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # As a region head without proposals.
    for affine in (True, False):
        layer = layer_of(affine=affine)
        freeze_batch_norm(layer)
        x = leaf(*shape, dtype=dtype)
        layer(x).sum().backward()
        assert x.grad.shape == shape


class Backwards(TorchDispatchMode):
    """Keeps what torch's kernel for the backward is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            self.given.append(args)
        return func(*args, **(kwargs or {}))


def test_torchs_kernel_gets_the_tensors_that_the_one_for_cuda_asserts_empty() -> None:
    layer = layer_of()
    freeze_batch_norm(layer)
    output = layer(batch(dtype=torch.bfloat16).requires_grad_())
    with Backwards() as backwards:
        output.sum().backward()
    [(*_, save_mean, save_invstd, training, _, _)] = backwards.given
    assert (save_mean.numel(), save_invstd.numel(), training) == (0, 0, False)


def test_gradients_of_several_outputs_at_once_are_those_of_torchs_layer() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer_of()
        expected = by_hand(layer).requires_grad_(False)
        freeze_batch_norm(layer)
        found = []
        for one in (layer, expected):
            x = leaf(2, 5, 3, 3, dtype=dtype)
            y = one(x)
            many = batch(3, *y.shape, seed=2, dtype=dtype)
            found += torch.autograd.grad(y, x, many, is_grads_batched=True)
        torch.testing.assert_close(*found)


class WithoutBias(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.bias

    def forward(self, layer: Tensor) -> Tensor:
        return F.batch_norm(layer, self.running_mean, self.running_var, self.weight, None, self.training, 0.1, self.eps)


def test_a_layer_without_a_bias_attribute_and_with_any_name_for_its_input() -> None:
    layer: Any = WithoutBias(5)
    layer.running_var.mul_(2)
    layer.running_mean.add_(1)
    freeze_batch_norm(layer)
    assert kept(partial(layer, layer=leaf()), layer) == 0


def test_a_gradient_penalty_gives_weight_and_bias_zeros_too() -> None:
    layer = layer_of()
    freeze_for_a_session(layer)
    x = leaf()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert not any(parameter.grad.count_nonzero() for parameter in layer.parameters())


def test_autocast_gives_the_dtype_and_the_bits_that_torchs_layer_gives() -> None:
    net = nn.Sequential(nn.Conv2d(5, 5, 3), layer_of(), nn.Conv2d(5, 2, 1))
    expected = by_hand(net)
    freeze_batch_norm(net)
    found = []
    for one in (net, expected):
        x = leaf()
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        y.float().square().sum().backward()
        found.append((y.dtype, bits(y), bits(x.grad), bits(one[0].weight.grad)))
    assert found[0] == found[1]
    assert found[0][0] is torch.bfloat16


def test_what_torchs_layer_refuses_is_refused_with_the_same_words() -> None:
    layer = layer_of()
    expected = by_hand(layer)
    freeze_batch_norm(layer)
    for wrong in (leaf(4, 5, 3), leaf(4, 6, 3, 3), leaf(4, 5, 3, 3, dtype=torch.float64)):
        said = []
        for one in (layer, expected):
            with pytest.raises((ValueError, RuntimeError)) as refused:
                one(wrong)
            said.append((refused.type, str(refused.value)))
        assert said[0] == said[1]


def test_a_batch_without_channels_is_refused_as_a_synchronized_layer_refuses_it() -> None:
    layer = layer_of(nn.SyncBatchNorm)
    freeze_batch_norm(layer)
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        layer(leaf(4, 0, 3, 3))


def test_a_layer_whose_flag_is_set_directly_trains() -> None:
    # Whoever froze it notices; what it gives is what torch's layer in train mode gives.
    layer = layer_of()
    expected = copy.deepcopy(layer).train()
    freeze_batch_norm(layer)
    layer.training = True
    assert_same_bits(pulled_back(layer, batch()), pulled_back(expected, batch()))
    assert bits(layer.running_mean) == bits(expected.running_mean)


def test_what_else_a_layers_own_forward_normalizes_is_not_touched() -> None:
    layer = layer_of(Twofold)
    expected = by_hand(layer)
    freeze_batch_norm(layer, exclude="inner")
    assert_same_bits(pulled_back(layer.eval(), batch()), pulled_back(expected, batch()))
    assert bits(layer.inner.weight.grad) == bits(expected.inner.weight.grad)
    assert expected.inner.weight.grad.count_nonzero()


def test_a_forward_that_normalizes_with_the_batch_still_does() -> None:
    layer = layer_of(OfTheBatch)
    expected = by_hand(layer)
    freeze_batch_norm(layer)
    assert_same_bits(pulled_back(layer, batch()), pulled_back(expected, batch()))


# what is kept


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, ByPosition], ids=lambda kind: kind.__name__)
def test_nothing_is_kept_for_the_backward(kind: Any, required: bool) -> None:
    layer = layer_of(kind)
    assert kept(lambda: layer.eval()(leaf()), layer) > 0
    freeze_for_a_session(layer.train().requires_grad_(required))
    assert kept(lambda: layer(leaf()), layer) == 0
    if required:
        assert kept(lambda: layer(batch()), layer) == 0


@pytest.mark.parametrize("kind", [ActivationAfter, BatchNormAct2d], ids=lambda kind: kind.__name__)
def test_of_a_layer_with_an_activation_only_what_the_activation_needs_is_kept(kind: Any) -> None:
    layer = layer_of(kind)
    freeze_batch_norm(layer)
    assert kept(lambda: layer(leaf()), layer) == batch().untyped_storage().nbytes()


def test_layers_in_one_two_and_three_dimensions_keep_nothing() -> None:
    for kind, shapes in SHAPES.items():
        for shape in shapes:
            layer, x = layer_of(kind, shape[1]), leaf(*shape)
            freeze_batch_norm(layer)
            assert kept(partial(layer, x), layer) == 0


def test_without_memory_efficient_as_much_is_kept_as_torchs_layer_keeps() -> None:
    layer = layer_of()
    expected = by_hand(layer).requires_grad_(False)
    freeze_batch_norm(layer, memory_efficient=False)
    wanted = kept(lambda: expected(leaf()), expected)
    assert kept(lambda: layer(leaf()), layer) == wanted > 0


def test_inputs_that_are_not_worth_it_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    layer = layer_of(channels=4)
    freeze_batch_norm(layer)
    small, large = leaf(4, 4, 32, 31), leaf(4, 4, 32, 32)
    assert kept(partial(layer, small), layer) >= small.untyped_storage().nbytes()
    assert large.numel() == LEAST
    assert kept(partial(layer, large), layer) == 0


def test_a_gpu_keeps_larger_inputs_too_since_it_would_wait_for_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    layer = layer_of(channels=4)
    freeze_batch_norm(layer)
    layer.to("meta")  # as any device that is no CPU
    small, large = (torch.empty(4, 4, 256, width, device="meta", requires_grad=True) for width in (255, 256))
    assert large.numel() == LEAST_ON_ACCELERATORS
    assert "BatchNorm" in type(layer(small).grad_fn).__name__
    assert "Constant" in type(layer(large).grad_fn).__name__


def test_an_evaluation_runs_the_layers_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    freeze_batch_norm(layer)
    monkeypatch.setattr("lightning_bn.functional.freezing.memory_efficient._normalize", None)
    with torch.no_grad():
        layer(leaf())
    with torch.inference_mode():
        layer(batch())
    layer(batch())  # nothing requires a gradient
    with pytest.raises(TypeError):
        layer(leaf())


# owners, and what is frozen


@pytest.mark.parametrize(("stats", "affine", "named"), [(True, False, "affine=False"), (False, True, "stats=False")])
def test_memory_efficient_without_both_frozen_is_refused(stats: bool, affine: bool, named: str) -> None:
    layer = layer_of()
    asked: dict[str, Any] = {"stats": stats, "affine": affine, "memory_efficient": True}
    with pytest.raises(ValueError, match=f"memory_efficient=True with {named}"):
        freeze_batch_norm(layer, **asked)
    with pytest.raises(ValueError, match=named), frozen_batch_norm(layer, **asked):
        pass
    with pytest.raises(ValueError, match=named):
        FreezeSelection(**asked)
    with pytest.raises(ValueError, match="memory_efficient='yes' must be True or False"):
        freeze_batch_norm(layer, memory_efficient="yes")  # type: ignore[arg-type]
    assert type(layer) is nn.BatchNorm2d


def of_parameters(layer: _BatchNorm) -> list[bytes | None]:
    """The gradients of weight and bias after one backward."""
    layer.zero_grad()
    pulled_back(layer, batch())
    return [None if parameter.grad is None else bits(parameter.grad) for parameter in layer.parameters()]


def test_frozen_statistics_alone_leave_the_gradients_of_weight_and_bias() -> None:
    layer = layer_of()
    wanted = of_parameters(by_hand(layer))
    freeze_batch_norm(layer, affine=False)
    assert of_parameters(layer) == wanted


def test_weight_and_bias_that_require_a_gradient_again_get_it() -> None:
    # As freeze_batch_norm says: nobody drops these gradients, and zeros would have weight decay move the parameters.
    layer = layer_of()
    wanted = of_parameters(by_hand(layer))
    freeze_batch_norm(layer)
    layer.requires_grad_()
    assert of_parameters(layer) == wanted


def test_statistics_frozen_again_leave_the_layer_as_efficient_as_it_was() -> None:
    layer = layer_of()
    freeze_batch_norm(layer)
    freeze_batch_norm(layer, affine=False)
    assert kept(lambda: layer(leaf()), layer) == 0
    freeze_batch_norm(layer, memory_efficient=False)
    assert kept(lambda: layer(leaf()), layer) > 0


class Conditional(nn.BatchNorm2d):
    """Weights of its own and of another layer's, which trains."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.embedding = nn.Embedding(3, channels)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight + self.embedding(torch.tensor(1))
        return F.batch_norm(input, self.running_mean, self.running_var, weight, self.bias, self.training, 0.1, self.eps)


class WithGain(nn.BatchNorm2d):
    """A parameter under another name in the place of the weight."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(2 * torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.gain, None, self.training, 0.1, self.eps)


@pytest.mark.parametrize("freeze", [freeze_batch_norm, freeze_for_a_session])
def test_a_parameter_of_another_name_trains(freeze: Callable[[Any], Any]) -> None:
    layer = layer_of(WithGain)
    expected = by_hand(layer)
    freeze(layer)
    assert_same_bits(pulled_back(layer, batch()), pulled_back(expected, batch()))
    assert bits(layer.gain.grad) == bits(expected.gain.grad)


@pytest.mark.parametrize("freeze", [freeze_batch_norm, freeze_for_a_session])
def test_what_a_layer_computes_its_weights_of_trains(freeze: Callable[[Any], Any]) -> None:
    layer = layer_of(Conditional)
    expected = by_hand(layer)
    freeze(layer)
    assert_same_bits(pulled_back(layer, batch()), pulled_back(expected, batch()))
    assert bits(layer.embedding.weight.grad) == bits(expected.embedding.weight.grad)
    assert expected.embedding.weight.grad.count_nonzero()


@pytest.mark.parametrize("freeze", [freeze_batch_norm, freeze_for_a_session])
def test_weights_that_functional_call_puts_there_get_their_gradient(freeze: Callable[[Any], Any]) -> None:
    layer = layer_of()
    expected = by_hand(layer)
    freeze(layer)
    found = []
    for one in (layer, expected):
        weight = (2 * torch.ones(5)).requires_grad_()
        torch.func.functional_call(one, {"weight": 1 * weight}, (batch(),)).square().sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_weight_and_bias_get_gradients_when_no_owner_is_left_for_whom_they_are_constants() -> None:
    layer = layer_of()
    layers, wanted = {"layer": layer}, of_parameters(by_hand(layer))
    zeros = [bits(torch.zeros_like(parameter)) for parameter in layer.parameters()]
    for owner in ("one", "other"):
        freeze_layers(layers, stats=True, affine=True, owner=owner, constant=True)
    freeze_layers(layers, stats=True, affine=False, owner="of statistics")
    layer.requires_grad_()
    assert of_parameters(layer) == zeros
    unfreeze_layers(layers, stats=True, affine=True, owner="one")
    layer.requires_grad_()
    assert of_parameters(layer) == zeros
    unfreeze_layers(layers, stats=True, affine=True, owner="other")
    assert not layer.training
    assert of_parameters(layer) == wanted


def test_statistics_of_one_owner_and_affine_of_another_are_not_constants_together() -> None:
    # The one that freezes weight and bias may do so for a task only.
    layer = layer_of()
    layers, wanted = {"layer": layer}, of_parameters(by_hand(layer))
    freeze_layers(layers, stats=True, affine=False, owner="of statistics")
    freeze_layers(layers, stats=False, affine=True, owner="of affine")
    layer.requires_grad_()
    assert of_parameters(layer) == wanted


def test_affine_can_be_unfrozen_alone() -> None:
    layer = layer_of()
    wanted = of_parameters(by_hand(layer))
    freeze_batch_norm(layer)
    unfreeze_batch_norm(layer, stats=False)
    assert not layer.training
    assert of_parameters(layer) == wanted


def test_a_context_may_end_before_its_backward() -> None:
    layer = layer_of()
    wanted = pulled_back(by_hand(layer), batch())[1]
    x = leaf()
    with frozen_batch_norm(layer):
        y = layer(x)
    y.backward(batch(seed=1))
    assert bits(x.grad) == bits(wanted)
    assert type(layer) is nn.BatchNorm2d
    assert kept(lambda: layer(leaf()), layer) > 0


def test_layers_of_a_task_keep_nothing_while_it_runs() -> None:
    model = nn.Sequential(layer_of(), nn.Conv2d(5, 5, 1), layer_of())
    one = batch().untyped_storage().nbytes()

    def of_task(task: str, **arguments: Any) -> int:
        session = FreezeSession(model, FreezeSelection(by_task={"a": "0"}, **arguments))
        session.start_batch(0, task=task)
        found = kept(lambda: model(leaf()), model)
        session.end_batch(1)
        session.close(1)
        return found

    assert of_task("b") - of_task("a") >= one
    assert of_task("a", memory_efficient=False) - of_task("a") >= one


# values that are written to


@pytest.mark.parametrize("write", ["copy_", "data", "data of another", "load_state_dict", "another tensor"])
def test_the_next_step_uses_values_that_were_written(write: str) -> None:
    layer, other = layer_of(), layer_of()
    with torch.no_grad():
        other.running_var.mul_(3)
        other.weight.mul_(2)
    freeze_batch_norm(layer)
    before = pulled_back(layer, batch())
    if write == "copy_":
        with torch.no_grad():
            layer.running_var.copy_(other.running_var)
            layer.weight.copy_(other.weight)
    elif write == "data":
        # It leaves no version behind.
        layer.running_var.data.copy_(other.running_var)
        layer.weight.data.copy_(other.weight)
    elif write == "data of another":
        layer.running_var.data = other.running_var.clone()
        layer.weight.data = other.weight.detach().clone()
    elif write == "load_state_dict":
        layer.load_state_dict(other.state_dict())
    else:
        layer.running_var = other.running_var.clone()
        layer.weight = nn.Parameter(other.weight.detach().clone(), False)
    after = pulled_back(layer, batch())
    assert_same_bits(after, pulled_back(other.eval(), batch()))
    assert bits(after[1]) != bits(before[1])


@pytest.mark.parametrize("value", ["running_var", "weight", "bias"])
def test_what_is_written_between_forward_and_backward_is_an_error_where_it_is_one_with_torchs_layer(value: str) -> None:
    layer = layer_of()
    expected = by_hand(layer).requires_grad_(False)
    freeze_batch_norm(layer)
    said = []
    for one in (layer, expected):
        y = one(leaf())
        with torch.no_grad():
            getattr(one, value).mul_(2)
        try:
            y.sum().backward()
        except RuntimeError as error:
            said.append("modified by an inplace operation" in str(error))
        else:
            said.append(False)
    assert said == [value != "bias"] * 2


# copies, transformations, compilers


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_nothing_either(copied: Callable[[Any], Any]) -> None:
    layer = layer_of()
    freeze_batch_norm(layer)
    other = copied(layer)
    assert kept(lambda: other(leaf()), other) == 0
    unfreeze_batch_norm(other)
    assert type(other) is nn.BatchNorm2d
    assert kept(lambda: layer(leaf()), layer) == 0


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A network with a frozen layer, and the same with one in eval mode by hand."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), layer_of(request.param), nn.Conv2d(5, 2, 1)))
    expected = by_hand(net)
    freeze_batch_norm(net)
    return net, expected


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_function_transforms_give_what_they_give_for_torchs_layer(pair: tuple[Any, Any]) -> None:
    net, expected = pair
    x, many = batch(2, 3, 6, 6), batch(3, 2, 3, 6, 6)
    for transformed in (
        lambda net: torch.vmap(net)(many),
        lambda net: torch.func.jvp(net, (x,), (many[0],)),
        lambda net: torch.func.grad(lambda x: net(x).square().sum())(x),
        lambda net: torch.vmap(torch.func.grad(lambda x: net(x).square().sum()))(many),
        lambda net: torch.func.vjp(net, x)[1](torch.ones(2, 2, 4, 4)),
    ):
        torch.testing.assert_close(transformed(net), transformed(expected))


def test_forward_mode_gives_what_it_gives_for_torchs_layer(pair: tuple[Any, Any]) -> None:
    found = []
    for net in pair:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(batch(2, 3, 6, 6), batch(2, 3, 6, 6, seed=1))
            found.append(forward_ad.unpack_dual(net(dual)).tangent)
    assert found[0] is not None
    torch.testing.assert_close(*found)


def test_a_frozen_network_is_compiled_as_one_graph(pair: tuple[Any, Any]) -> None:
    torch._dynamo.reset()
    net, expected = pair
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for required in (False, True):
        unfreeze_batch_norm(net)
        if required:
            freeze_for_a_session(net[1].requires_grad_())
        else:
            freeze_batch_norm(net)
        found = []
        for one, run in ((net, compiled), (expected, expected)):
            one.zero_grad()
            y = run(batch(2, 3, 6, 6))
            y.square().sum().backward()
            found.append((y, one[0].weight.grad, one[2].weight.grad))
        torch.testing.assert_close(found[0], found[1])
        for parameter in net[1].parameters():
            assert (parameter.grad is not None) is required
            assert not required or not parameter.grad.count_nonzero()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_traced_exported_and_scripted_it_is_torchs_layer(pair: tuple[Any, Any]) -> None:
    net, expected = pair
    x = batch(2, 3, 6, 6)
    made: dict[str, Any] = {"traced": torch.jit.trace(net, x), "exported": torch.export.export(net, (x,)).module()}
    if not isinstance(net[1], nn.SyncBatchNorm | ActivationAfter):
        # TorchScript knows no super(), and no processes.
        made["scripted"] = torch.jit.script(net)
    if not isinstance(net[1], ActivationAfter):
        # What is no layer of torch's is traced through, in which torch's own check of the dimensions stands.
        unfreeze_batch_norm(net)
        freeze_for_a_session(net[1].requires_grad_())
        made["traced by fx"] = torch.fx.symbolic_trace(net)
    assert not [node for node in made["exported"].graph.nodes if "autograd" in str(node.target)]
    for name, one in made.items():
        torch.testing.assert_close(one(x), expected(x))
        if name in ("traced", "scripted"):
            torch.jit.save(one, io.BytesIO())
    assert kept(lambda: net[1](leaf()), net[1]) <= batch().untyped_storage().nbytes()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_give_the_same_gradients(reentrant: bool) -> None:
    found = []
    for frozen in (True, False):
        net: Any = warmed(seeded(SmallResNet))
        if frozen:
            freeze_batch_norm(net, "layer1")
        else:
            for layer in batch_norm_layers(net, "layer1").values():
                layer.eval().requires_grad_(False)
        x = torch.relu(net.bn1(net.conv1(images())))
        checkpoint(net.layer1, x, use_reentrant=reentrant).square().sum().backward()
        found.append([bits(p.grad) for p in net.parameters() if p.grad is not None])
    assert found[0] == found[1]
    assert len(found[0]) > 4


def test_a_policy_for_what_is_recomputed_sees_the_same_operators_every_time() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept_ones = operator is torch.ops.aten.add.Tensor
        return CheckpointPolicy.MUST_SAVE if kept_ones else CheckpointPolicy.PREFER_RECOMPUTE

    layer = layer_of()
    expected = by_hand(layer).requires_grad_(False)
    freeze_batch_norm(layer)
    context = partial(create_selective_checkpoint_contexts, policy)
    for _ in range(3):
        found = []
        for one in (layer, expected):
            x = leaf()
            checkpoint(
                lambda x, one=one: x + one(x), x, use_reentrant=False, context_fn=context
            ).square().sum().backward()
            found.append([x.grad])
        assert_same_bits(*found)


def test_what_runs_on_fake_tensors_leaves_nothing_behind() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = layer_of()
    wanted = pulled_back(by_hand(layer), batch())
    freeze_batch_norm(layer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(leaf())
    with torch.inference_mode(), torch.enable_grad():
        layer(batch())
    assert_same_bits(pulled_back(layer, batch()), wanted)


def test_what_is_kept_may_lie_elsewhere_meanwhile() -> None:
    layer = layer_of()
    wanted = pulled_back(by_hand(layer), batch())
    freeze_batch_norm(layer)
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(pulled_back(layer, batch()), wanted)


def test_a_layer_may_be_given_its_input_by_name() -> None:
    for layer, name in ((layer_of(), "input"), (layer_of(BatchNormAct2d), "x"), (layer_of(ByPosition), "values")):
        freeze_batch_norm(layer)
        kept_now = kept(partial(layer, **{name: leaf()}), layer)
        assert kept_now <= batch().untyped_storage().nbytes()
        assert bool(kept_now) is isinstance(layer, BatchNormAct2d)


def test_what_follows_may_write_to_what_the_layer_gives() -> None:
    layer = layer_of()
    expected = nn.Sequential(by_hand(layer), nn.ReLU(inplace=True))
    freeze_batch_norm(layer)
    assert_same_bits(pulled_back(nn.Sequential(layer, nn.ReLU(inplace=True)), batch()), pulled_back(expected, batch()))
