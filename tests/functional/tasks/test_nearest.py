"""The task of an unlabelled batch is told by its statistics, and a doubt is said; nothing moves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional import batch_norm_layers, nearest_task, task_statistics
from lightning_bn.functional.tasks import TaskStatistics
from tests.functional.tasks.separate import TASKS, network, values
from tests.models import Broken, seeded, state_bits


def trained(steps: int = 60) -> tuple[Any, TaskStatistics]:
    model = network()
    bank = task_statistics(model, TASKS)
    for seed in range(steps):
        for task in TASKS:
            with bank.task(task), torch.no_grad():
                model(values([task] * 16, (3, 6, 6), seed))
    return model, bank


@pytest.mark.parametrize("training", [True, False])
def test_each_tasks_batches_are_told(training: bool) -> None:
    model, bank = trained()
    model.train(training)
    for task in TASKS:
        found, distances = nearest_task(bank, model, values([task] * 16, (3, 6, 6), 99))
        assert found == task
        assert next(iter(distances)) == task
        assert sorted(distances.values()) == list(distances.values())


def test_distance_is_that_of_the_two_gaussians() -> None:
    layer = nn.BatchNorm1d(2, eps=1e-15).double()
    bank = task_statistics(layer, ["a", "b"])
    with bank.task("b"), torch.no_grad():
        layer.running_mean.copy_(torch.tensor([1.0, 0.0]))  # type: ignore[union-attr]
        layer.running_var.copy_(torch.tensor([4.0, 1.0]))  # type: ignore[union-attr]
    x = torch.tensor([[0.0, 3.0], [2.0, 5.0], [1.0, 1.0]], dtype=torch.float64)
    mean, var = x.mean(0), x.var(0)
    expected = {}
    for task, m0, v0 in (("a", torch.zeros(2), torch.ones(2)), ("b", torch.tensor([1.0, 0]), torch.tensor([4.0, 1]))):
        kl = [
            0.5 * (v / w + (n - m).square() / w - 1 + (w / v).log())
            for m, v, n, w in ((mean, var, m0, v0), (m0, v0, mean, var))
        ]
        expected[task] = float((kl[0] + kl[1]).mean())
    assert nearest_task(bank, layer, x).distances == pytest.approx(expected, rel=1e-9)


def test_a_layer_that_is_used_twice_has_the_statistics_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x[:3]) + self.bn(x[3:])

    model, alone = Twice(), nn.BatchNorm1d(2).double()
    x = torch.randn(6, 2, dtype=torch.float64)
    one, other = task_statistics(model, ["a", "b"]), task_statistics(alone, ["a", "b"])
    for bank in (one, other):
        with bank.task("b"), torch.no_grad():
            next(iter(bank.layers_by_name.values())).running_mean.add_(1)  # type: ignore[union-attr]
    assert nearest_task(one, model, x).distances == pytest.approx(nearest_task(other, alone, x).distances, rel=1e-12)


def test_what_cannot_be_told_is_said() -> None:
    layer = nn.BatchNorm1d(3)
    bank = task_statistics(layer, ["a", "b"])
    assert nearest_task(bank, layer, torch.randn(8, 3), margin=0.0).task is None  # both sets are equal
    with bank.task("b"), torch.no_grad():
        layer.running_mean.add_(0.1)  # type: ignore[union-attr]
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    near, far = nearest_task(bank, layer, x).distances.values()
    share = 1 - near / far
    assert nearest_task(bank, layer, x, margin=0.9 * share).task is not None
    assert nearest_task(bank, layer, x, margin=1.1 * share).task is None
    assert nearest_task(bank, layer, torch.full((8, 3), torch.nan)).task is None


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_moves(fails: bool) -> None:
    model, bank = trained(2)
    model.layer1.eval()
    model.head.append = nn.Dropout()
    before = (state_bits(model), [(type(one), dict(vars(one))) for one in model.modules()], torch.get_rng_state())
    sets = {task: bank.snapshot(task) for task in TASKS}

    def forward(net: Any, x: Tensor) -> None:
        net(x)
        assert all(layer.training for layer in batch_norm_layers(net).values())
        assert not net.head.append.training
        if fails:
            raise Broken

    x = values(["a"] * 8, (3, 6, 6))
    if fails:
        with pytest.raises(Broken):
            nearest_task(bank, model, x, forward=forward)
    else:
        nearest_task(bank, model, x, forward=forward)
    assert state_bits(model) == before[0]
    assert [(type(one), dict(vars(one))) for one in model.modules()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(bank.snapshot(task).same_bits(sets[task]) for task in TASKS)


def test_other_layers_normalize_with_their_running_statistics() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    bank = task_statistics(model, ["a", "b"], ["1"])
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[index]
    x = 5 + torch.randn(8, 3)
    nearest_task(bank, model, x)
    torch.testing.assert_close(seen[0], x / (1 + 1e-5) ** 0.5)


def test_wrong_calls_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    bank = task_statistics(model, ["a", "b"])
    with pytest.raises(ValueError, match=r"'1' got 1 value per channel.*more samples"):
        nearest_task(bank, model, torch.randn(1, 3))
    with pytest.raises(ValueError, match=r"margin=1.5.*share"):
        nearest_task(bank, model, torch.randn(4, 3), margin=1.5)
    with pytest.raises(ValueError, match=r"reached none .*'1'"):
        nearest_task(bank, model, torch.randn(4, 3), forward=lambda net, batch: net[0](batch))
    bank.remove("b")
    with pytest.raises(ValueError, match="to find the nearest task, two or more are needed"):
        nearest_task(bank, model, torch.randn(4, 3))
