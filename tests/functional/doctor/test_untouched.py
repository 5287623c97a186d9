"""A diagnosis leaves the model, its gradients and the random number generators bit for bit as they were."""

import copy
from typing import Any

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


def test_a_compiled_model_is_run_as_it_is_written() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    compiled = torch.compile(net, backend="eager")
    compiled(values())
    assert [finding.rule for finding in diagnose(compiled, values())] == ["bias-before-batch-norm"]
