"""Fits with statistics per task on two real processes over gloo: what each rank was left with, or refused."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from lightning_bn import PreciseBatchNorm
from tests.callbacks.fits import quiet
from tests.callbacks.freezing_ranks import Processes
from tests.callbacks.task_fits import SeparateStatistics, TasksModule, batch_of, callback, loader_of, sets
from tests.ranks import take_part
from tests.synced import ReferenceSync

WORLD = 2


def batches(rank: int, tasks: list[str]) -> list[Any]:
    """Of a rank: others than the other one's, of the same tasks unless they are listed for each."""
    return [batch_of(task, 100 * rank + index, size=4 + 8 * rank) for index, task in enumerate(tasks)]


class Before(pl.Callback):
    """What a rank held as its last training batch ended, before anything was merged."""

    def __init__(self, tasks: Any) -> None:
        self.tasks, self.sets = tasks, dict[str, Any]()

    def on_train_batch_end(self, *args: Any) -> None:
        self.sets = {
            f"{task}/{name}.{key}": buffer.clone()
            for task, layers in self.tasks.bank.parts()
            for name, one in layers.items()
            for key, buffer in one.items()
        }


ALIKE = [["det", "seg", "depth"] * 3] * 2
UNLIKE = [["det", "seg"] * 4, ["seg", "depth"] * 4]
#: Name -> tasks by rank, whether buffers are broadcast, and the callbacks beside.
SCENARIOS: dict[str, tuple[list[list[str]], bool, Any]] = {
    "alike, broadcast": (ALIKE, True, list),
    "alike": (ALIKE, False, list),
    "unlike, broadcast": (UNLIKE, True, list),
    "unlike": (UNLIKE, False, list),
    "unlike, synchronized": (UNLIKE, False, list),
    "alike, synchronized": (ALIKE, False, list),
    "validated": (UNLIKE, False, lambda: [PreciseBatchNorm(num_batches=2)]),
}


def run(name: str, folder: Path) -> dict[str, Any]:
    """One fit of this rank."""
    tasks_of_ranks, broadcast, beside = SCENARIOS[name]
    strategy = DDPStrategy(cluster_environment=Processes(), process_group_backend="gloo", broadcast_buffers=broadcast)
    tasks, module, oracle = callback(), TasksModule(), SeparateStatistics()
    before = Before(tasks)
    trainer = quiet(
        strategy=strategy,
        devices=WORLD,
        max_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        plugins=[ReferenceSync()] if "synchronized" in name else None,
        callbacks=[before, tasks, oracle, *beside()],
        **({} if name == "validated" else {"limit_val_batches": 0}),
    )
    rank = trainer.global_rank
    loaders = [loader_of(batches(rank, tasks_of_ranks[rank])), loader_of(batches(rank, ["det", "seg"]))]
    error = ""
    try:
        trainer.fit(module, *loaders)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {
        "error": error,
        "own": module.net.body[1].running_mean.clone(),
        "before": before.sets,
        "after": {} if error else sets(tasks.bank),
        "oracle": oracle.sets() if oracle.nets else {},
        "weights": torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()]),
    }


if __name__ == "__main__":
    take_part(run, list(SCENARIOS), [])
