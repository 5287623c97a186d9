"""Fits on two real processes over gloo: what each rank was left with, for the tests to compare."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

import lightning_bn
from lightning_bn import BatchNormFreezer
from lightning_bn.functional.freezing import memory_efficient
from tests.callbacks.freezing_fits import BATCHES, PretrainedClassifier, adamw, freezer, loader, trainer_of, values
from tests.callbacks.test_freezer_by_task import BY_TASK, MultiTask, batch_of, loader_of
from tests.models import bits
from tests.ranks import take_part

WORLD = 2


class Processes(ClusterEnvironment):
    """The process group is there already: no addresses, no ports, nothing to launch."""

    creates_processes_externally = True
    main_address = "localhost"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0


class Noting(pl.Callback):
    """The values of the layers as every batch ends, and which of the parameters have equal bits on both ranks."""

    def __init__(self) -> None:
        self.values: list[dict[str, bytes]] = []
        self.parameters_equal: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.values.append(values(pl_module))
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in pl_module.parameters()])
        self.parameters_equal.append(equal_on_all_ranks(flat))


def equal_on_all_ranks(tensor: Tensor) -> bool:
    everyones: list[Any] = [None] * WORLD
    dist.all_gather_object(everyones, bits(tensor))
    return len(set(everyones)) == 1


class ByRank(MultiTask):
    """In every step the ranks train different tasks."""

    joint = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        rank = self.global_rank
        batch = batch_of(None, seed=10 * batch_idx + rank)
        first, second = (("det", "seg"), ("seg", "det"))[(rank + batch_idx) % 2]
        with lightning_bn.task(first):
            loss = self.loss(batch)
        if self.joint:
            with lightning_bn.task(second):
                loss = loss + self.loss(batch_of(None, seed=500 + 10 * batch_idx + rank))
        return loss


class Joint(ByRank):
    joint = True


class ByKey(MultiTask):
    """Both ranks train the same task, each with data of its own; notes the statistics a held layer normalizes with."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.used: list[bool] = []
        self.net.seg_head[1].register_forward_pre_hook(self._note)

    def _note(self, layer: Any, inputs: Any) -> None:
        if not layer.training and self.trainer.training:
            self.used.append(equal_on_all_ranks(layer.running_mean))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self.loss(batch_of(None, seed=10 * batch_idx + self.global_rank))


#: Name -> the module, the freezer and the settings of the Trainer and of DDP.
SCENARIOS: dict[str, tuple[Callable[[], Any], Callable[[], BatchNormFreezer], dict[str, Any], dict[str, Any]]] = {
    "unfrozen from epoch 1 on": (lambda: PretrainedClassifier(optimizer=adamw), lambda: freezer(stop_epoch=1), {}, {}),
    "frozen from epoch 1 on": (lambda: PretrainedClassifier(optimizer=adamw), lambda: freezer(start_epoch=1), {}, {}),
    "accumulated": (
        lambda: PretrainedClassifier(optimizer=adamw),
        lambda: freezer(stop_epoch=1),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {},
    ),
    "static graph": (
        lambda: PretrainedClassifier(optimizer=adamw),
        lambda: freezer(stop_epoch=1),
        {},
        {"static_graph": True, "gradient_as_bucket_view": True},
    ),
    "accumulated, inputs kept": (
        lambda: PretrainedClassifier(optimizer=adamw),
        lambda: freezer(stop_epoch=1, memory_efficient=False),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {},
    ),
    "static graph, inputs kept": (
        lambda: PretrainedClassifier(optimizer=adamw),
        lambda: freezer(stop_epoch=1, memory_efficient=False),
        {},
        {"static_graph": True, "gradient_as_bucket_view": True},
    ),
    "unused parameters": (
        lambda: PretrainedClassifier(optimizer=adamw),
        lambda: freezer(stop_epoch=1),
        {},
        {"find_unused_parameters": True},
    ),
    "tasks by rank": (
        lambda: ByRank(optimizer=adamw),
        lambda: BatchNormFreezer(root="net", by_task=BY_TASK),
        {"accumulate_grad_batches": 2},
        {},
    ),
    "tasks by key": (
        lambda: ByKey(optimizer=adamw),
        lambda: BatchNormFreezer(root="net", by_task={"det": ["seg_head"]}, task_key="task"),
        {},
        {},
    ),
    "joint steps": (lambda: Joint(optimizer=adamw), lambda: BatchNormFreezer(root="net", by_task=BY_TASK), {}, {}),
}


def run(name: str, folder: Path) -> dict[str, Any]:
    """One fit of this rank; what is left, as plain data."""
    memory_efficient.LEAST = 0  # the layers here are small
    build, build_freezer, options, ddp = SCENARIOS[name]
    module, frozen, noting = build(), build_freezer(), Noting()
    first = values(module)
    strategy = DDPStrategy(cluster_environment=Processes(), process_group_backend="gloo", **ddp)
    # Every rank of the tasks' modules is given all batches; what is in them depends on the rank.
    options = {"use_distributed_sampler": not isinstance(module, MultiTask), **options}
    trainer = trainer_of(
        frozen, noting, strategy=strategy, devices=WORLD, **{"max_epochs": 2, "num_sanity_val_steps": 1, **options}
    )
    if isinstance(module, MultiTask):
        batches = loader_of([batch_of(task, seed=0) for task in ("depth", "det") * BATCHES])
        trainer.fit(module, batches, batches)
    else:
        trainer.fit(module, loader(8 * BATCHES * WORLD), loader(16 * WORLD, seed=1))
    assert frozen.report is not None
    return {
        "first": first,
        "values": noting.values,
        "parameters_equal": noting.parameters_equal,
        "state": {key: bits(value) for key, value in module.state_dict().items()},
        "used_equal": getattr(module, "used", []),
        "identical": frozen.report.identical,
        "layers": frozen.report.layers,
        "steps": frozen.report.steps,
        "training": {layer: module.get_submodule(layer).training for layer in frozen.report.layers},
    }


if __name__ == "__main__":
    take_part(run, list(SCENARIOS), [])
