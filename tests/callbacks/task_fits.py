"""Small fits with statistics per task: data of unlike tasks, modules, and separate networks as an oracle."""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

import lightning_bn
from lightning_bn import TaskBatchNorm
from lightning_bn.functional import TaskStatistics
from tests.callbacks.fits import quiet
from tests.models import bits, fill_statistics, seeded

TASKS = ["det", "seg", "depth"]
SHIFT = {"det": 0.0, "seg": 3.0, "depth": -2.0}
LAYERS = ("net.body.1", "net.body.4", "net.head.0")


class TasksNet(nn.Module):
    """Three BatchNorm layers, float64; input (N, 3), output (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()
        )
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def batch_of(task: str | None, seed: int, size: int = 8) -> dict[str, Any]:
    """A batch whose inputs depend on the task; without a key where there is none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64) * 2 + SHIFT.get(task or "", 0.0)
    batch = {"x": x, "y": torch.randint(2, (size,), generator=generator)}
    return batch if task is None else {**batch, "task": task}


def batches_of(tasks: Iterable[str | None], seed: int = 0) -> list[dict[str, Any]]:
    """One batch for each task, in order."""
    return [batch_of(task, seed + index) for index, task in enumerate(tasks)]


def loader_of(batches: Sequence[Any]) -> DataLoader[Any]:
    """As they are, in order."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class TasksModule(pl.LightningModule):
    """Every batch is of one task, or a dict of parts by task, each in its context; keeps what validation put out."""

    def __init__(self, in_contexts: bool = False, initial: bool = True) -> None:
        super().__init__()
        self.net = seeded(TasksNet) if initial else fill_statistics(seeded(TasksNet))
        self.in_contexts = in_contexts
        self.put_out: list[bytes] = []
        self.losses: list[bytes] = []

    def parts(self, batch: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
        """The parts of a batch and their tasks."""
        if "x" in batch:
            return [(batch.get("task") if self.in_contexts else None, batch)]
        return [(task, part) for task, part in batch.items() if part is not None]

    def outputs(self, batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Outputs and labels of every part."""
        found = []
        for task, part in self.parts(batch):
            with nullcontext() if task is None else lightning_bn.task(task):
                found.append((self.net(part["x"]), part["y"]))
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = torch.stack([F.cross_entropy(out, y) for out, y in self.outputs(batch)]).sum()
        self.losses.append(bits(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        for out, _ in self.outputs(batch):
            self.put_out.append(bits(out))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return [out for out, _ in self.outputs(batch)]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def callback(**arguments: Any) -> TaskBatchNorm:
    """With a key in each batch, and an ordinary moving average."""
    return TaskBatchNorm(**{"tasks": TASKS, "task_key": "task", "start": "shared", **arguments})


def fit(module: pl.LightningModule, batches: Sequence[Any], *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A fit of one epoch without validation, unless asked for it."""
    val = options.pop("val", None)
    path = options.pop("ckpt_path", None)
    without = {} if val is not None else {"limit_val_batches": 0}
    trainer = quiet(**{"max_epochs": 1, "callbacks": list(callbacks), **without, **options})
    trainer.fit(module, loader_of(batches), [loader_of(each) for each in val or [[]]], ckpt_path=path)
    return trainer


def norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm layers by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}


def sets(bank: TaskStatistics | None) -> dict[str, bytes]:
    """Every tensor of every task, as bits."""
    assert bank is not None
    return {
        f"{task}/{name}.{key}": bits(buffer)
        for task, layers in bank.parts()
        for name, one in layers.items()
        for key, buffer in one.items()
    }


class SeparateStatistics(pl.Callback):
    """An oracle without the package: a copy of the network for each task, fed the same weights and batches."""

    def __init__(self, tasks: Sequence[str] = TASKS) -> None:
        self._tasks = tasks
        self.nets: dict[str, nn.Module] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.nets:
            self.nets = {task: copy.deepcopy(pl_module.net) for task in self._tasks}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        parts = [(batch["task"], batch)] if "x" in batch else batch.items()
        for task, part in parts:
            if part is not None:
                net = self.nets[task].train()
                for mine, other in zip(net.parameters(), pl_module.net.parameters(), strict=True):
                    mine.data.copy_(other.data)
                with torch.no_grad():
                    net(part["x"])

    def sets(self) -> dict[str, bytes]:
        """As the function of that name."""
        return {
            f"{task}/net.{name}.{key}": bits(buffer)
            for task, net in self.nets.items()
            for name, layer in norms(net).items()
            for key, buffer in layer.named_buffers()
        }


def trained(build: Callable[[], TasksModule], batches: Sequence[Any], *callbacks: pl.Callback, **options: Any) -> Any:
    """A seeded fit: the module, and the bits of its parameters."""
    pl.seed_everything(3, verbose=False)
    module = build()
    fit(module, batches, *callbacks, **options)
    return module, [bits(parameter) for parameter in module.parameters()]
