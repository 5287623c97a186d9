"""On a GPU: what a frozen layer gives, and what torch's allocator holds for its backward."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bn.functional import freeze_batch_norm
from tests.functional.freezing.test_memory_efficient import KINDS, batch, by_hand, layer_of, pulled_back

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _small_inputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bn.functional.freezing.memory_efficient.LEAST", 0)
    monkeypatch.setattr("lightning_bn.functional.freezing.memory_efficient.LEAST_ON_ACCELERATORS", 0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [True, False])
def test_values_have_the_bits_of_torchs_layer_and_gradients_its_accuracy(
    kind: Any, dtype: torch.dtype, last: bool
) -> None:
    layer = layer_of(kind).cuda()
    expected = by_hand(layer)
    freeze_batch_norm(layer)
    x = batch(dtype=dtype).cuda()
    x = x.to(memory_format=torch.channels_last) if last else x
    (found, gradient), (wanted, torchs) = pulled_back(layer, x), pulled_back(expected, x)
    assert torch.equal(found, wanted)
    assert (gradient.dtype, gradient.stride()) == (torchs.dtype, torchs.stride())
    torch.testing.assert_close(gradient, torchs)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_allocator_holds_no_input_of_a_frozen_layer(autocast: bool) -> None:
    net = nn.Sequential(nn.Conv2d(5, 64, 3), layer_of(channels=64), nn.ReLU(), nn.Conv2d(64, 4, 1)).cuda()
    x = batch(8, 5, 66, 66).cuda()
    held = []
    for memory_efficient in (True, False):
        one = copy.deepcopy(net)
        freeze_batch_norm(one, memory_efficient=memory_efficient)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            one(x)  # cuDNN's workspace
            before = torch.cuda.memory_allocated()
            y = one(x)
        held.append(torch.cuda.memory_allocated() - before)
        y.float().sum().backward()
        del y  # of the next one none of it is freed
    assert held[1] - held[0] >= 8 * 64 * 64 * 64 * (2 if autocast else 4)


def test_a_captured_graph_replays_the_step_of_torchs_layer() -> None:
    net = nn.Sequential(nn.Conv2d(5, 5, 3), layer_of(), nn.Conv2d(5, 2, 1)).cuda()
    expected = by_hand(net)
    freeze_batch_norm(net)
    held = batch().cuda()

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        y: torch.Tensor = model(x)
        y.square().sum().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(net, held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(net, held)
    held.copy_(batch(seed=1).cuda())
    graph.replay()
    torch.testing.assert_close(found, step(expected, batch(seed=1).cuda()))
    torch.testing.assert_close(net[0].weight.grad, expected[0].weight.grad)


def test_a_network_compiled_by_inductor_gives_the_same_gradients() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Conv2d(3, 5, 3), layer_of(), nn.SiLU(), nn.Conv2d(5, 2, 1)).cuda()
    expected = by_hand(net)
    freeze_batch_norm(net)
    found = []
    for one, run in ((net, torch.compile(net, fullgraph=True)), (expected, expected)):
        y = run(batch(2, 3, 6, 6).cuda())
        y.square().sum().backward()
        found.append((y, one[0].weight.grad, one[3].weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
