"""What is wrong with BatchNorm in a model and in the fit that trains it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_bn.callbacks._doctor.all_rules import FIT_RULES
from lightning_bn.callbacks._doctor.examined_fit import examine_fit
from lightning_bn.callbacks._doctor.training_forward import training_forward
from lightning_bn.callbacks._lightning.namespaces import MisconfigurationException, Trainer
from lightning_bn.callbacks._lightning.state import has_own_hook
from lightning_bn.functional.doctor.all_rules import RULES, findings
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.forwards import Forward, examine
from lightning_bn.functional.layers.names import named_batch_norm


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and what could not be looked at.

    Attributes:
        findings: Faults first.
        missing: What was not to be had, and why.
        notes: What else is to be known of how it was looked at, in sentences.
    """

    findings: list[Finding]
    missing: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


_MANUAL = (
    "training_step was not run, since under manual optimization it would train: the network alone was run, and nothing "
    "is said of layers that it does not reach."
)


def diagnose(
    model: nn.Module,
    trainer: Trainer | None = None,
    batch: Any = None,
    *,
    forward: Forward | None = None,
    more_batches: Sequence[Any] = (),
) -> list[Finding]:
    """Return what is wrong with BatchNorm in ``model`` and in its training, faults first; nothing changes.

    Without a Trainer the same as :func:`lightning_bn.functional.diagnose`. With one its callbacks, optimizers and
    processes are looked at too, before a fit or in one, and a batch is run through ``training_step``: without
    gradients, with logging silenced, on copies of weights and buffers. Before a fit ``configure_optimizers`` is called
    once for that. A warning names what could not be looked at, because code of your own raised an error, or because
    ``setup`` or ``configure_model`` is yet to make it.

    Args:
        model: Any module; with a Trainer the LightningModule that it fits.
        trainer: Which.
        batch: What training gives it; None for the rules that need none.
        forward: Runs the model on one batch as training does: ``forward(model, batch)``. None for ``training_step``
            where there is a Trainer and automatic optimization, else as for ``recalibrate``.
        more_batches: Further ones, for layers that only some batches reach and sources that alternate.

    Raises:
        TypeError: If the batch cannot be fed without ``forward``.
        ValueError: If a module is lazy and has seen no batch yet.
    """
    batches = [*more_batches] if batch is None else [batch, *more_batches]
    found = diagnosis(model, trainer, batches, forward)
    missing = {**found.missing, **_to_be_made(model)}
    if missing:
        unseen = "; ".join(f"{what} ({' '.join(why.split())})" for what, why in missing.items())
        warnings.warn(f"diagnose: not looked at: {unseen}", UserWarning, stacklevel=2)
    return found.findings


def _to_be_made(model: nn.Module) -> dict[str, str]:
    """Layers that a LightningModule without any may make when a fit begins, as what is not looked at."""
    hooks = [name for name in ("setup", "configure_model") if has_own_hook(model, name)]
    if not hooks or named_batch_norm(model):
        return {}
    calls = " and ".join("setup('fit')" if name == "setup" else f"{name}()" for name in hooks)
    return {f"what {' and '.join(hooks)} may make": f"there is no BatchNorm layer yet: call {calls} first"}


def diagnosis(
    model: nn.Module, trainer: Trainer | None, batches: Sequence[Any] = (), forward: Forward | None = None, **known: Any
) -> Diagnosis:
    """As :func:`diagnose`, with what could not be looked at.

    Args:
        model: As for ``diagnose``.
        trainer: As for ``diagnose``.
        batches: As many as there are.
        forward: As for ``diagnose``.
        known: Attributes of the examination of which the Trainer says something else, or nothing.
    """
    if trainer is None:
        return Diagnosis(findings(RULES, examine(model, batches, forward)))
    module: Any = model
    notes: tuple[str, ...] = ()
    if forward is None and batches:
        try:
            forward = training_forward(trainer, module)
        except MisconfigurationException:
            # Under manual optimization the step trains; the network alone says most of it, but not what it reaches.
            known, notes = {"complete": False, **known}, (_MANUAL,)
    fit = examine_fit(trainer, module, batches, forward, known)
    found = findings(RULES, fit.examination) + findings(FIT_RULES, fit)
    return Diagnosis(sorted(found, key=lambda finding: finding.severity == "advice"), fit.missing, notes)
