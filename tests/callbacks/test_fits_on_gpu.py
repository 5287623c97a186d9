"""Real fits on a GPU: with the callbacks training has the same bits, and validation the population's statistics."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm
from tests.callbacks.fits import LAYERS, Classifier, quiet, samples, train_loader, trajectory, val_loader
from tests.callbacks.task_fits import TASKS, SeparateStatistics, TasksModule, batches_of, callback, fit, sets
from tests.models import fill_statistics
from tests.oracle import assert_all_statistics, layer_inputs

pytestmark = pytest.mark.gpu
ON_GPU = {"accelerator": "gpu", "devices": 1}
NORMS = [name.removeprefix("net.") for name in LAYERS]
PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "bf16-true"]
LOADERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pinned": {"pin_memory": True},
    "workers": {"num_workers": 2, "pin_memory": True, "persistent_workers": True},
}


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Trained(Classifier):
    """Starts with running statistics of its own."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__(dropout=dropout)
        fill_statistics(self.net)


class Compiled(Trained):
    """Its network is compiled by inductor."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.net.compile()


def frozen() -> BatchNormFreezer:
    return BatchNormFreezer(modules="net.features")


def watching(every_n_steps: int = 1) -> list[pl.Callback]:
    return [PreciseBatchNorm(num_batches=3), BatchNormMonitor(every_n_steps=every_n_steps)]


def assert_undisturbed(build: Callable[[], Classifier], options: dict[str, Any], **loader: Any) -> Classifier:
    """The run with the callbacks, after it has been compared with the one without."""

    def data() -> dict[str, Any]:
        return {"train_dataloaders": train_loader(**loader), "val_dataloaders": val_loader()}

    trace, weights, _ = trajectory(build, data, frozen(), **ON_GPU, **options)
    found, found_weights, module = trajectory(build, data, frozen(), *watching(), **ON_GPU, **options)
    assert found == trace
    assert found_weights == weights
    return module


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_has_the_same_bits_and_validation_the_populations_statistics(
    precision: Any, loader: dict[str, Any]
) -> None:
    module = assert_undisturbed(Trained, {"precision": precision}, **loader)
    assert len(module.validated) == 2
    for _, net, used in module.validated:
        assert len(used) == 3
        assert used[0].device.type == "cuda"
        net.float().train()
        net.features[1].eval()  # type: ignore[index]
        inputs = layer_inputs(net, [batch.float() for batch in used], NORMS[1:])
        # In 16 bits convolutions are rounded otherwise than here.
        assert_all_statistics(net, inputs, 1e-4 if precision == "32-true" else 0.05)


def test_a_compiled_network_trains_with_the_same_bits() -> None:
    torch.compiler.reset()
    assert_undisturbed(Compiled, {})


def test_statistics_of_tasks_are_those_of_separate_networks() -> None:
    oracle, tasks = SeparateStatistics(), callback()
    fit(TasksModule(), batches_of(TASKS * 5), oracle, tasks, **ON_GPU)
    assert sets(tasks.bank) == oracle.sets()


class Unwaiting(pl.Callback):
    """From its hook at a batch's start on, whatever waits for the device is an error; None at a batch's end."""

    def __init__(self, mode: str) -> None:
        self.mode, self.batches = mode, 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.mode == "start" and batch_idx % 4 in (1, 2):
            torch.cuda.set_sync_debug_mode("error")
            self.batches += 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if self.mode == "end":
            torch.cuda.set_sync_debug_mode("default")

    on_exception = on_train_batch_end


class Unread(Trained):
    """Its loss is not read by anyone."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Silent(TasksModule):
    """Its losses are not read by anyone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        [(out, y)] = self.outputs(batch)
        return torch.nn.functional.cross_entropy(out, y)


def test_a_step_between_two_samples_waits_for_nothing() -> None:
    start = Unwaiting("start")
    callbacks = [start, frozen(), *watching(every_n_steps=4), Unwaiting("end")]
    quiet(callbacks=callbacks, **ON_GPU).fit(Unread(), train_loader(samples(128)), val_loader())
    assert start.batches == 16


def test_tasks_are_switched_without_waiting() -> None:
    start = Unwaiting("start")
    fit(Silent(), batches_of(TASKS * 5), start, callback(), Unwaiting("end"), **ON_GPU)
    assert start.batches == 8


class WithMore(Trained):
    """Holds a million weights that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(1000, 1000)


def test_after_a_fit_no_copy_of_the_weights_is_held_on_the_device() -> None:
    callbacks = [frozen(), *watching()]
    before = torch.cuda.memory_allocated()
    trainer = quiet(callbacks=callbacks, **ON_GPU)
    trainer.fit(WithMore(), train_loader(), val_loader())
    torch.cuda.synchronize()
    gc.collect()
    # Statistics of reports and figures are held as long as the callbacks are.
    assert torch.cuda.memory_allocated() - before < 2**20
