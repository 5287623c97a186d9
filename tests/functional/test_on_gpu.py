"""The ground floor on a GPU: the same results as on a CPU, in half precision, compiled, and over two devices."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional import freeze_batch_norm, recalibrate, task_statistics
from tests.models import SmallResNet, fill_statistics, images, seeded, state_bits
from tests.oracle import assert_all_statistics, layer_inputs

pytestmark = pytest.mark.gpu
BATCHES = [images(8, seed=seed) for seed in range(4)]


class OnTwoDevices(nn.Module):
    """The first half on the CPU, the second on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).cuda()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.cpu()).cuda())


def in_bf16(model: Any, batch: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return model(batch.cuda())


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    return fill_statistics(seeded(SmallResNet)).to("cuda", dtype)


@pytest.mark.parametrize("estimator", ["pooled", "mean_of_batches"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_a_recalibration_gives_the_populations_statistics(
    dtype: torch.dtype, tolerance: float, layout: torch.memory_format, estimator: Any
) -> None:
    model = model_of(dtype).to(memory_format=layout)
    batches = [batch.to("cuda", dtype, memory_format=layout) for batch in BATCHES]
    twin = copy.deepcopy(model).train()
    with torch.backends.cudnn.flags(allow_tf32=False):
        recalibrate(model, batches, estimator=estimator)
        inputs = layer_inputs(twin, batches)
    assert_all_statistics(model, inputs, tolerance if estimator == "pooled" else 0.1)


def test_a_recalibration_under_autocast() -> None:
    model = model_of()
    twin = copy.deepcopy(model).train()
    recalibrate(model, BATCHES, forward=in_bf16)
    assert_all_statistics(model, layer_inputs(twin, BATCHES, run=in_bf16), 1e-3)


def test_a_recalibration_of_layers_on_two_devices() -> None:
    model = seeded(OnTwoDevices)
    twin = copy.deepcopy(model).train()
    recalibrate(model, BATCHES)
    assert_all_statistics(model, layer_inputs(twin, BATCHES), 1e-4)


def test_a_compiled_model_is_recalibrated_as_the_plain_one() -> None:
    torch.compiler.reset()
    plain, compiled = model_of(), model_of()
    compiled.compile()
    compiled.eval()(BATCHES[0].cuda())
    for model in (plain, compiled):
        recalibrate(model, [batch.cuda() for batch in BATCHES])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-3)


def test_a_frozen_model_compiled_by_inductor_steps_as_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr("lightning_bn.functional.freezing.memory_efficient.LEAST", 0)
    monkeypatch.setattr("lightning_bn.functional.freezing.memory_efficient.LEAST_ON_ACCELERATORS", 0)
    found = []
    for compiled in (False, True):
        model = model_of().train()
        freeze_batch_norm(model)
        before = state_bits(model)
        step = torch.compile(model, fullgraph=True) if compiled else model
        x = images(8).cuda().requires_grad_()
        step(x).square().sum().backward()
        norms = {name for name, _ in model.named_buffers()}
        assert {name: state_bits(model)[name] for name in norms} == {name: before[name] for name in norms}
        found.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 5
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_rows_of_several_tasks_are_those_of_separate_models(training: bool, autocast: bool) -> None:
    model = model_of().train(training)
    separate = {task: copy.deepcopy(model) for task in "ab"}
    bank = task_statistics(model, ["a", "b"], start="shared")
    x = images(10).cuda()
    rows = {"a": [0, 3, 4, 7, 9], "b": [1, 2, 5, 6, 8]}
    which = ["a" if row in rows["a"] else "b" for row in range(10)]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.backends.cudnn.flags(allow_tf32=False):
        with bank.rows(which):
            found = model(x)
        for task, one in separate.items():
            wanted = one(x[rows[task]])
            torch.testing.assert_close(found[rows[task]], wanted, **({"rtol": 0.1, "atol": 0.1} if autocast else {}))
