"""BatchNorm layers of configured submodules kept frozen through a fit, with proof that they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    same_kind_before,
)
from lightning_bn.functional.freezing import freeze_layers, select_to_freeze, unfreeze_layers
from lightning_bn.functional.layers import affine_parameters, batch_norm_layers
from lightning_bn.functional.proof import KeptValues, Moved
from lightning_bn.functional.status import layer_status, update_status


@dataclass(frozen=True)
class FreezeReport:
    """What became of the frozen values in one fit.

    Attributes:
        layers: Names of the frozen layers.
        steps: Optimizer steps they were frozen for.
        moved: What was found changed and was put back; empty where all stayed bit-identical.
    """

    layers: tuple[str, ...]
    steps: int
    moved: tuple[Moved, ...]

    @property
    def identical(self) -> bool:
        """Whether every frozen value stayed bit-identical without help."""
        return not self.moved

    def __str__(self) -> str:
        frozen = f"{len(self.layers)} frozen layers"
        if self.identical:
            return f"{frozen} bit-identical over {self.steps:,} steps"
        return f"{frozen} over {self.steps:,} steps; moved and put back: {', '.join(map(str, self.moved))}"


class BatchNormFreezer(Callback):
    """Keeps running statistics and affine parameters of the BatchNorm layers of some submodules fixed during a fit.

    Statistics: the layers normalise with their running statistics in training too, and stay so through any
    ``.train()``. Affine: their gradients are dropped before every optimizer step; the parameters stay in their
    optimizer groups and keep ``requires_grad``, so that distributed training and resuming are not disturbed. At the end
    of the fit all frozen values are compared with those at its beginning, bit by bit.

    Only BatchNorm is frozen; other weights below the same paths train on.

    Args:
        modules: Which BatchNorm layers, as for :func:`~lightning_bn.functional.batch_norm_layers`: module paths such as
            ``["vfe", "backbone_2d.blocks"]``, globs or regular expressions. None for all.
        exclude: Which of them not.
        root: Put before every path, for instance ``"model"`` where the network is in ``self.model``.
        stats: Whether to freeze running statistics.
        affine: Whether to freeze ``weight`` and ``bias``.
        name: Tells this freezer from another one in the same Trainer.

    Attributes:
        report: What became of the frozen values, None before the end of a fit.

    Raises:
        MisconfigurationException: If neither ``stats`` nor ``affine`` is asked for, or if two freezers of one Trainer
            have the same ``name``.
        SelectionError: When the fit starts, if the selection means no layer or one without running statistics.
    """

    def __init__(
        self,
        modules: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        root: str = "",
        stats: bool = True,
        affine: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not stats and not affine:
            raise MisconfigurationException("BatchNormFreezer(stats=False, affine=False) freezes nothing.")
        self.modules = modules
        self.exclude = exclude
        self.root = root
        self.stats = stats
        self.affine = affine
        self.name = name
        self.report: FreezeReport | None = None
        self._layers: dict[str, _BatchNorm] = {}
        self._affine_parameters: list[nn.Parameter] = []
        self._kept: KeptValues | None = None
        self._moved: dict[tuple[str, str], Moved] = {}
        self._first_step = 0

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.name}]" if self.name else type(self).__name__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if any(other.state_key == self.state_key for other in same_kind_before(trainer, self)):
            raise MisconfigurationException(
                f"two BatchNormFreezers have the name {self.name!r}: give each its own name=, so that their states "
                f"are told apart in checkpoints."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = None
        self._select(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here and not earlier: before the sanity check Lightning would warn of modules in eval mode, and layers may
        # have been replaced since on_fit_start.
        self._layers = batch_norm_layers(pl_module, self.modules, self.exclude, self.root)
        self._kept, self._moved, self._first_step = None, {}, trainer.global_step
        if self.stats:
            freeze_layers(self._layers, stats=True, affine=False, by=self.state_key)
        if self.affine:
            self._affine_parameters = [p for layer in self._layers.values() for p in affine_parameters(layer)]
            for layer in self._layers.values():
                owners = layer_status(layer).affine_frozen_by
                update_status(layer, affine_frozen_by=(*owners, self.state_key))
            self._drop_gradients()
        rank_zero_info(f"BatchNormFreezer: {self._summary(pl_module)}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._kept is None:
            # Only now: weights may still have been loaded in the module's own on_train_start.
            self._kept = KeptValues(self._layers, stats=self.stats, affine=self.affine)
        if self.stats:
            for layer in self._layers.values():
                if layer.training:
                    layer.training = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        # Before clipping, so that the norm is that of the gradients that are used.
        self._drop_gradients()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mend(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept is None:
            self._let_go()
            return
        self._mend(trainer)
        self.report = FreezeReport(
            tuple(self._layers), trainer.global_step - self._first_step, tuple(self._moved.values())
        )
        self._let_go()
        (rank_zero_info if self.report.identical else rank_zero_warn)(f"BatchNormFreezer: {self.report}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _select(self, module: LightningModule) -> dict[str, _BatchNorm]:
        return select_to_freeze(
            module, self.modules, self.exclude, stats=self.stats, affine=self.affine, root=self.root
        )

    def _drop_gradients(self) -> None:
        for parameter in self._affine_parameters:
            parameter.grad = None

    def _mend(self, trainer: Trainer) -> None:
        if self._kept is None or trainer.sanity_checking:
            return
        moved = self._kept.moved(self._layers)
        if moved:
            self._kept.put_back(self._layers)
            self._moved.update({(one.layer, one.value): one for one in moved})

    def _let_go(self) -> None:
        # Also after an exception inside validation, or in a later Trainer the layers would still be in eval.
        if self.stats:
            unfreeze_layers(self._layers, stats=True, affine=False, by=self.state_key)
        for layer in self._layers.values():
            others = tuple(owner for owner in layer_status(layer).affine_frozen_by if owner != self.state_key)
            update_status(layer, affine_frozen_by=others)
        self._layers, self._affine_parameters, self._kept = {}, [], None

    def _summary(self, module: LightningModule) -> str:
        what = " and ".join(word for word, on in (("statistics", self.stats), ("affine", self.affine)) if on)
        return f"{len(self._layers)} of {len(batch_norm_layers(module))} BatchNorm layers frozen ({what})"
