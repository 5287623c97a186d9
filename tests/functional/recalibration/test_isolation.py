"""Each context gives back what it found, also after an exception; the modes of a pass are those that are needed."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_bn.functional import WeightsMovedError, recalibrate, take_snapshot
from lightning_bn.functional._random import preserved_rng
from lightning_bn.functional.layers.names import named_paths
from lightning_bn.functional.recalibration.isolation import preserved_modes, run_as_written, set_modes_for_statistics
from lightning_bn.functional.recalibration.preserved_tensors import preserved_tensors
from tests.models import BatchNormAct2d, SmallResNet, bits, fill_statistics, images, seeded
from tests.oracle import everything, generators

ROOT = Path(__file__).parents[3]


def model() -> nn.Module:
    return fill_statistics(seeded(SmallResNet))


def ends(error: type[BaseException] | None):
    """Where an error is expected of the context's body."""
    return pytest.raises(error) if error else pytest.MonkeyPatch.context()


def named(net: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in named_paths(net)}


ERRORS = pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, GeneratorExit])


def end(error: type[BaseException] | None) -> None:
    if error:
        raise error


@ERRORS
def test_random_number_generators_are_given_back(error):
    random.random(), np.random.rand(), torch.rand(1)
    state = generators()
    with ends(error), preserved_rng():
        random.random(), np.random.rand(5), torch.rand(3)
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        end(error)
    assert generators() == state


def test_numpy_is_not_loaded_for_the_sake_of_its_generator():
    # torch itself imports numpy where it is installed, so it is hidden here.
    script = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch\nfrom lightning_bn.functional._random import preserved_rng\n"
        "del sys.modules['numpy']\n"
        "with preserved_rng(): torch.rand(1)\n"
        "print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@ERRORS
def test_modes_are_given_back_one_by_one(error):
    net = model()
    net.layer1.eval()
    net.head.bn.eval()
    found = everything(net)
    with ends(error), preserved_modes([*net.modules()]):
        net.eval()
        net.layer1.train()
        end(error)
    assert everything(net) == found


def test_modes_are_given_back_without_calling_train():
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("called")

    net = nn.Sequential(Stubborn(2, 2))
    with preserved_modes([*net.modules()]):
        net[0].training = False
    assert net[0].training


@ERRORS
def test_buffers_are_given_back_as_objects_and_bits(error):
    net = model()
    net.bn1.running_var[0] = torch.nan
    found = everything(net)
    with ends(error), preserved_tensors(named(net)):
        net.bn1.running_mean += 1
        net.layer1[0].bn1.running_mean = torch.zeros(4)
        net.layer1[0].bn2.running_mean = None
        net.head.register_buffer("new", torch.ones(1))
        del net.layer2[0].bn1._buffers["running_var"]
        end(error)
    assert everything(net) == found


def test_buffers_that_did_not_change_are_not_written_to():
    net = model()
    versions = [buffer._version for buffer in net.buffers()]
    with preserved_tensors(named(net)):
        net.bn1.num_batches_tracked += 0
    assert [b._version for b in net.buffers()][:2] == versions[:2]
    assert [b._version for b in net.buffers()][3:] == versions[3:]


def test_buffer_shared_by_two_modules_is_given_back_to_both():
    a, b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    b.running_mean = a.running_mean
    with preserved_tensors({a: "a", b: "b"}):
        b.running_mean += 1
        a.running_mean = torch.ones(2)
    assert a.running_mean is b.running_mean
    assert (a.running_mean == 0).all()


def test_buffers_of_any_dtype_are_given_back():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for dtype in (torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.complex64):
                self.register_buffer(f"b_{dtype}".replace(".", "_"), torch.ones(3, dtype=dtype))
            self.register_buffer("empty", torch.zeros(0))
            self.register_buffer("scalar", torch.tensor(1.0))
            self.register_buffer("transposed", torch.arange(6.0).reshape(2, 3).T)

    net = Many()
    found = everything(net)
    with preserved_tensors(named(net)):
        for buffer in net.buffers():
            buffer.zero_()
    assert everything(net) == found


