"""A diagnosis leaves the model, its gradients and the random number generators bit for bit as they were."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional import diagnose, freeze_batch_norm
from tests.functional.doctor.cases import CASES, Case, values
from tests.models import Broken, SmallResNet, fill_statistics, images, seeded
from tests.oracle import everything, generators


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.rule} {case.name}") for case in CASES])
def test_patients_are_left_as_they_were(case: Case) -> None:
    patient = case.ill()
    torch.rand(3)
    found, state = everything(patient.model), generators()
    diagnose(patient.model, patient.batch, more_batches=patient.more)
    assert everything(patient.model) == found
    assert generators() == state


class WritesEverything(nn.Module):
    """Writes to a weight, a buffer and a teacher in each training forward, and fails if asked to."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.net, self.fails = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), fails
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            for mine, other in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
                other.lerp_(mine, 0.1)
                mine.add_(1)
        self.net.eval()
        if self.fails:
            raise Broken
        return self.net(x) + self.teacher(x)


class HoldsMore(nn.Module):
    """Holds and changes what is neither a weight nor a buffer, and registers more in each forward."""

    shared: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.queue, self.seen, self.steps = torch.zeros(4), [torch.zeros(4)], 0
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("later", None)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.queue += x.mean(0)
        self.seen[0] += 1
        self.seen.append(x)
        self.shared.append(1)
        self.last = x
        self.bn.momentum = 0.5
        self.later = x.mean(0)
        self.register_buffer("made", torch.ones(1), persistent=False)
        self.add_module("head", nn.Identity())
        self.bn.register_forward_hook(lambda *args: None)
        return self.bn(x + torch.randn(x.shape, generator=self.generator))


def held(net: HoldsMore) -> Any:
    tensors = [net.queue.tolist(), [one.tolist() for one in net.seen], net.generator.get_state().tolist()]
    return everything(net), tensors, list(net.shared), {name: id(value) for name, value in vars(net).items()}


def test_what_a_model_holds_beside_weights_and_buffers_is_put_back() -> None:
    net = HoldsMore()
    found = held(net)
    diagnose(net, values(), more_batches=[values(seed=1)])
    assert held(net) == found
    assert "made" not in net._non_persistent_buffers_set


class WritesToItsBatch(nn.Module):
    """Writes to all that it is given, and takes the labels out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4))

    def forward(self, x: Tensor, more: Any) -> Tensor:
        assert more.pop("label") == 1
        more["deep"][0].mul_(2)
        assert float(more["deep"][0].sum()) == 8.0
        return self.net(x)


def test_a_forward_that_writes_to_its_batch_starts_anew_each_time() -> None:
    batch: Any = {"x": values(), "more": {"label": 1, "deep": [torch.ones(4)]}}
    diagnose(WritesToItsBatch(), batch)
    assert torch.equal(batch["x"], values())
    assert batch["more"]["label"] == 1
    assert batch["more"]["deep"][0].tolist() == [1.0] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_that_writes_to_everything_is_undone(fails: bool) -> None:
    net = WritesEverything(fails)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    found, state = everything(net), generators()
    with pytest.raises(Broken) if fails else pytest.MonkeyPatch.context():
        diagnose(net, values())
    assert everything(net) == found
    assert generators() == state


def test_training_goes_on_as_if_nobody_had_looked() -> None:
    def trained(look: bool) -> Any:
        torch.manual_seed(0)
        net = seeded(SmallResNet)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            if look:
                diagnose(net, images(seed=9))
            optimizer.zero_grad()
            net(images(seed=step)).square().mean().backward()
            optimizer.step()
        return everything_in_bits(net)

    assert trained(look=True) == trained(look=False)


def everything_in_bits(net: nn.Module) -> list[bytes]:
    return [value.detach().numpy().tobytes() for value in net.state_dict().values()]


def test_tied_weights_are_tied_while_a_forward_runs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            assert self.b.weight is self.a.weight
            return self.bn(self.b(torch.relu(self.a(x))))

    assert [finding.rule for finding in diagnose(Tied(), values())] == ["bias-before-batch-norm"]


def test_a_whole_model_in_eval_mode_is_run_as_training_runs_it() -> None:
    net = fill_statistics(seeded(SmallResNet)).eval()
    rules = {finding.rule for finding in diagnose(net, images(4))}
    assert rules == {"few-values", "bias-before-batch-norm"}
    assert not any(module.training for module in net.modules())


def test_layers_that_this_package_froze_stay_frozen_then() -> None:
    net = fill_statistics(seeded(SmallResNet))
    freeze_batch_norm(net)
    net.eval()
    # one value per channel, which train mode refuses
    assert diagnose(net, images(1)) == []


def test_a_lazy_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'0' is lazy .* run one forward pass"):
        diagnose(nn.Sequential(nn.LazyBatchNorm1d()), values())


@pytest.mark.parametrize("batch", [None, values()])
def test_a_model_on_the_meta_device_is_refused_with_what_to_do(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"'0' is on the meta device, .* make the model on a real device"):
        diagnose(nn.Sequential(nn.BatchNorm1d(4)).to("meta"), batch)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch is empty"):
        diagnose(nn.Sequential(nn.BatchNorm1d(4)), values(), more_batches=[values()[:0]])


def test_a_layer_that_is_given_nothing_normalizes_nothing() -> None:
    class NoBoxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.of_boxes = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.of_boxes(self.trunk(x)[:0])

    assert diagnose(NoBoxes(), images()) == []


def test_a_compiled_model_is_run_as_it_is_written() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    compiled = torch.compile(net, backend="eager")
    compiled(values())
    assert [finding.rule for finding in diagnose(compiled, values())] == ["bias-before-batch-norm"]
