"""Running the user's own step outside the training loop, so that nothing but BatchNorm's statistics comes of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bn.callbacks._lightning.namespaces import (
    NOT_THE_MODULES_OWN,
    LightningModule,
    MisconfigurationException,
    Trainer,
)
from lightning_bn.callbacks._lightning.state import schedules
from lightning_bn.callbacks._lightning.training_step import in_step_context, prepare_batch, training_stage
from lightning_bn.callbacks._second_run.object_state import preserved_object_state
from lightning_bn.functional._batches import default_forward
from lightning_bn.functional._bits import same_bits
from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.torch_private import attributes_of, buffers_of, parameters_of

_MOST_BYTES = 1 << 26
"""Of a tensor or array that a module keeps as an attribute: larger ones are data, which a step does not write to."""

_SILENT = dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None)

Step = Callable[[Any, Any], Any]


@contextmanager
def isolated_step(
    trainer: Trainer, module: LightningModule, step: str, weights: Weights
) -> Iterator[tuple[Step, Callable[[Any], Any]]]:
    """Yield the step as ``forward(model, batch)`` and the function that prepares a batch for it.

    Inside, ``log`` and ``log_dict`` are silent, the Trainer says that it is training and its loggers write nothing;
    afterwards torchmetrics' states and the modules' own attributes (counters, lists that steps append to) are as they
    were, and so are weights that the step moves itself. Left to the caller: gradients, modes, buffers and random
    number generators.
    """
    with ExitStack() as stack:
        stack.enter_context(training_stage(trainer))
        stack.enter_context(exchanged("PreciseBatchNorm", [Entries("", module, attributes=_SILENT)]))
        stack.enter_context(preserved_attributes(module))
        stack.enter_context(preserved_object_state(schedules(trainer), leave=(Optimizer, nn.Parameter)))
        stack.enter_context(weights.preserved(module))
        run = _step_function(module, step)
        batch_idx = -1

        def forward(_: nn.Module, batch: Any) -> Any:
            nonlocal batch_idx
            batch_idx += 1
            try:
                output = in_step_context(trainer, lambda prepared: run(prepared, batch_idx), batch)
                weights.after_batch(step)
                return output
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(
                        f"PreciseBatchNorm was running {type(module).__name__}.{step} outside of training, without "
                        f"gradients. If it cannot run there, choose another step=: 'forward', 'predict_step' or a "
                        f"method of your own that runs the network on a batch."
                    )
                raise

        yield forward, lambda batch: prepare_batch(trainer, module, batch)


class Weights:
    """Weights that a step moves itself: those that are trained are refused, a teacher's are put back.

    Looked for in the first batch of the first pass, with copies of all weights that live as long as that batch.

    Attributes:
        teachers: Names of weights that are not trained and that the step moves.
    """

    def __init__(self) -> None:
        self.teachers: set[str] | None = None
        self._kept: list[tuple[str, nn.Parameter, Tensor]] = []

    @contextmanager
    def preserved(self, module: LightningModule) -> Iterator[None]:
        """Put back, at the end of one pass, what the step moved in it."""
        self._kept = [
            (name, weight, weight.detach().clone())
            for name, weight in module.named_parameters()
            if self.teachers is None or name in self.teachers
        ]
        try:
            yield
        finally:
            for _, weight, kept in self._kept:
                if not same_bits(weight, kept):
                    weight.data.copy_(kept)
            self._kept = []

    def after_batch(self, step: str) -> None:
        """Find out, after the first batch, which weights the step moves.

        Raises:
            MisconfigurationException: If one of them is trained; it has been put back.
        """
        if self.teachers is not None:
            return
        moved = [entry for entry in self._kept if not same_bits(entry[1], entry[2])]
        trained = [name for name, weight, _ in moved if weight.requires_grad]
        if trained:
            raise MisconfigurationException(
                f"PreciseBatchNorm(step={step!r}): {step} writes to the trained weight {trained[0]!r} itself, which "
                f"would change the training. Choose step='forward', 'predict_step' or a method of your own that only "
                f"runs the network on a batch."
            )
        self.teachers = {name for name, _, _ in moved}
        self._kept = moved


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


def _step_function(module: LightningModule, step: str) -> Callable[[Any, int], Any]:
    if step == "forward":
        return lambda batch, batch_idx: default_forward(module, batch)
    method = getattr(module, step)
    # By position, as Lightning does: users name the index as they like, or leave it out.
    kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
    positional = sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    takes_index = positional > 1 or Parameter.VAR_POSITIONAL in kinds
    return lambda batch, batch_idx: method(batch, batch_idx) if takes_index else method(batch)


@contextmanager
def preserved_attributes(module: LightningModule) -> Iterator[None]:
    """What the module and its submodules keep is afterwards as it was, metrics included; besides weights, buffers."""
    internal = set(attributes_of(nn.Module()))
    own = [
        {name: value for name, value in attributes_of(submodule).items() if name not in internal}
        for submodule in module.modules()
    ]
    with ExitStack() as stack:
        for submodule, attributes in zip(module.modules(), own, strict=True):
            stack.callback(_put_attributes, submodule, attributes, internal)
        # Modules, parameters and buffers are seen to elsewhere; above all, statistics are written meanwhile.
        known = [*module.modules(), *module.parameters(), *module.buffers()]
        homes = (attributes_of, parameters_of, buffers_of)
        known += [home(part) for part in module.modules() for home in homes]
        stack.enter_context(preserved_object_state(own, leave=NOT_THE_MODULES_OWN, most_bytes=_MOST_BYTES, known=known))
        yield


def _put_attributes(module: nn.Module, attributes: dict[str, Any], internal: set[str]) -> None:
    now = attributes_of(module)
    for name in [name for name in now if name not in internal and name not in attributes]:
        del now[name]
    now.update(attributes)