def test_targets_train_leaves_rest_and_containers_keep_their_mode():
    net = nn.ModuleDict(
        {
            "target": nn.BatchNorm2d(3),
            "other": nn.BatchNorm2d(3),
            "activated": BatchNormAct2d(3),
            "drop": nn.Dropout(),
            "attend": nn.MultiheadAttention(4, 2),
            "plain": nn.Sequential(nn.Linear(2, 2)),
            "listed": nn.ModuleList([nn.Linear(2, 2)]),
            "resting": nn.Sequential(nn.Linear(2, 2)).eval(),
            "own": SmallResNet(),
            "recurrent": nn.LSTM(2, 2, 2, dropout=0.5),
        }
    )
    set_modes_for_statistics([*net.modules()], [net["target"], net["activated"]])
    training = {name: module.training for name, module in net.items()}
    assert training == {
        "target": True,
        "other": False,
        "activated": True,
        "drop": False,
        "attend": False,
        "plain": True,
        "listed": True,
        "resting": False,
        "own": True,
        "recurrent": False,
    }
    assert not net["activated"].act.training
    assert not net["plain"][0].training
    assert net.training


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_code_runs_eagerly_inside_and_compiled_outside():
    torch._dynamo.reset()
    compiled_runs = []

    def backend(graph, example):
        def run(*args):
            compiled_runs.append(1)
            return graph.forward(*args)

        return run

    net = torch.compile(nn.Linear(3, 2), backend=backend)
    data = images(2, size=3)
    net(data)
    with run_as_written():
        net(data)
    assert len(compiled_runs) == 1
    net(data)
    assert len(compiled_runs) == 2
    torch._dynamo.reset()


def test_dynamo_is_not_loaded_where_nothing_is_compiled():
    script = (
        "import sys, torch\nfrom torch import nn\nfrom lightning_bn.functional import recalibrate\n"
        "recalibrate(nn.BatchNorm1d(2), [torch.randn(4, 2)])\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("change", ["resized", "data", "transposed", "dtype"])
def test_buffer_that_changes_its_form_is_as_it_was(change):
    class Observer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.arange(6.0).reshape(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if change == "resized":
                self.seen.resize_(0)
            elif change == "dtype":
                self.seen.data = self.seen.data.double()
            else:
                self.seen.data = torch.zeros(5) if change == "data" else self.seen.data.t().contiguous().t()
            return x

    model = nn.Sequential(Observer(), nn.BatchNorm1d(2))
    seen = model[0].seen
    recalibrate(model, [torch.randn(4, 2)])
    assert model[0].seen is seen
    assert seen.stride() == (3, 1)
    assert torch.equal(seen, torch.arange(6.0).reshape(2, 3))


def test_weights_and_gradients_that_a_forward_moves_are_as_they_were():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
    model[0].weight.grad = torch.ones(2, 2)
    gradient, teacher = model[0].weight.grad, model[2].weight.clone()

    def forward(model: nn.Module, x: torch.Tensor) -> None:
        with torch.enable_grad():
            model(x).sum().backward()
        model[2].weight.data.mul_(2)

    recalibrate(model, [torch.randn(4, 2)], forward=forward)
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(2, 2))
    assert model[0].bias.grad is None
    assert torch.equal(model[2].weight, teacher)


def test_trained_weight_that_a_forward_moves_is_an_error_and_nothing_is_changed():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = take_snapshot(model)
    weight, kept = model[0].weight, model[0].weight.detach().clone()

    def forward(model: nn.Module, x: torch.Tensor) -> None:
        model(x)
        model[0].weight.data.mul_(2)

    with pytest.raises(WeightsMovedError, match=r"trained weight '0\.weight'"):
        recalibrate(model, [torch.randn(4, 2)], forward=forward)
    assert model[0].weight is weight
    assert torch.equal(weight, kept)
    assert take_snapshot(model).same_bits(before)


@pytest.mark.parametrize(
    "change", [lambda model: model.double(), lambda model: model.bfloat16(), lambda model: model.half()]
)
def test_a_forward_that_changes_the_form_of_weights_with_gradients_is_put_back(change):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net(torch.randn(8, 4)).sum().backward()
    values = {name: bits(value) for name, value in net.state_dict().items()}
    gradients = [parameter.grad for parameter in net.parameters()]
    with pytest.raises(WeightsMovedError, match=r"trained weights '0\.weight'"):
        recalibrate(net, [torch.randn(8, 4)], forward=lambda model, x: (model(x), change(model[0])))
    assert {name: bits(value) for name, value in net.state_dict().items()} == values
    assert all(parameter.grad is one for parameter, one in zip(net.parameters(), gradients, strict=True))
