"""Small real fits for the tests of the freezer: data, modules, quiet Trainers, and what a run left behind."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_utilities.core import rank_zero
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormFreezer
from tests.models import BodyAndHead, bits, fill_statistics, seeded

#: The BatchNorm layers of a PretrainedClassifier: those below ``net.body``, which the tests freeze, and the other one.
BODY = ("net.body.1", "net.body.4")
HEAD = "net.head.1"

#: Batches of one epoch, and epochs of one fit, unless a test asks for others.
BATCHES = 4
EPOCHS = 2


def pretrained_net() -> BodyAndHead:
    """The same network each time, with statistics and affine parameters that are not those of construction."""
    return fill_statistics(seeded(BodyAndHead))  # type: ignore[return-value]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """With everything that moves a parameter besides its gradient."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The other family: two moments, and a decay that is not part of the gradient."""
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class PretrainedClassifier(pl.LightningModule):
    """What a user writes around a network: two losses and an optimizer over all parameters."""

    def __init__(self, net: nn.Module | None = None, optimizer: Optimizer = sgd) -> None:
        super().__init__()
        self.net = pretrained_net() if net is None else net
        self._optimizer = optimizer

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.parameters())


class FrozenByHand(PretrainedClassifier):
    """An oracle without the package: the body in eval before every batch, its parameters never part of the training."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for name in BODY:
            layers(self)[name].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for name in BODY:
            layers(self)[name].eval()


#: Lightning cannot wind a plain DataLoader forward; a Located module does not need it to.
resumed_in_mid_epoch = pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)


class Located(PretrainedClassifier):
    """Its batches are a function of epoch and index, so that a resumed run sees those that the first one would have."""

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return self.loss(rows(8, seed=1000 * self.current_epoch + batch_idx))


class Hooked(pl.Callback):
    """Calls a function at some hooks, as a callback of the user would."""

    def __init__(self, **hooks: Callable[..., None]) -> None:
        for name, function in hooks.items():
            setattr(self, name, function)


class Watch(pl.Callback):
    """Notes for every training batch whether each BatchNorm layer's statistics and affine parameters moved in it."""

    def __init__(self) -> None:
        self.stats: list[dict[str, bool]] = []
        self.affine: list[dict[str, bool]] = []
        self._before: dict[str, bytes] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._before = values(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        after = values(pl_module)
        moved = {key for key, value in after.items() if value != self._before[key]}
        for noted, names in ((self.stats, ("running_mean", "running_var")), (self.affine, ("weight", "bias"))):
            noted.append({layer: any(f"{layer}.{name}" in moved for name in names) for layer in layers(pl_module)})


def rows(count: int = 8 * BATCHES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of mean 1.5 and standard deviation 2 with labels that depend on them."""
    x = 1.5 + 2 * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 4).long()


def loader(count: int = 8 * BATCHES, seed: int = 0) -> DataLoader[Any]:
    """Batches of eight, in a fixed order."""
    return DataLoader(TensorDataset(*rows(count, seed)), batch_size=8)


def trainer_of(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU, with a sanity check."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(module: pl.LightningModule, *callbacks: pl.Callback, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    """Fits with validation; the Trainer that did it."""
    if any(type(callback).__name__ == "ModelCheckpoint" for callback in callbacks):
        options["enable_checkpointing"] = True
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, loader(), loader(16, seed=1), ckpt_path=ckpt_path)
    return trainer


def freezer(**arguments: Any) -> BatchNormFreezer:
    """One that holds the body."""
    return BatchNormFreezer(**{"modules": "body", "root": "net", **arguments})


def layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers, found without the package; names without what torch.compile adds."""
    return {
        re.sub(r"_orig_mod\.", "", name): layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
    }


def values(module: nn.Module, names: Iterable[str] | None = None) -> dict[str, bytes]:
    """The bytes of running statistics, counters, ``weight`` and ``bias`` of the named layers, or of all."""
    found = layers(module)
    return {
        f"{name}.{key}": bits(value)
        for name in (found if names is None else names)
        for key in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
        if isinstance(value := getattr(found[name], key), Tensor)
    }


def saved(state: dict[str, Tensor], names: Iterable[str] = BODY) -> dict[str, bytes]:
    """As :func:`values`, of a state dict in a checkpoint."""
    return {key: bits(value) for key, value in state.items() if any(key.startswith(f"{name}.") for name in names)}


def state(module: nn.Module) -> dict[str, bytes]:
    """The bytes of everything."""
    return {key: bits(value) for key, value in module.state_dict().items()}


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: submodule.training for name, submodule in module.named_modules()}


@contextmanager
def said() -> Iterator[list[str]]:
    """What Lightning's log says inside."""
    lines: list[str] = []

    def note(record: Any) -> bool:
        lines.append(record.getMessage())
        return True

    level = rank_zero.log.level
    rank_zero.log.setLevel("INFO")
    rank_zero.log.addFilter(note)
    try:
        yield lines
    finally:
        rank_zero.log.removeFilter(note)
        rank_zero.log.setLevel(level)


def task_by_index(batch: Any, batch_idx: int) -> str:
    """For ``task_key``: even batches are of the task "det", odd ones of "seg"."""
    return ("det", "seg")[batch_idx % 2]
