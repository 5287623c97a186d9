"""All rules about a model, and the function that applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from lightning_bn.functional.doctor import (
    around_layers,
    batch_size,
    dropout,
    frozen_by_halves,
    reach,
    statistics_in_eval,
)
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.forwards import Forward, examine

Needs: TypeAlias = Literal["model", "batch", "trainer"]


@dataclass(frozen=True)
class Rule:
    """One kind of mistake.

    Attributes:
        name: As in :attr:`Finding.rule`.
        finds: What it finds, for the table of rules.
        severity: What a finding is: ``"fault"``, ``"advice"``, or either by how much was measured.
        needs: What it looks at.
        look: Finds it in an examination.
    """

    name: str
    finds: str
    severity: Literal["fault", "advice", "fault or advice"]
    needs: Needs
    look: Callable[[Any], Iterable[Finding]]


RULES: tuple[Rule, ...] = (
    Rule(
        "frozen-by-requires-grad",
        "weight and bias require no gradient, and the running statistics still move",
        "fault or advice",
        "model",
        frozen_by_halves.frozen_by_requires_grad,
    ),
    Rule(
        "tracking-switched-off",
        "`track_running_stats` was set to False after construction",
        "fault",
        "model",
        frozen_by_halves.tracking_switched_off,
    ),
    Rule("momentum-zero", "`momentum=0` as a way to freeze", "fault", "model", frozen_by_halves.momentum_zero),
    Rule(
        "frozen-2d-only",
        "all BatchNorm2d frozen, and a BatchNorm1d or 3d that feeds them trains on",
        "fault",
        "batch",
        frozen_by_halves.frozen_2d_only,
    ),
    Rule(
        "initial-statistics-frozen",
        "frozen with mean 0 and variance 1, before any batch was seen",
        "fault",
        "model",
        statistics_in_eval.initial_statistics_frozen,
    ),
    Rule(
        "batch-statistics-in-eval",
        "no running statistics: evaluation normalizes with the batch",
        "fault",
        "model",
        statistics_in_eval.batch_statistics_in_eval,
    ),
    Rule(
        "statistics-not-finite",
        "inf or NaN in the running statistics",
        "fault",
        "model",
        statistics_in_eval.statistics_not_finite,
    ),
    Rule(
        "few-values",
        f"fewer than {batch_size.FEWEST_VALUES} values per channel, or one sample, normalize together in training",
        "fault or advice",
        "batch",
        batch_size.few_values,
    ),
    Rule(
        "batch-norm-after-dropout",
        "dropout before a layer gives its input another variance in training than in evaluation",
        "fault or advice",
        "batch",
        dropout.batch_norm_after_dropout,
    ),
    Rule(
        "dropout-in-frozen-container",
        "a container applies dropout by its own flag, though all that lies in it is in eval mode",
        "fault",
        "batch",
        dropout.dropout_in_frozen_container,
    ),
    Rule(
        "never-reached",
        "a layer that the training forward does not reach",
        "fault or advice",
        "batch",
        reach.never_reached,
    ),
    Rule("reached-twice", "a layer that one forward updates several times", "advice", "batch", reach.reached_twice),
    Rule(
        "unlike-inputs",
        "a layer shared by inputs that lie far apart, as of alternating tasks",
        "fault or advice",
        "batch",
        reach.unlike_inputs,
    ),
    Rule(
        "bias-before-batch-norm",
        "the bias of a convolution or linear layer that the next layer takes out",
        "advice",
        "batch",
        around_layers.bias_before_batch_norm,
    ),
    Rule(
        "not-torchs",
        "modules with running statistics that are not torch's BatchNorm",
        "advice",
        "model",
        around_layers.not_torchs,
    ),
)


def diagnose(
    model: nn.Module, batch: Any = None, *, forward: Forward | None = None, more_batches: Sequence[Any] = ()
) -> list[Finding]:
    """Return what is wrong with the BatchNorm layers of ``model``, faults first; nothing changes.

    With a batch, a few forwards are run on copies of all weights and buffers, without gradients: the model and the
    random number generators are bit for bit what they were. Modules are in the modes that they are in; where the whole
    model is in eval mode, in train mode but for layers that this package froze. With SyncBatchNorm in several
    processes, every process has to call this.

    Args:
        model: Any module.
        batch: What training gives it; None for the rules that need none.
        forward: Runs the model on one batch as training does: ``forward(model, batch)``; as for
            :func:`~lightning_bn.functional.recalibrate`.
        more_batches: Further ones, for layers that only some batches reach and sources that alternate.

    Raises:
        TypeError: If the batch cannot be fed without ``forward``.
        ValueError: If a module is lazy and has seen no batch yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> _ = model[1].requires_grad_(False)
        >>> [found.rule for found in diagnose(model)]
        ['frozen-by-requires-grad']
    """
    batches = [*more_batches] if batch is None else [batch, *more_batches]
    return findings(RULES, examine(model, batches, forward))


def findings(rules: Iterable[Rule], examination: Examination | Any) -> list[Finding]:
    """Return what rules find, faults before advice."""
    found = [finding for rule in rules for finding in rule.look(examination)]
    return sorted(found, key=lambda finding: finding.severity == "advice")
