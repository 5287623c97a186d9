"""Running the user's step for its statistics alone: nothing else comes of it."""

import queue
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Accuracy, MeanMetric, MetricCollection, Precision, Recall

from lightning_bn import PreciseBatchNorm
from lightning_bn.callbacks._second_run.step import check_step
from lightning_bn.functional.layers.object_state import attributes_on_copies
from tests.callbacks.fits import Classifier, quiet, samples, train_loader, trajectory, val_loader
from tests.models import bits
from tests.oracle import assert_all_statistics, layer_inputs

#: Each pass runs in a copy of the process.
pytestmark = pytest.mark.processes

NORMS = ("features.1", "bn", "head.1")


def data(**kwargs: Any) -> dict[str, Any]:
    return {"train_dataloaders": train_loader(**kwargs), "val_dataloaders": val_loader()}


def with_and_without(build: Any, **kwargs: Any) -> list[Any]:
    """Trajectories and modules of a run without the callback and of one with it."""
    runs = []
    for callbacks in ([], [PreciseBatchNorm(num_batches=3)]):
        settings = {"val_check_interval": 0.5, "num_sanity_val_steps": 0, **kwargs}
        runs.append(trajectory(build, data, *callbacks, **settings))
    assert callbacks[0].last is not None
    return runs


def assert_no_trace(build: Any, told: Any, **kwargs: Any) -> None:
    """What ``told`` reads from a module, its losses and its weights are the same with and without the callback."""
    without, with_it = with_and_without(build, **kwargs)
    assert told(without[2]) == told(with_it[2])
    assert without[:2] == with_it[:2]


# What a step keeps on the module


