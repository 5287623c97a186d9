"""Fits with PreciseBatchNorm on two real processes: what each rank was left with, for the tests to compare."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm
from lightning_bn.functional import freeze_batch_norm
from tests.averages import EMAWeightAveraging
from tests.callbacks.fits import RECALIBRATED_FROM, Classifier, Recorder, quiet, samples
from tests.callbacks.freezing_ranks import Processes
from tests.callbacks.monitoring_fits import norms
from tests.models import Broken, state_bits
from tests.ranks import take_part
from tests.synced import ReferenceSync

BATCHES = 4
"""Of training, on each rank and in each epoch; the last one is smaller."""


class RankClassifier(Classifier):
    """Every rank validates on the same data; what it is recalibrated from differs by rank."""

    def on_validation_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["val_loss"]))

    def on_fit_start(self) -> None:
        self.losses: list[float] = []

    def target(self) -> DataLoader[Any]:
        """Three batches on rank 0, one on rank 1."""
        return DataLoader(samples(24 if self.global_rank == 0 else 5, seed=50 + self.global_rank), batch_size=8)

    def run_target(self, batch: Any) -> Tensor:
        RECALIBRATED_FROM.append(batch[0].clone())
        return self.net(batch[0])

    def nothing_on_one(self) -> Any:
        return self.target() if self.global_rank == 0 else []

    def broken_on_one(self) -> Any:
        if self.global_rank == 1:
            raise Broken("no such target")
        return self.target()

    def broken_later_on_one(self) -> Iterator[Any]:
        for batch in self.target():
            if self.global_rank == 1:
                raise Broken("broken loader")
            yield batch


class Unused(RankClassifier):
    """Has a layer that no step reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = torch.nn.BatchNorm1d(3)


class Raising(RankClassifier):
    """Its step fails on rank 1 while it is recalibrated from."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not torch.is_grad_enabled() and self.global_rank == 1 and batch_idx == 1:
            raise Broken("broken step")
        return super().training_step(batch, batch_idx)


class OtherTasks(RankClassifier):
    """In the third step rank 1 trains another task."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        other = self.trainer.training and self.trainer.global_step == 2 and self.global_rank == 1
        return {"batch": batch, "task": "b" if other else "a"} if self.trainer.training else batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["batch"], batch_idx)


class ValidatesOnOne(RankClassifier):
    """Rank 1 has nothing to validate on, which Lightning has to be allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True


class FrozenOnOne(RankClassifier):
    """One rank freezes the statistics of all of its layers in the middle of training."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_rank == 1:
            freeze_batch_norm(self, affine=False)


def precise(**kwargs: Any) -> PreciseBatchNorm:
    return PreciseBatchNorm(**{"num_batches": 3, **kwargs})


def watching(every_n_steps: int = 2) -> BatchNormMonitor:
    return BatchNormMonitor(every_n_steps=every_n_steps, report=False)


def freezer(modules: str = "features", affine: bool = True) -> BatchNormFreezer:
    return BatchNormFreezer([modules], root="net", affine=affine)


def from_target(method: str = "target", **kwargs: Any) -> PreciseBatchNorm:
    return precise(source_method=f"module.{method}", step="run_target", **kwargs)


#: Name -> the module, the callbacks, the settings of the Trainer and of DDP.
Scenario = tuple[Callable[[], RankClassifier], Callable[[], list[Any]], dict[str, Any], dict[str, Any]]
SCENARIOS: dict[str, Scenario] = {
    "without": (RankClassifier, list, {}, {}),
    "with": (RankClassifier, lambda: [precise()], {}, {}),
    "twice an epoch, without": (RankClassifier, list, {"val_check_interval": 2}, {}),
    "twice an epoch": (RankClassifier, lambda: [precise()], {"val_check_interval": 2}, {}),
    "whole epoch": (RankClassifier, lambda: [precise(num_batches=None)], {}, {}),
    "restored": (RankClassifier, lambda: [precise(restore=True)], {}, {}),
    "accumulated, without": (RankClassifier, list, {"accumulate_grad_batches": 2}, {}),
    "accumulated": (RankClassifier, lambda: [precise()], {"accumulate_grad_batches": 2}, {}),
    "recent": (RankClassifier, lambda: [precise(source="recent", num_batches=2)], {}, {}),
    "static graph, without": (RankClassifier, list, {}, {"static_graph": True}),
    "static graph": (RankClassifier, lambda: [precise()], {}, {"static_graph": True}),
    "unused parameters, without": (Unused, list, {}, {"find_unused_parameters": True}),
    "unused parameters": (Unused, lambda: [precise()], {}, {"find_unused_parameters": True}),
    "fewer on one": (RankClassifier, lambda: [from_target()], {}, {}),
    "none on one": (RankClassifier, lambda: [from_target("nothing_on_one")], {}, {}),
    "averaged, without": (RankClassifier, lambda: [EMAWeightAveraging(decay=0.9)], {}, {}),
    "averaged": (RankClassifier, lambda: [precise(), EMAWeightAveraging(decay=0.9)], {}, {}),
    "synchronized, without": (RankClassifier, list, {"plugins": ReferenceSync()}, {}),
    "synchronized": (RankClassifier, lambda: [precise(), watching()], {"plugins": ReferenceSync()}, {}),
    "synchronized, fewer on one": (RankClassifier, lambda: [from_target()], {"plugins": ReferenceSync()}, {}),
    "synchronized, frozen, without": (RankClassifier, lambda: [freezer()], {"plugins": ReferenceSync()}, {}),
    "synchronized, frozen": (
        RankClassifier,
        lambda: [freezer(), precise(), watching()],
        {"plugins": ReferenceSync()},
        {},
    ),
    "synchronized in part, without": (RankClassifier, list, {"plugins": ReferenceSync(("net.bn",))}, {}),
    "synchronized in part": (RankClassifier, lambda: [precise()], {"plugins": ReferenceSync(("net.bn",))}, {}),
    "ends in mid-epoch": (RankClassifier, lambda: [precise()], {"max_epochs": -1, "max_steps": 6}, {}),
    "no validation": (RankClassifier, lambda: [precise()], {"limit_val_batches": 0}, {}),
}
FAILURES: dict[str, Scenario] = {
    "step raises": (Raising, lambda: [precise()], {}, {}),
    "frozen otherwise on one": (RankClassifier, lambda: [freezer("features" if dist.get_rank() else "head")], {}, {}),
    "frozen without affine on one": (RankClassifier, lambda: [freezer(affine=not dist.get_rank())], {}, {}),
    "frozen nothing on one": (RankClassifier, lambda: [freezer("laier" if dist.get_rank() else "head")], {}, {}),
    "recalibrated otherwise on one": (
        RankClassifier,
        lambda: [precise(every_n_validations=1 + dist.get_rank())],
        {},
        {},
    ),
    "another task on one": (
        OtherTasks,
        lambda: [BatchNormFreezer(by_task={"a": "net.features", "b": "net.head"}, task_key="task")],
        {"plugins": ReferenceSync()},
        {},
    ),
    "monitored otherwise on one": (RankClassifier, lambda: [watching(1 + dist.get_rank())], {}, {}),
    # Where buffers are broadcast, DDP itself waits in the first validation forward.
    "validation on one": (
        ValidatesOnOne,
        lambda: [precise()],
        {"num_sanity_val_steps": 0},
        {"broadcast_buffers": False},
    ),
    "loader raises": (RankClassifier, lambda: [from_target("broken_later_on_one")], {}, {}),
}
STRANDING: dict[str, Scenario] = {
    "method raises": (RankClassifier, lambda: [from_target("broken_on_one")], {}, {}),
    "frozen on one": (FrozenOnOne, lambda: [precise()], {}, {}),
}


