"""Running the user's own step outside the training loop, so that nothing but BatchNorm's statistics comes of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import Parameter
from itertools import chain, count
from typing import Any

from torch import nn

from lightning_bn.callbacks._lightning.namespaces import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
)
from lightning_bn.callbacks._lightning.state import schedules
from lightning_bn.callbacks._lightning.training_step import in_step_context, prepare_batch, training_stage
from lightning_bn.callbacks._second_run.drawn_once import held_by, refuse_drawn_once
from lightning_bn.functional._batches import default_forward
from lightning_bn.functional._services import LOCKS
from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.object_state import attributes_on_copies

SILENT_LOGS = dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None)
"""In the place of a module's own."""

OTHER_STEPS = "Choose step='forward', 'predict_step' or a method of your own that runs the network on a batch."
Step = Callable[[Any, Any], Any]


@contextmanager
def isolated_step(
    trainer: Trainer,
    module: LightningModule,
    step: str,
    said: set[str],
    *,
    task_of: Callable[[Any, int], str | None] | None = None,
    indices: Sequence[int] = (),
) -> Iterator[tuple[Step, Callable[[Any], Any], Callable[[Any], str | None] | None]]:
    """Yield the step as ``forward(model, batch)``, what prepares a batch for it, and what tells the task of one.

    Inside, ``log`` and ``log_dict`` are silent, the Trainer says that it is training and its loggers write nothing.
    What modules, their classes, optimizers' groups and schedulers hold (metrics' states, counters, lists that steps
    append to) are copies, which are dropped. Left to the caller: weights, gradients, modes, buffers and random number
    generators.

    Args:
        trainer: Of the run.
        module: Whose step.
        step: The name of its method.
        said: Paths of what cannot be copied, of which it was said that it is shared; those found are added.
        task_of: Tells the task of a batch and its index, before the step is run on it, if it is; None for nobody.
        indices: Of the batches, as far as they are not 0, 1, 2 and so on.

    Raises:
        MisconfigurationException: If the module holds something that can be drawn from only once.
    """
    refuse_drawn_once(module, step)
    with ExitStack() as stack:
        stack.enter_context(training_stage(trainer))
        stack.enter_context(exchanged("PreciseBatchNorm", [Entries("", module, attributes=SILENT_LOGS)]))
        shared = stack.enter_context(attributes_on_copies(module, schedules(trainer)))
        _say_shared(module, step, shared, said)
        run = step_function(module, step)
        numbers, batch_idx = chain(indices, count(len(indices))), -1

        def told(batch: Any) -> str | None:
            nonlocal batch_idx
            batch_idx = next(numbers)
            return None if task_of is None else task_of(batch, batch_idx)

        def forward(_: nn.Module, batch: Any) -> Any:
            nonlocal batch_idx
            if task_of is None:
                batch_idx = next(numbers)
            try:
                return in_step_context(trainer, lambda prepared: run(prepared, batch_idx), batch)
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(
                        f"PreciseBatchNorm was running {type(module).__name__}.{step} outside of training, without "
                        "gradients. If it cannot run this way, choose another step=: 'forward', 'predict_step' or a "
                        "method of your own that runs the network on a batch."
                    )
                raise

        yield forward, lambda batch: prepare_batch(trainer, module, batch), None if task_of is None else told


def _say_shared(module: nn.Module, step: str, shared: Sequence[Any], said: set[str]) -> None:
    # Neither locks nor what decodes JSON or writes a log has anything to lose.
    harmless = [value for value in shared if type(value).__module__ in ("_json", "logging") or isinstance(value, LOCKS)]
    ids = {id(value) for value in shared} - {id(value) for value in harmless}
    paths = [path for path, value in held_by(module) if id(value) in ids and path not in said] if ids else []
    said.update(paths)
    if paths:
        rank_zero_info(
            f"PreciseBatchNorm: {quoted(paths)} cannot be copied: changes that {step} makes to it during a "
            "recalibration are not undone. If that matters, choose step='forward' or a method of your own that does "
            "not use it."
        )


def check_step(module: LightningModule, step: str) -> None:
    """Raise unless ``step`` can be run.

    Raises:
        MisconfigurationException: If the module has no such method, or if it is ``training_step`` under manual
            optimization, which would step the optimizers.
    """
    if not callable(getattr(module, step, None)):
        raise MisconfigurationException(
            f"PreciseBatchNorm(step={step!r}): {type(module).__name__} has no method of that name. Choose "
            f"'training_step', 'predict_step', 'forward' or a method of your own that takes a batch."
        )
    if step == "training_step" and "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            f"PreciseBatchNorm(step='training_step'): {type(module).__name__}.training_step takes a dataloader_iter, "
            f"not a batch. Choose step='forward', 'predict_step' or a method of your own that takes a batch."
        )
    if step == "training_step" and not module.automatic_optimization:
        raise MisconfigurationException(
            f"PreciseBatchNorm(step='training_step') cannot run {type(module).__name__}.training_step under manual "
            f"optimization: it would step the optimizers. Choose step='forward', 'predict_step' or a method of your "
            f"own that runs the network on a batch."
        )


def step_function(module: LightningModule, step: str) -> Callable[[Any, int], Any]:
    """Return the module's method of that name as a function of batch and batch index."""
    if step == "forward":
        return lambda batch, batch_idx: default_forward(module, batch)
    method = getattr(module, step)
    # By position, as Lightning does: users name the index as they like, or leave it out.
    kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
    positional = sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    takes_index = positional > 1 or Parameter.VAR_POSITIONAL in kinds
    return lambda batch, batch_idx: method(batch, batch_idx) if takes_index else method(batch)
