"""A fit whose frozen layers keep nothing of their inputs is the fit of layers that do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import BatchNormFreezer
from lightning_bn.callbacks._lightning.namespaces import MisconfigurationException
from tests.callbacks.freezing_fits import BODY, PretrainedClassifier, adamw, fit, freezer, layers, said, sgd, state
from tests.callbacks.test_freezer import ManuallyClipped


@pytest.fixture(autouse=True)
def _small_inputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bn.functional.freezing.memory_efficient.LEAST", 0)


class Noting(PretrainedClassifier):
    """Notes every loss, and the bytes that the backward of the step keeps beside parameters and buffers."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses: list[Tensor] = []
        self.kept = 0

    def loss(self, batch: Any) -> Tensor:
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.parameters(), *self.buffers())}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().loss(batch)
        if self.training:
            self.losses.append(loss.detach())
            self.kept = sum(size for pointer, size in found.items() if pointer not in own)
        return loss


class NotingManual(Noting, ManuallyClipped):
    pass


@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(lambda: Noting(optimizer=sgd), {}, id="SGD"),
        pytest.param(lambda: Noting(optimizer=adamw), {"accumulate_grad_batches": 3}, id="accumulated"),
        pytest.param(lambda: Noting(optimizer=adamw), {"gradient_clip_val": 0.05}, id="clipped by norm"),
        pytest.param(lambda: Noting(optimizer=adamw), {"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param(lambda: Noting(optimizer=adamw), {"precision": "bf16-true"}, id="bf16-true"),
        pytest.param(lambda: NotingManual(optimizer=sgd), {}, id="manual"),
    ],
)
def test_two_hundred_steps_have_the_losses_and_weights_of_layers_that_keep_their_inputs(
    build: Any, options: dict[str, Any]
) -> None:
    found = []
    for memory_efficient in (None, False):
        module, frozen = build(), freezer(memory_efficient=memory_efficient)
        fit(module, frozen, max_epochs=50, limit_val_batches=1, **options)
        assert frozen.report is not None
        assert frozen.report.identical
        assert len(module.losses) >= 200
        found.append((module, state(module), torch.stack(module.losses)))
    (efficient, state_now, losses), (keeping, state_then, losses_then) = found
    # On a CPU bit for bit. The losses as they are promised everywhere:
    torch.testing.assert_close(losses, losses_then, rtol=1e-5, atol=0)
    assert state_now == state_then
    assert efficient.kept < keeping.kept


def test_a_compiled_network_keeps_nothing_either() -> None:
    found = []
    for memory_efficient in (None, False):
        torch._dynamo.reset()
        module = Noting(optimizer=sgd)
        module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
        fit(module, freezer(memory_efficient=memory_efficient))
        found.append(torch.stack(module.losses))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_a_scheduled_unfreeze_gives_the_gradients_back() -> None:
    found = []
    for memory_efficient in (None, False):
        module = PretrainedClassifier(optimizer=adamw)
        before = state(module)
        fit(module, freezer(stop_epoch=1, memory_efficient=memory_efficient))
        assert all(state(module)[f"{name}.weight"] != before[f"{name}.weight"] for name in BODY)
        found.append(state(module))
    assert found[0] == found[1]


def test_affine_parameters_of_frozen_layers_get_zeros_that_are_dropped_before_the_step() -> None:
    seen = []

    class Looking(PretrainedClassifier):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            seen.append([layers(self)[name].weight.grad for name in BODY])

    module = Looking()
    got: list[Tensor] = []
    for name in BODY:
        layers(module)[name].weight.register_hook(got.append)
    fit(module, freezer())
    assert len(got) == 16
    assert not any(gradient.count_nonzero() for gradient in got)
    assert seen
    assert all(gradient is None for step in seen for gradient in step)


def test_statistics_alone_cannot_be_asked_to_be_memory_efficient() -> None:
    with pytest.raises(MisconfigurationException, match="memory_efficient=True with affine=False"):
        BatchNormFreezer(affine=False, memory_efficient=True)


def test_a_run_may_be_resumed_with_the_other_setting(tmp_path: Any) -> None:
    module = PretrainedClassifier(optimizer=sgd)
    trainer = fit(module, freezer(memory_efficient=False), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = PretrainedClassifier(optimizer=sgd)
    with said() as lines:
        fit(resumed, freezer(memory_efficient=True), ckpt_path=tmp_path / "last.ckpt")
    assert not any("another plan" in line for line in lines)
    whole = PretrainedClassifier(optimizer=sgd)
    fit(whole, freezer())
    assert state(resumed) == state(whole)


def test_layers_inside_of_a_network_that_is_fixed_cost_nothing() -> None:
    # Nothing below the head requires a gradient, so that the layers run as they are.
    module = Noting(optimizer=sgd)
    module.net.body.requires_grad_(False)
    fit(module, freezer())
    one = module.kept
    other = Noting(optimizer=sgd)
    other.net.body.requires_grad_(False)
    fit(other, freezer(memory_efficient=False))
    assert isinstance(module.net.body, nn.Module)
    assert other.kept == one