def train_loader(rank: int) -> DataLoader[Any]:
    data = samples(8 * 2 * BATCHES - 8)
    sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=True, seed=4)
    return DataLoader(data, batch_size=8, sampler=sampler)


def fitted(scenario: Scenario, folder: Path) -> tuple[RankClassifier, list[Any], Recorder, Callable[[], None]]:
    """All there is to a fit, and what starts it."""
    build, callbacks, options, ddp = scenario
    rank = dist.get_rank()
    pl.seed_everything(7 + rank, verbose=False)
    module, used, recorder = build(), callbacks(), Recorder()
    saver = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=-1, filename="{step}")
    trainer = quiet(
        callbacks=[*used, recorder, saver],
        enable_checkpointing=True,
        strategy=DDPStrategy(cluster_environment=Processes(), process_group_backend="gloo", **ddp),
        use_distributed_sampler=False,
        **{"devices": 2, **options},
    )
    nothing = isinstance(module, ValidatesOnOne) and rank == 1
    val = DataLoader(samples(0 if nothing else 8, seed=9), batch_size=4)
    return module, used, recorder, lambda: trainer.fit(module, train_loader(rank), val)


def run_fit(name: str, folder: Path) -> dict[str, Any]:
    own = folder / name.replace(" ", "_").replace(",", "")
    module, used, recorder, fit = fitted(SCENARIOS[name], own)
    fit()
    last = next((callback.last for callback in used if isinstance(callback, PreciseBatchNorm)), None)
    dist.barrier()
    saved = {path.name: dict(torch.load(path, weights_only=True)["state_dict"]) for path in sorted(own.glob("*.ckpt"))}
    reports = [callback.report for callback in used if isinstance(callback, BatchNormFreezer)]
    monitors = [callback for callback in used if isinstance(callback, BatchNormMonitor)]
    return {
        "identical": [report.identical for report in reports],
        "sampled": [callback._session.own.sampled.mean for callback in monitors],
        "kinds_in_validation": [[type(layer).__name__ for layer in norms(net)] for _, net, _ in module.validated],
        "kinds_after": [type(layer).__name__ for layer in norms(module)],
        "trace": [(list(seen), loss) for seen, loss in recorder.trace],
        "parameters": {key: value.detach().clone() for key, value in module.named_parameters()},
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "losses": module.losses,
        "validated": [
            {"step": step, "state": dict(net.state_dict()), "bits": state_bits(net), "batches": batches}
            for step, net, batches in module.validated
        ],
        "recalibrated_last": list(RECALIBRATED_FROM),
        "saved": saved,
        "used": None
        if last is None
        else [last.num_batches, last.num_samples, last.processes, list(last.unreached), list(last.layers)],
    }


def run_failure(name: str, folder: Path) -> dict[str, Any]:
    module, _, _, fit = fitted({**FAILURES, **STRANDING}[name], folder / name.replace(" ", "_"))
    told, started = "", time.monotonic()
    try:
        fit()
    except BaseException as error:
        told = f"{type(error).__name__}: {error}"
    hooks = sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in module.net.modules())
    return {
        "told": told,
        "seconds": time.monotonic() - started,
        "momenta": [layer.momentum for layer in module.net.modules() if hasattr(layer, "momentum")],
        "own_forwards": sum("forward" in layer.__dict__ for layer in module.net.modules()),
        "hooks": hooks,
    }


def run(name: str, folder: Path) -> dict[str, Any]:
    return run_fit(name, folder) if name in SCENARIOS else run_failure(name, folder)


if __name__ == "__main__":
    take_part(run, list(SCENARIOS), [*FAILURES, *STRANDING])
