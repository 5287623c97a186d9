"""An instance for each task, fed with the rows of its task alone: what statistics per task are compared with."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_bn.functional.tasks import TaskStatistics
from tests.models import SmallResNet, bits, fill_statistics, seeded

TASKS = ["a", "b", "c"]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return fill_statistics(seeded(SmallResNet)).to(dtype).train()


def statistics(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(buffer) for name, buffer in model.named_buffers()}


def rows_of(count: int, seed: int, *, least: int) -> list[str]:
    """Labels in random order, each at least so often."""
    drawn = torch.randint(3, (count - 3 * least,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [TASKS[place] for place in drawn] + TASKS * least
    return [rows[place] for place in torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()]


def values(rows: Sequence[str], shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of each row's task with a mean and a scale of its own."""
    x = torch.randn(len(rows), *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    places = torch.tensor([TASKS.index(task) for task in rows]).view(-1, *[1] * len(shape))
    return (x * (1 + places) + 3 * places).to(dtype)


class Separate:
    """Copies of a model, one for each task.

    Args:
        model: Whose parameters they share.
        bank: Whose sets they begin with; None: all with the model's own statistics.
        path: Of the model in the bank's.
    """

    def __init__(self, model: nn.Module, bank: TaskStatistics | None, path: str = "") -> None:
        self.models: dict[str, nn.Module] = {}
        for task in TASKS:
            if bank is None:
                self.models[task] = copy.deepcopy(model)
            else:
                with bank.task(task):
                    self.models[task] = copy.deepcopy(model)
        self.with_weights_of(model)

    def with_weights_of(self, model: nn.Module) -> Self:
        """Share the parameters of a model."""
        for one in self.models.values():
            for name, parameter in model.named_parameters():
                parent, _, key = name.rpartition(".")
                setattr(one.get_submodule(parent), key, parameter)
        return self

    def train(self, mode: bool) -> None:
        for one in self.models.values():
            one.train(mode)

    def __call__(self, x: Tensor, rows: Sequence[str]) -> Tensor:
        """Each task's rows through its own copy, in their places."""
        outputs: list[Tensor] = [x] * len(rows)
        for task in dict.fromkeys(rows):
            places = [place for place, row in enumerate(rows) if row == task]
            for place, output in zip(places, self.models[task](x[places]), strict=True):
                outputs[place] = output
        return torch.stack(outputs)


def joint(separate: Separate, x: Tensor, rows: list[str]) -> dict[str, Tensor]:
    """Gradients of the mean square over all rows, and statistics moved; nothing is left on the parameters."""
    parameters = dict(separate.models["a"].named_parameters())
    gradients = torch.autograd.grad(separate(x, rows).square().mean(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))
