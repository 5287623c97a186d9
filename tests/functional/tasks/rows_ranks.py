"""Rows of several tasks in several processes over gloo: each has its own split."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bn.functional import task_statistics
from tests.models import fill_statistics
from tests.ranks import take_part

TASKS = ["a", "b", "c"]
WHICH = [["a", "b", "b", "a", "b"], ["b", "c", "c", "c", "b"]]
SCENARIOS = ["synchronized", "ddp", "ddp without broadcasting"]


def inputs(rank: int) -> Tensor:
    """What a rank is given."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(5, 3, 4, generator=generator, dtype=torch.float64) * (1 + rank) + rank


def network(kind: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    """The same in all processes."""
    model = nn.Sequential(nn.Conv1d(3, 3, 1), kind(3))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(9.0).view(3, 3, 1).cos())  # type: ignore[operator]
        model[0].bias.fill_(0.5)  # type: ignore[operator]
    return fill_statistics(model).double().train()  # type: ignore[return-value]


def alone(rank: int) -> dict[str, Any]:
    """Gradients and sets of a rank's batch in one process, a layer for each task."""
    model = network()
    layers = {task: copy.deepcopy(model[1]) for task in TASKS}
    losses = []
    for task, layer in layers.items():
        layer.weight, layer.bias = model[1].weight, model[1].bias
        rows = [row for row, one in enumerate(WHICH[rank]) if one == task]
        if rows:
            losses.append(layer(model[0](inputs(rank)[rows])).pow(3).sum())
    torch.stack(losses).sum().backward()
    gradients = [weight.grad for weight in model.parameters()]
    return {"gradients": gradients, "sets": {task: dict(layer.named_buffers()) for task, layer in layers.items()}}


def run(name: str, _: Path) -> dict[str, Any]:
    """What a rank finds in a scenario."""
    rank = dist.get_rank()
    model = network(nn.SyncBatchNorm if name == "synchronized" else nn.BatchNorm1d)
    bank = task_statistics(model, TASKS, start="shared")
    error = ""
    if name == "synchronized":
        with bank.rows(WHICH[rank]):
            try:
                model(inputs(rank))
            except RuntimeError as raised:
                error = str(raised)
    else:
        wrapped = DistributedDataParallel(model, broadcast_buffers=name == "ddp")
        with bank.rows(WHICH[rank]):
            wrapped(inputs(rank)).pow(3).sum().backward()
    return {
        "error": error,
        "gradients": [weight.grad for weight in model.parameters()],
        "sets": {task: sets["1"] for task, sets in bank.parts()},
    }


if __name__ == "__main__":
    take_part(run, SCENARIOS, [])