class Meter:
    """Somebody's helper that averages."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.sum += value
        self.count += 1


KEPT: dict[str, tuple[Any, Any, Any]] = {
    # What is kept, what a step does to it, and how to read it.
    "counter": (lambda: 0, lambda module: setattr(module, "kept", module.kept + 1), lambda kept: kept),
    "list": (list, lambda module: module.kept.append(1), len),
    "dict": (dict, lambda module: module.kept.update({len(module.kept): 1}), len),
    "set": (set, lambda module: module.kept.add(len(module.kept)), len),
    "bounded deque": (lambda: deque(maxlen=50), lambda module: module.kept.append(1), len),
    "counts": (Counter, lambda module: module.kept.update("a"), dict),
    "ordered dict": (OrderedDict, lambda module: module.kept.update({len(module.kept): 1}), len),
    "dict of lists": (
        lambda: {"train": []},
        lambda module: module.kept["train"].append(1),
        lambda kept: len(kept["train"]),
    ),
    "default dict of lists": (
        lambda: defaultdict(list),
        lambda module: module.kept["train"].append(1),
        lambda kept: len(kept["train"]),
    ),
    "tensor": (lambda: torch.zeros(1), lambda module: module.kept.add_(1), bits),
    "list of tensors": (lambda: [torch.zeros(1)], lambda module: module.kept[0].add_(1), lambda kept: bits(kept[0])),
    "array": (lambda: np.zeros(2), lambda module: module.kept.__iadd__(1), lambda kept: kept.tolist()),
    "helper": (Meter, lambda module: module.kept.update(1.0), lambda kept: (kept.sum, kept.count)),
    "helper in a dict": (
        lambda: {"loss": Meter()},
        lambda module: module.kept["loss"].update(1.0),
        lambda kept: kept["loss"].count,
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_step_keeps_on_the_module_is_as_if_it_had_not_run(kind):
    make, change, read = KEPT[kind]

    class Keeping(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.kept = make()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            change(self)
            return super().training_step(batch, batch_idx)

    assert_no_trace(Keeping, lambda module: read(module.kept), max_epochs=1)


def test_attributes_that_a_step_adds_to_a_submodule_are_gone():
    class Adding(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net.head.last_index = batch_idx
            self.net.features.seen = [*getattr(self.net.features, "seen", []), batch_idx]
            return super().training_step(batch, batch_idx)

    assert_no_trace(Adding, lambda module: (module.net.head.last_index, module.net.features.seen))


@pytest.mark.parametrize(
    "make",
    [
        lambda: random.Random(0),
        lambda: np.random.RandomState(0),
        lambda: np.random.default_rng(0),
        lambda: torch.Generator().manual_seed(0),
    ],
    ids=["random.Random", "RandomState", "numpy Generator", "torch Generator"],
)
def test_generator_of_the_modules_own_is_as_if_the_step_had_not_run(make):
    def draw(generator: Any) -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand(1, generator=generator))
        return float(generator.random())

    class Mixing(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.own_generator = make()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            share = draw(self.own_generator)
            mixed = share * batch[0] + (1 - share) * batch[0].flip(0)
            return super().training_step([mixed, batch[1]], batch_idx)

    assert_no_trace(Mixing, lambda module: draw(module.own_generator))


def test_memory_bank_in_a_buffer_is_as_if_the_step_had_not_run():
    class Bank(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", torch.zeros(4))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.bank[self.pointer % 4] = batch[0].mean()
            self.pointer += 1
            return super().training_step(batch, batch_idx) + self.bank.sum()

    assert_no_trace(Bank, lambda module: (bits(module.bank), bits(module.pointer)))


@pytest.mark.parametrize("through_data", [True, False])
def test_teacher_that_the_step_updates_is_as_if_the_step_had_not_run(through_data):
    class Taught(Classifier):
        """A teacher follows the network's weights, as in momentum contrast."""

        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(6, 2).requires_grad_(False)
            nn.init.constant_(self.teacher.weight, 0.1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                weight = self.teacher.weight.data if through_data else self.teacher.weight
                weight.mul_(0.9).add_(self.net.head[3].weight.detach(), alpha=0.1)
            return super().training_step(batch, batch_idx) + self.teacher.weight.sum() * self.net.bn.weight.sum()

    assert_no_trace(Taught, lambda module: bits(module.teacher.weight))


class Served(threading.Thread):
    """A thread with a queue, as writers and uploaders have; `told` is written by the thread alone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked: queue.Queue[Any] = queue.Queue()
        self.told = 0
        self.start()

    def run(self) -> None:
        while self.asked.get() is not None:
            self.told += 1
            self.asked.task_done()


def test_thread_that_the_module_holds_goes_on():
    class WithThread(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.served = Served()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.served.asked.put(batch_idx)
            return super().training_step(batch, batch_idx)

        def on_train_end(self) -> None:
            self.served.asked.put(None)
            self.served.join(timeout=10)

    _, _, module = trajectory(WithThread, data, PreciseBatchNorm(num_batches=3), val_check_interval=0.5)
    assert not module.served.is_alive()
    # Eight training batches, and what the passes asked for, which cannot be taken back.
    assert module.served.told >= 8


@pytest.mark.timeout(40)
@pytest.mark.parametrize("workers", [0, 1])
def test_iterator_that_the_module_holds_is_refused_before_training(workers):
    class SemiSupervised(Classifier):
        """Draws further batches from a loader of its own, which a pass would draw from too."""

        def on_train_start(self) -> None:
            self.further = iter(train_loader(samples(400, seed=6), batch_size=8, num_workers=workers, shuffle=False))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("trained")

    with pytest.raises(MisconfigurationException, match=r"self\.further .*gives each item only once.*step='forward'"):
        trajectory(SemiSupervised, data, PreciseBatchNorm(num_batches=3), val_check_interval=0.5)


# What a step tells others


class Memory(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Any] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    @property
    def experiment(self) -> "Memory":
        return self

    def add_scalar(self, *args: Any) -> None:
        self.written.append(args)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.written.append((step, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Talkative(Classifier):
    """Logs in every way, and depends on the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("step_loss", loss, on_step=True, prog_bar=True)
        self.log("epoch_loss", loss, on_epoch=True, on_step=False)
        self.log_dict({"a": loss, "b": 2 * loss}, on_step=True, on_epoch=True)
        self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
        self.logger.experiment.add_scalar("experiment", loss.item(), self.global_step)
        for logger in self.loggers:
            logger.log_metrics({"each": loss.item()}, step=self.global_step)
        return loss * (1 + self.global_step % 2) * (1 + self.current_epoch) * (1 + batch_idx % 2)


def test_nothing_is_logged_and_what_training_logged_stands():
    loggers, metrics = [], []
    for callbacks in ([], [PreciseBatchNorm(num_batches=3)]):
        logger = Memory()
        seen: list[dict[str, float]] = []

        class Look(pl.Callback):
            def __init__(self, seen: list[Any]) -> None:
                self.seen = seen

            def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
                for values in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
                    own = {name: float(value) for name, value in values.items() if not name.startswith("bn/")}
                    self.seen.append(own)

        settings = {"logger": logger, "log_every_n_steps": 1, "val_check_interval": 0.5}
        # Validation itself differs, and is meant to.
        trajectory(SilentValidation, data, *callbacks, Look(seen), **settings)
        loggers.append(logger.written)
        metrics.append(seen)
    # The callback writes what it did itself, under keys of its own.
    told = [[entry for entry in written if "bn/" not in str(entry)] for written in loggers]
    assert told[0]
    assert told[0] == told[1]
    assert metrics[0]
    assert metrics[0] == metrics[1]


#: Classes of loggers that `Keeping` saw. Outside of any class: what classes hold is put back.
SEEN: set[type] = set()


class Keeping(Classifier):
    """Keeps the class of the logger that a step sees."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        SEEN.add(type(self.logger))
        return super().training_step(batch, batch_idx)


def test_a_class_of_loggers_is_found_by_its_name_afterwards(tmp_path):
    trajectory(
        Keeping,
        data,
        PreciseBatchNorm(num_batches=3, step="training_step"),
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    assert len(SEEN) > 1  # those of the passes are still there
    parser = ArgumentParser()
    parser.add_argument("--logger", type=Logger)
    found = parser.parse_args(["--logger=CSVLogger", f"--logger.save_dir={tmp_path}"])
    assert found.logger.class_path == "pytorch_lightning.loggers.CSVLogger"


class SilentValidation(Talkative):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def test_training_that_logs_and_counts_steps_is_bit_identical():
    assert_no_trace(Talkative, lambda module: None, logger=Memory(), log_every_n_steps=1)


def test_log_of_the_users_own_instance_comes_back():
    class Shadowed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.told = []
            self.log = lambda name, value, **kwargs: self.told.append(name)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("loss", 0.0)
            return super().training_step(batch, batch_idx)

    assert_no_trace(Shadowed, lambda module: module.told)


# Metrics


class Measured(Classifier):
    """Metrics alone, in a collection with compute groups, with list states, and beside the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = Accuracy("binary")
        self.loss_metric = MeanMetric()
        self.several = MetricCollection(
            {"p": Precision("binary"), "r": Recall("binary"), "a": Accuracy("binary")}, compute_groups=True
        )
        self.outside = [MeanMetric()]
        self.told: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        predicted = self.net.bn.weight.sum() * batch[0].mean((1, 2, 3)).sigmoid()
        self.accuracy(predicted, batch[1])
        self.several(predicted, batch[1])
        self.loss_metric.update(loss.detach())
        self.outside[0].update(loss.detach())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict(self.several, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        values = [self.accuracy.compute(), *self.several.compute().values(), self.loss_metric.compute()]
        self.told.append(([bits(value) for value in values], self.accuracy._update_count))
        self.loss_metric.reset()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_metrics_are_as_if_the_step_had_not_run():
    assert_no_trace(Measured, lambda module: module.told)


def test_metric_that_is_no_submodule_is_as_if_the_step_had_not_run():
    assert_no_trace(Measured, lambda module: (bits(module.outside[0].compute()), module.outside[0]._update_count))


def test_collection_that_was_never_updated_finds_its_groups_later():
    def update(collection: MetricCollection) -> None:
        collection.update(torch.tensor([0.2, 0.8, 0.7]), torch.tensor([0, 1, 0]))

    def collection() -> MetricCollection:
        return MetricCollection({"p": Precision("binary"), "r": Recall("binary")}, compute_groups=True)

    ours, plain = nn.ModuleDict({"m": collection()}), collection()
    with attributes_on_copies(ours), attributes_on_copies(ours):
        update(ours["m"])
    assert not any(metric.update_called for metric in ours["m"].values(copy_state=False))
    for metrics in (ours["m"], plain):
        update(metrics)
        update(metrics)
    assert ours["m"].compute_groups == plain.compute_groups
    assert ours["m"].compute() == plain.compute()


def test_states_of_a_metric_come_back_in_the_same_tensors():
    metric = MeanMetric()
    metric.update(3.0)
    state, value = metric.mean_value, bits(metric.mean_value)
    with attributes_on_copies(nn.ModuleList([metric])):
        metric.update(100.0)
        metric.reset()
    assert metric.mean_value is state
    assert bits(metric.mean_value) == value
    assert metric.update_count == 1


# Which forward


def test_batch_is_prepared_and_seen_as_in_training():
    facts = []

    class Transferring(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            facts.append((self.trainer.training, self.trainer.validating, self.trainer.state.stage.value))
            return [3 * batch[0], batch[1]] if self.trainer.training else batch

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return [batch[0] - 1, batch[1]] if self.trainer.training else batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0].square(), batch[1]] if self.trainer.training else batch

    module = Transferring()
    trainer = quiet(callbacks=[PreciseBatchNorm(num_batches=2)], num_sanity_val_steps=0, max_epochs=1)
    trainer.fit(module, **data(shuffle=False))
    _, net, used = module.validated[-1]
    expected = [(3 * batch[0] - 1).square() for batch in train_loader(shuffle=False)][:2]
    assert [bits(x) for x in used] == [bits(x) for x in expected]
    assert_all_statistics(net, layer_inputs(net.train(), expected, NORMS))
    assert facts.count((True, False, "train")) == 4 + 2


def test_hooks_of_a_datamodule_prepare_the_batch():
    class Module(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return train_loader(shuffle=False)

        def val_dataloader(self) -> Any:
            return val_loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [2 * batch[0], batch[1]] if self.trainer.training else batch

    module = Classifier()
    trainer = quiet(callbacks=[PreciseBatchNorm(num_batches=2)], num_sanity_val_steps=0, max_epochs=1)
    trainer.fit(module, datamodule=Module())
    _, net, used = module.validated[-1]
    assert [bits(x) for x in used] == [bits(2 * batch[0]) for batch in train_loader(shuffle=False)][:2]
    assert_all_statistics(net, layer_inputs(net.train(), used, NORMS))


def one_validation(module: Classifier, step: str, **kwargs: Any) -> nn.Module:
    callback = PreciseBatchNorm(num_batches=2, step=step)
    quiet(callbacks=[callback], num_sanity_val_steps=0, max_epochs=1, **kwargs).fit(module, **data(shuffle=False))
    return module.validated[-1][1]


class ManySteps(Classifier):
    """Each step feeds the network something else."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.net(2 * batch[0])

    def alone(self, batch: Any) -> Tensor:
        return self.net(3 * batch[0])

    def indexed(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net((4 + batch_idx) * batch[0])

    def anything(self, *args: Any) -> Tensor:
        return self.net((6 + args[1]) * args[0][0])

    def keyword_default(self, batch: Any, scale: float = 5.0) -> Tensor:
        return self.net(5 * batch[0])


@pytest.mark.parametrize(
    ("step", "scales"),
    [
        ("training_step", (1, 1)),
        ("forward", (1, 1)),
        ("predict_step", (2, 2)),
        ("alone", (3, 3)),
        ("indexed", (4, 5)),
        ("anything", (6, 7)),
        ("keyword_default", (5, 5)),
    ],
)
def test_step_is_the_method_that_is_run(step, scales):
    net = one_validation(ManySteps(), step)
    batches = [scale * batch[0] for scale, batch in zip(scales, train_loader(shuffle=False), strict=False)]
    assert_all_statistics(net, layer_inputs(net.train(), batches, NORMS))


def test_step_without_an_index_is_run():
    class NoIndex(Classifier):
        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.net(2 * batch[0]), batch[1])

    net = one_validation(NoIndex(), "training_step")
    batches = [2 * batch[0] for batch in train_loader(shuffle=False)][:2]
    assert_all_statistics(net, layer_inputs(net.train(), batches, NORMS))


def test_step_with_an_index_of_another_name_is_run():
    class Renamed(Classifier):
        def training_step(self, sample: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net((1 + index) * sample[0]), sample[1])

    net = one_validation(Renamed(), "training_step")
    batches = [(1 + i) * batch[0] for i, batch in enumerate(train_loader(shuffle=False))][:2]
    assert_all_statistics(net, layer_inputs(net.train(), batches, NORMS))


def test_step_that_returns_nothing_for_some_batches_is_run():
    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 and not torch.is_grad_enabled() else loss

    one_validation(Skipping(), "training_step")


def test_optimizer_and_scheduler_do_not_step():
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.rates = [*getattr(self, "rates", []), optimizer.param_groups[0]["lr"]]

    assert_no_trace(Scheduled, lambda module: module.rates)


def test_batch_given_by_two_loaders_reaches_the_step_whole():
    class Both(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    module = Both()
    loaders = {"a": train_loader(shuffle=False), "b": train_loader(samples(20, seed=3), shuffle=False)}
    trainer = quiet(callbacks=[PreciseBatchNorm(num_batches=2)], num_sanity_val_steps=0, max_epochs=1)
    trainer.fit(module, loaders, val_loader())
    _, net, used = module.validated[-1]
    assert len(used) == 4
    assert_all_statistics(net, layer_inputs(net.train(), used, NORMS))


def test_steps_are_checked():
    module = Classifier()
    check_step(module, "training_step")
    with pytest.raises(MisconfigurationException, match="lr"):
        check_step(module, "lr")
    module.automatic_optimization = False
    check_step(module, "predict_step")
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        check_step(module, "training_step")
