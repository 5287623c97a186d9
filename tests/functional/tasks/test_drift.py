"""Which layers need statistics per task: the ones whose inputs differ, and no later one."""

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional import batch_norm_layers
from lightning_bn.functional.tasks import TaskDrift, task_drift, task_statistics
from tests.models import seeded


class Stages(nn.Module):
    """Six stages, each a convolution and two layers of BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, padding=1, bias=False), "bn": nn.BatchNorm2d(8)})
            for _ in range(6)
        )

    def forward(self, x: Tensor, scaled: int | None = None) -> Tensor:
        for index, stage in enumerate(self.stages):
            x = stage["conv"](x)  # type: ignore[index]
            x = torch.relu(stage["bn"](3 * x + 1 if index == scaled else x))  # type: ignore[index]
        return x


def batch(seed: int) -> Tensor:
    return torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("planted", range(6))
def test_the_planted_stage_is_suggested_and_no_other(planted: int) -> None:
    model = seeded(Stages).train()
    bank = task_statistics(model, ["plain", "scaled"])
    for step in range(30):
        for task in bank.tasks:
            with bank.task(task), torch.no_grad():
                model(batch(2 * step + (task == "scaled")), planted if task == "scaled" else None)
    found = task_drift(bank)
    assert found.suggest() == [f"stages.{planted}"]
    assert list(batch_norm_layers(model, found.suggest())) == [f"stages.{planted}.bn"]
    assert found.worst()[0] == f"stages.{planted}.bn"
    others = {name: value for name, value in found.largest().items() if name != f"stages.{planted}.bn"}
    assert max(others.values()) < 0.1
    assert f"layers that need their own statistics for each task: 'stages.{planted}'; one set is enough for" in str(
        found
    )


def test_equal_tasks_need_one_set() -> None:
    layer = nn.BatchNorm1d(4).train()
    bank = task_statistics(layer, ["a", "b"])
    for seed in range(40):
        for task in bank.tasks:
            with bank.task(task):
                layer(torch.randn(256, 4, generator=torch.Generator().manual_seed(2 * seed + (task == "b"))))
    assert task_drift(bank).suggest() == []
    assert "one set of statistics is enough for all tasks" in str(task_drift(bank))


def of(values: dict[str, float], others: tuple[str, ...] = ()) -> TaskDrift:
    matrix = torch.zeros(2, 2, len(values), dtype=torch.float64)
    matrix[0, 1] = matrix[1, 0] = torch.tensor(list(values.values()), dtype=torch.float64)
    return TaskDrift(("a", "b"), tuple(values), matrix, others)


def test_suggested_paths_are_the_shortest_that_mean_these_layers() -> None:
    values = {"stem.bn": 1.0, "body.0.a": 1.0, "body.0.b": 1.0, "body.1.a": 0.0, "body.1.b": 1.0, "head": 0.0}
    assert of(values).suggest() == ["stem", "body.0", "body.1.b"]
    assert of(values, others=("stem.unused",)).suggest() == ["body.0", "stem.bn", "body.1.b"]
    assert of(dict.fromkeys(values, 1.0)).suggest() == ["body", "head", "stem"]
    assert of({"": 1.0}).suggest() == [""]


def test_statistics_that_are_not_finite_are_suggested() -> None:
    assert of({"a": float("nan"), "b": 0.0}).suggest() == ["a"]


def test_matrix_is_from_the_row_to_the_column() -> None:
    layer = nn.BatchNorm1d(1)
    bank = task_statistics(layer, ["a", "b"])
    with bank.task("b"):
        layer.running_mean.fill_(3.0)  # type: ignore[union-attr,operator]
    found = task_drift(bank, "mean_shift")
    assert found.values.shape == (2, 2, 1)
    assert found.values[0, 1, 0] == found.values[1, 0, 0] == pytest.approx(3.0, rel=1e-4)
    assert found.values[0, 0, 0] == 0
    assert found.pairs() == {("a", "b"): [found.values[0, 1, 0]]}
    lopsided = TaskDrift(("a", "b"), ("x",), torch.tensor([[[0.0], [1.0]], [[4.0], [0.0]]]))
    assert lopsided.pairs() == {("a", "b"): [4.0]}, "the larger one of the two directions"
    with pytest.raises(ValueError, match="needs two"):
        task_drift(task_statistics(nn.BatchNorm1d(1), ["a"]))


def test_equal_inputs_need_no_set_for_each_task() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    bank = task_statistics(model, ["det", "seg"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        for task in bank.tasks:
            with bank.task(task):
                model(torch.randn(64, 6, generator=generator))
    apart = task_drift(bank)
    assert 0 < apart.worst()[-1] < 0.1
    assert apart.suggest() == []
    assert "one set of statistics is enough for all tasks" in str(apart)
