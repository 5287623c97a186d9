"""What became of frozen values: how long they were frozen, and what was found changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.freezing.change import Change


@dataclass(frozen=True)
class Violation:
    """Something that was found changed in a frozen layer and was restored.

    Attributes:
        change: Which value, by how much, and why, as far as that can be told.
        step: Optimizer steps taken when it was found; None where nobody counts them.
    """

    change: Change
    step: int | None

    def when(self) -> str:
        """The step as a sentence begins with it; nothing where there is none."""
        return "" if self.step is None else f"step {self.step:,}: "

    def __str__(self) -> str:
        return f"{self.when()}{self.change}"


@dataclass(frozen=True)
class FreezeReport:
    """What became of the frozen values.

    Attributes:
        layers: Names of the layers frozen during every batch.
        steps: Optimizer steps over which they were frozen, those before a resume included.
        violations: What was found changed and was restored, the first time for each value; empty where all stayed
            bit-identical without help.
        task_layers: Names of those frozen during the batches of some tasks only; in those they did not change either.
        was_on: Whether the freeze was ever on.
        task_batches: Batches, or parts of steps, during which layers were frozen for their task.
        digests: By layer, of the bits that its frozen values have; compared on resume.
        others: Layers below the same paths that have running statistics and are not torch's BatchNorm: not frozen.
    """

    layers: tuple[str, ...] = ()
    steps: int = 0
    violations: tuple[Violation, ...] = ()
    task_layers: tuple[str, ...] = ()
    was_on: bool = True
    task_batches: int = 0
    digests: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether every value stayed bit-identical, without help, for as long as it was frozen."""
        return not self.violations

    def __str__(self) -> str:
        if not self.was_on:
            return "the freeze was never on"
        steps = counted(self.steps, "step")
        if self.violations:
            frozen = counted(len(self.layers) + len(self.task_layers), "frozen layer")
            return (
                f"{frozen} over {steps}; changed by other code and restored: "
                f"{in_words(self.violations)}{self._others()}"
            )
        said = [f"{counted(len(self.layers), 'frozen layer')} bit-identical over {steps}"] if self.layers else []
        if self.task_layers:
            layers = counted(len(self.task_layers), "layer")
            batches = counted(self.task_batches, "batch of their tasks", "batches of their tasks")
            never = f"{layers} never frozen, since no batch was of a task in by_task"
            said.append(f"{layers} bit-identical in {batches}" if self.task_batches else never)
        return "; ".join(said) + self._others()

    def _others(self) -> str:
        return f"; not frozen, since they are not torch's BatchNorm: {quoted(self.others)}" if self.others else ""

    def state_dict(self) -> dict[str, Any]:
        """Return it as strings, numbers, lists and dicts only."""
        return {
            **vars(self),
            "format": 1,
            "layers": list(self.layers),
            "task_layers": list(self.task_layers),
            "digests": dict(self.digests),
            "others": list(self.others),
            "violations": [{"step": one.step, **vars(one.change)} for one in self.violations],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FreezeReport:
        """Return the report that :meth:`state_dict` described; what is missing is as in a report of nothing."""
        violations = tuple(
            Violation(Change(**_known(Change, one)), one.get("step", 0)) for one in state.get("violations", ())
        )
        return cls(**{**_known(cls, state), "violations": violations})


def _known(kind: type[Change | FreezeReport], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a state says of the fields of ``kind``, lists as tuples."""
    known = {field.name: state[field.name] for field in fields(kind) if field.name in state}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def in_words(violations: Sequence[Violation], most: int = 3) -> str:
    """Return what changed, layer by layer, the first few of them."""
    by_layer: dict[str, list[Violation]] = {}
    for violation in violations:
        by_layer.setdefault(violation.change.layer, []).append(violation)
    said = [
        f"{found[0].when()}{layer or '(the model itself)'} ({', '.join(one.change.without_layer() for one in found)})"
        for layer, found in list(by_layer.items())[:most]
    ]
    more = len(by_layer) - most
    return "; ".join(said) + (f"; {counted(more, 'more layer')}" if more > 0 else "")
