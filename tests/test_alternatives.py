"""What else people do to keep BatchNorm fixed, measured; docs/freezer.md has to say exactly that."""

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from lightning_bn import BatchNormFreezer
from lightning_bn.functional import freeze_batch_norm, unfreeze_batch_norm
from tests.models import EveryDimension, FrozenBatchNorm2d, bits, fill_statistics, seeded

PAGE = Path(__file__).parent.parent / "docs" / "freezer.md"
BATCHES, EPOCHS = 5, 3
MIDDLE = 8
"""Steps after which a run is stopped: in its second epoch, and past half of all, so that only one checkpoint is due."""


class ComparedClassifier(pl.LightningModule):
    """Its batches are a function of epoch and index; compares what its layers do with evaluation.

    Args:
        train_at: Where it calls ``self.train()``: nowhere, at the start of an epoch, or in the training step.
        trainable_only: Whether the optimizer is given only what requires a gradient, as BaseFinetuning asks for.
    """

    def __init__(self, train_at: str = "", trainable_only: bool = False) -> None:
        super().__init__()
        self.net = fill_statistics(seeded(EveryDimension))
        self.train_at = train_at
        self.trainable_only = trainable_only
        self.as_in_evaluation = dict.fromkeys(NAMES, True)

    def on_train_epoch_start(self) -> None:
        if self.train_at == "epoch":
            self.train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.train_at == "step":
            self.train()
        generator = torch.Generator().manual_seed(100 * self.current_epoch + batch_idx)
        x = 1 + 2 * torch.randn(8, 2, 4, 4, 4, generator=generator)
        with self.compared():
            output = self.net(x)
        return F.cross_entropy(output, torch.arange(8) % 2)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(torch.zeros(2, 2, 4, 4, 4))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad or not self.trainable_only]
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Inside, each layer's output is compared with what evaluation would make of the same input."""
        expected = {}

        def before(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
            # momentum and eps are torch's defaults everywhere
            expected[name] = F.batch_norm(
                inputs[0], layer.running_mean, layer.running_var, layer.weight, layer.bias, training=False
            ).detach()

        def after(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.as_in_evaluation[name] &= torch.allclose(output, expected[name], atol=1e-5)

        handles = []
        for name in NAMES:
            layer = getattr(self.net, name)
            handles.append(layer.register_forward_pre_hook(functools.partial(before, name)))
            handles.append(layer.register_forward_hook(functools.partial(after, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


NAMES = ("bn2", "bn1", "bn3")
"""The two-dimensional one first: it is what the others are compared with."""


def layers(module: ComparedClassifier) -> list[nn.Module]:
    return [getattr(module.net, name) for name in NAMES]


class ByHand(pl.Callback):
    """Applies an alternative at the start of an epoch and takes it back at that of a later one, as a script would.

    Args:
        begin: Freezes the layers of a module.
        end: Takes that back.
        start: The first epoch; None where ``begin`` was called before the fit.
        stop: The first epoch that is free again; None for never.
        each_batch: Whether ``begin`` is called before every batch, and not once.
    """

    def __init__(
        self,
        begin: Callable[[ComparedClassifier], None],
        end: Callable[[ComparedClassifier], None],
        start: int | None = None,
        stop: int | None = None,
        each_batch: bool = False,
    ) -> None:
        self.begin, self.end, self.start, self.stop, self.each_batch = begin, end, start, stop, each_batch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.start and not self.each_batch:
            self.begin(pl_module)
        if trainer.current_epoch == self.stop:
            self.end(pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        epoch = trainer.current_epoch
        if self.each_batch and epoch >= (self.start or 0) and (self.stop is None or epoch < self.stop):
            self.begin(pl_module)


class Finetuning(BaseFinetuning):
    """Lightning's way, for the same layers."""

    def __init__(self, start: int | None = None, stop: int | None = None) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def freeze_before_training(self, pl_module: Any) -> None:
        if self.start is None:
            self.freeze(layers(pl_module), train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == self.start:
            self.freeze(layers(pl_module), train_bn=False)
        if epoch == self.stop:
            self.unfreeze_and_add_param_group(layers(pl_module), optimizer, train_bn=True)


def require_gradients(module: ComparedClassifier, required: bool) -> None:
    for layer in layers(module):
        layer.requires_grad_(required)


def set_mode(module: ComparedClassifier, training: bool) -> None:
    for layer in layers(module):
        layer.train(training)


def set_momentum(module: ComparedClassifier, momentum: float) -> None:
    for layer in layers(module):
        layer.momentum = momentum


def replace_layers(module: ComparedClassifier) -> None:
    """As the libraries' own functions do it: the two-dimensional layers, and no other ones."""
    new = FrozenBatchNorm2d(module.net.bn2.num_features)
    new.load_state_dict(module.net.bn2.state_dict(), strict=False)
    module.net.bn2 = new


def replace_back(module: ComparedClassifier) -> None:
    new = nn.BatchNorm2d(len(module.net.bn2.weight))
    new.load_state_dict(module.net.bn2.state_dict(), strict=False)
    module.net.bn2 = new


Callbacks = Callable[[ComparedClassifier, int | None, int | None], pl.Callback]


def by_hand(
    begin: Callable[[ComparedClassifier], None], end: Callable[[ComparedClassifier], None], each_batch: bool = False
) -> Callbacks:
    def build(module: ComparedClassifier, start: int | None, stop: int | None) -> pl.Callback:
        if start is None and not each_batch:
            begin(module)  # before the fit, where a script does it
        return ByHand(begin, end, start, stop, each_batch)

    return build


def freezer(module: ComparedClassifier, start: int | None, stop: int | None) -> pl.Callback:
    return BatchNormFreezer(root="net", start_epoch=start, stop_epoch=stop)


ALTERNATIVES: dict[str, Callbacks] = {
    "`requires_grad = False`": by_hand(
        lambda module: require_gradients(module, False), lambda module: require_gradients(module, True)
    ),
    "`.eval()`, once": by_hand(lambda module: set_mode(module, False), lambda module: set_mode(module, True)),
    "`.eval()`, every batch": by_hand(
        lambda module: set_mode(module, False), lambda module: set_mode(module, True), each_batch=True
    ),
    "`BaseFinetuning`, `train_bn=False`": lambda module, start, stop: Finetuning(start, stop),
    "`momentum = 0`": by_hand(lambda module: set_momentum(module, 0.0), lambda module: set_momentum(module, 0.1)),
    "`FrozenBatchNorm2d`": by_hand(replace_layers, replace_back),
    "`freeze_batch_norm`": by_hand(
        lambda module: freeze_batch_norm(module, root="net") and None,
        lambda module: unfreeze_batch_norm(module, root="net") and None,
    ),
    "`BatchNormFreezer`": freezer,
}


@dataclass(frozen=True)
class Kept:
    """What stayed what it was through one fit, for one layer."""

    statistics: bool
    affine: bool
    as_in_evaluation: bool


@dataclass(frozen=True)
class Facts:
    """A row of the table, cell by cell."""

    statistics: str
    affine: str
    as_in_evaluation: str
    through_train: str
    other_dimensions: str
    same_keys: str
    undone: str
    resumed: str


def fit(
    alternative: Callbacks,
    start: int | None = None,
    stop: int | None = None,
    *,
    train_at: str = "",
    resume: Path | None = None,
    checkpoints: Path | None = None,
) -> ComparedClassifier:
    """A fit with validation after every epoch; the module as it is afterwards."""
    module = ComparedClassifier(train_at, trainable_only=stop is not None and alternative is ALTERNATIVES[LIGHTNINGS])
    callbacks = [alternative(module, start, stop)]
    if checkpoints is not None:
        callbacks.append(ModelCheckpoint(checkpoints, "middle", every_n_train_steps=MIDDLE))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=checkpoints is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(torch.zeros(BATCHES, 1), batch_size=1)
    with warnings.catch_warnings():
        # Lightning notices what is set to eval before a fit; that is what is measured here.
        warnings.filterwarnings("ignore", "Found .* module")
        # Batches here are a function of epoch and index; the loader only counts.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        trainer.fit(module, data, DataLoader(torch.zeros(1, 1)), ckpt_path=resume)
    return module


LIGHTNINGS = "`BaseFinetuning`, `train_bn=False`"


def values(layer: nn.Module, *names: str) -> list[bytes]:
    return [bits(getattr(layer, name)) for name in names]


def kept(module: ComparedClassifier) -> dict[str, Kept]:
    """What stayed, by layer, since a module of the same seed was built."""
    fresh = ComparedClassifier()
    found = {}
    for name in NAMES:
        before, after = getattr(fresh.net, name), getattr(module.net, name)
        statistics, affine = (
            values(before, *names) == values(after, *names)
            for names in (("running_mean", "running_var"), ("weight", "bias"))
        )
        found[name] = Kept(statistics, affine, module.as_in_evaluation[name])
    return found


def state(module: ComparedClassifier) -> Mapping[str, bytes]:
    return {name: bits(value) for name, value in module.state_dict().items()}


def is_undone(alternative: Callbacks) -> bool:
    """Whether statistics and affine parameters train on after it was taken back in the middle of a fit."""
    module = fit(alternative, stop=1)
    types = all(isinstance(layer, _BatchNorm) for layer in layers(module))
    return types and not any(stayed.statistics or stayed.affine for stayed in kept(module).values())


def is_resumed(alternative: Callbacks, folder: Path) -> bool:
    """Whether a run that freezes from its second epoch on and is stopped in the middle of it ends where it would have.

    Weights and statistics are those of the run that was not stopped.
    """
    uninterrupted = fit(alternative, start=1, checkpoints=folder)
    saved = torch.load(folder / "middle.ckpt", weights_only=True)
    if set(saved["state_dict"]) != set(ComparedClassifier().state_dict()):
        return False  # nothing that the script builds could load it
    resumed = fit(alternative, start=1, resume=folder / "middle.ckpt")
    return saved["global_step"] == MIDDLE and state(resumed) == state(uninterrupted)


def measured(alternative: Callbacks, folder: Path) -> Facts:
    module = fit(alternative)
    found = kept(module)
    plain = found["bn2"]
    hard, soft = (kept(fit(alternative, train_at=where))["bn2"] == plain for where in ("step", "epoch"))
    return Facts(
        statistics=said(plain.statistics),
        affine=said(plain.affine),
        as_in_evaluation=said(plain.as_in_evaluation),
        through_train="yes" if hard and soft else "between batches" if soft else "no",
        other_dimensions=said(found["bn1"] == found["bn3"] == plain),
        same_keys=said(set(module.state_dict()) == set(ComparedClassifier().state_dict())),
        undone=said(is_undone(alternative)),
        resumed=said(is_resumed(alternative, folder)),
    )


def said(fact: bool) -> str:
    return "yes" if fact else "no"


def table(text: str) -> dict[str, Facts]:
    """The table of alternatives of a page."""
    found = {}
    for line in text.splitlines():
        cells = [re.sub(r"\*\*", "", cell).strip() for cell in line.strip("|").split("|")]
        if len(cells) == 1 + len(fields(Facts)) and cells[0] in ALTERNATIVES:
            found[cells[0]] = Facts(*cells[1:])
    return found


DOCUMENTED = table(PAGE.read_text(encoding="utf-8"))


def test_the_page_lists_all_alternatives():
    assert list(DOCUMENTED) == list(ALTERNATIVES)


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_the_page_says_what_was_measured(name, tmp_path):
    assert DOCUMENTED[name] == measured(ALTERNATIVES[name], tmp_path)


def test_a_wrong_cell_is_seen():
    row = next(iter(DOCUMENTED))
    line = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {row}"))
    wrong = table(line.replace("| yes", "| no", 1))[row]
    assert wrong != DOCUMENTED[row] == replace(wrong, **{wrong_field(wrong, DOCUMENTED[row]): "yes"})


def wrong_field(a: Facts, b: Facts) -> str:
    [name] = [field.name for field in fields(Facts) if getattr(a, field.name) != getattr(b, field.name)]
    return name
