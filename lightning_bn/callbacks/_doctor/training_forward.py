"""The training step as a forward of the doctor: silent, and without a trace on optimizers and schedulers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from lightning_bn.callbacks._lightning.namespaces import NOT_THE_MODULES_OWN, LightningModule, Trainer
from lightning_bn.callbacks._lightning.optimizers import attached
from lightning_bn.callbacks._lightning.state import schedules
from lightning_bn.callbacks._lightning.training_step import in_step_context, training_stage
from lightning_bn.callbacks._second_run.step import SILENT_LOGS, check_step, step_function
from lightning_bn.functional._object_copies import on_copies
from lightning_bn.functional.doctor.forwards import Forward
from lightning_bn.functional.layers.exchange import Entries, exchanged


def training_forward(trainer: Trainer, module: LightningModule) -> Forward:
    """Return ``training_step`` as ``forward(model, batch)``.

    What it logs goes nowhere, and what optimizers and schedulers hold is afterwards as it was; what the module holds is
    left to the caller.

    Raises:
        MisconfigurationException: If it cannot be run without training: under manual optimization it would step the
            optimizers.
    """
    check_step(module, "training_step")
    step = step_function(module, "training_step")

    def forward(_: nn.Module, batch: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(attached(trainer, module))
            stack.enter_context(training_stage(trainer))
            stack.enter_context(exchanged("diagnose", [Entries("", module, attributes=SILENT_LOGS)]))
            # The optimizers' tensors are not those that the module holds here, and nothing writes to them.
            tensors = [
                one for optimizer in trainer.optimizers for group in optimizer.param_groups for one in group["params"]
            ]
            stack.enter_context(on_copies(schedules(trainer), [*tensors, *module.modules()], NOT_THE_MODULES_OWN))
            return in_step_context(trainer, lambda given: step(given, 0), batch)

    return forward
