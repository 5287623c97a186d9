"""What a freezer holds during one fit: which layers, since when, and whether anything in them moved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import counted
from lightning_bn.functional.freezing.eval_mode import hold_in_eval, let_go
from lightning_bn.functional.freezing.freeze import declare_frozen, declare_unfrozen, warn_of_initial_statistics
from lightning_bn.functional.freezing.gradients import WithheldGradients, drop_gradients, drop_zero_gradients
from lightning_bn.functional.freezing.shadow_statistics import LentStatistics
from lightning_bn.functional.freezing.verification import KeptValues, Moved
from lightning_bn.functional.layers.properties import affine_parameters
from lightning_bn.functional.layers.selection import batch_norm_layers


@dataclass(frozen=True)
class Trip:
    """Something that was found changed in a frozen layer and was put back.

    Attributes:
        moved: Which value, by how much, and why, as far as that can be told.
        step: Optimizer steps taken when it was found.
    """

    moved: Moved
    step: int

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.moved}"


@dataclass(frozen=True)
class FreezeReport:
    """What became of the frozen values.

    Attributes:
        layers: Names of the layers frozen during every batch.
        steps: Optimizer steps over which they were frozen, those before a resume included.
        moved: What was found changed and was put back, the first time for each value; empty where all stayed
            bit-identical without help.
        task_layers: Names of those frozen during the batches of some tasks only; in those they did not move either.
        was_on: Whether the freeze was ever on.
        task_batches: Batches, or parts of steps, during which layers were frozen for their task.
    """

    layers: tuple[str, ...]
    steps: int
    moved: tuple[Trip, ...]
    task_layers: tuple[str, ...] = ()
    was_on: bool = True
    task_batches: int = 0

    @property
    def identical(self) -> bool:
        """Whether every value stayed bit-identical, without help, for as long as it was frozen."""
        return not self.moved

    def __str__(self) -> str:
        if not self.was_on:
            return "the freeze was never on"
        steps = counted(self.steps, "step")
        said = [f"{counted(len(self.layers), 'frozen layer')} bit-identical over {steps}"] if self.layers else []
        if self.task_layers:
            layers = counted(len(self.task_layers), "layer")
            batches = counted(self.task_batches, "batch of their tasks", "batches of their tasks")
            said.append(
                f"{layers} bit-identical in {batches}"
                if self.task_batches
                else f"{layers} never frozen, since no batch was of a task in by_task"
            )
        if self.identical:
            return "; ".join(said)
        frozen = counted(len(self.layers) + len(self.task_layers), "frozen layer")
        return f"{frozen} over {steps}; moved by others and put back: {in_words(self.moved)}"

    def state_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only."""
        moved = [{"step": trip.step, **vars(trip.moved)} for trip in self.moved]
        return {
            "layers": list(self.layers),
            "task_layers": list(self.task_layers),
            "was_on": self.was_on,
            "task_batches": self.task_batches,
            "steps": self.steps,
            "moved": moved,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FreezeReport:
        """The report that :meth:`state_dict` described."""
        moved = []
        for entry in state["moved"]:
            values = dict(entry)
            step = values.pop("step")
            moved.append(Trip(Moved(**values), step))
        return cls(
            tuple(state["layers"]),
            state["steps"],
            tuple(moved),
            tuple(state["task_layers"]),
            state["was_on"],
            state["task_batches"],
        )


def in_words(trips: Sequence[Trip], most: int = 3) -> str:
    """What moved, layer by layer, the first few of them."""
    by_layer: dict[str, list[Trip]] = {}
    for trip in trips:
        by_layer.setdefault(trip.moved.layer, []).append(trip)
    said = [
        f"step {found[0].step:,}: {layer} ({', '.join(trip.moved.without_layer() for trip in found)})"
        for layer, found in list(by_layer.items())[:most]
    ]
    more = len(by_layer) - most
    return "; ".join(said) + (f"; {counted(more, 'more layer')}" if more > 0 else "")


class Freeze:
    """The layers that one freezer holds, switched on and off as a whole and by task.

    Args:
        model: Where the layers are.
        always: Names of those frozen during every batch.
        by_task: Names of those frozen beside them during the batches of a task.
        stats: Whether running statistics are frozen.
        affine: Whether ``weight`` and ``bias`` are.
        by: Who freezes.
        before: What is known from before a resume.
        affine_cause: What moves ``weight`` and ``bias`` if nothing else is known to.
    """

    def __init__(
        self,
        model: nn.Module,
        always: Sequence[str],
        by_task: Mapping[str, Sequence[str]],
        *,
        stats: bool,
        affine: bool,
        by: str,
        before: FreezeReport | None = None,
        affine_cause: str = "",
    ) -> None:
        layers = batch_norm_layers(model)
        self._model = model
        self._always = {name: layers[name] for name in always}
        self._by_task = {task: {name: layers[name] for name in names} for task, names in by_task.items()}
        self._task_layers = {name: layer for members in self._by_task.values() for name, layer in members.items()}
        self._stats, self._affine, self._by = stats, affine, by
        self._affine_cause = affine_cause
        self._on = self._was_on = False
        self._task_batches = 0
        self._task: str | None = None
        self._kept: KeptValues | None = None
        self._lent: LentStatistics | None = None
        self._own_parameters = _affine(self._always)
        self._task_parameters = _affine(self._task_layers)
        self._withheld: WithheldGradients | None = None
        self._copies: list[KeptValues] = []
        self._guarded: dict[str, Any] = {}
        self._trips: dict[tuple[str, str], Trip] = {}
        self._steps = 0
        self._since: int | None = None
        if before is not None:
            self._steps, self._was_on, self._task_batches = before.steps, before.was_on, before.task_batches
            self._trips = {(trip.moved.layer, trip.moved.value): trip for trip in before.moved}

    @property
    def on(self) -> bool:
        """Whether it is switched on."""
        return self._on

    def switch(self, on: bool, step: int, warn: bool = True) -> list[Trip]:
        """Switches all layers on or off together; what moved until then is compared a last time."""
        if on == self._on:
            return []
        trips = [] if on else self.check(step)
        self.check_copies()
        self._on = on
        self._was_on = self._was_on or on
        every = {**self._always, **self._task_layers}
        if on:
            if self._stats and warn:
                warn_of_initial_statistics(every)
            self._since = step
            # Layers of a task too: recalibrating them from batches of all tasks would undo what the freeze is for.
            declare_frozen(every, stats=self._stats, affine=self._affine, by=self._by)
            self._hold(self._always.values())
            self.drop_own_gradients()
        else:
            self._steps += step - (step if self._since is None else self._since)
            self._since = self._kept = None
            self._copies = []
            trips += self.switch_task(None, step)
            declare_unfrozen(every, stats=self._stats, affine=self._affine, by=self._by)
            for layer in self._always.values():
                let_go(layer, self._by, as_found=True)
            for handle in self._guarded.values():
                if handle is not None:
                    handle.remove()
            self._guarded = {}
        return trips

    def switch_task(self, task: str | None, step: int) -> list[Trip]:
        """Holds the layers of a task instead of those of the last one; None for no task."""
        if task == self._task:
            return []
        self.train_gradients()
        trips = [] if self._lent is None else self._new(self._lent.take_back(), step)
        self._lent = None
        for layer in self._by_task.get(self._task or "", {}).values():
            let_go(layer, self._by, as_found=True)
        self._task = task
        members = self._by_task.get(task or "", {}) if self._on else {}
        self._task_batches += bool(members)
        if members and self._stats:
            self._lent = LentStatistics(members)
        self._hold(members.values())
        self.withhold_gradients()
        return trips

    def withhold_gradients(self) -> None:
        """Has the running task's forwards contribute nothing to the gradients of its frozen parameters."""
        members = self._by_task.get(self._task or "", {})
        if members and self._affine and self._on and self._withheld is None:
            self._withheld = WithheldGradients(members.values())

    def train_gradients(self) -> None:
        """Gives the parameters back whose gradients a task's forward withheld."""
        if self._withheld is not None:
            self._withheld.release()
            self._withheld = None

    def keep(self, copies: Iterable[tuple[nn.Module, bool]]) -> None:
        """Takes the values of now as those that must not move, unless it did so already.

        Args:
            copies: Averages of the model, and whether each has been updated yet: one that has not will start as a copy
                of the model, so that the model's values are expected of it; another keeps its own.
        """
        if not self._on or self._kept is not None:
            return
        self._kept = KeptValues(self._always, stats=self._stats, affine=self._affine)
        self._copies = []
        for copy, updated in copies:
            layers = batch_norm_layers(copy)
            kept = KeptValues({name: layers[name] for name in self._always}, stats=self._stats, affine=self._affine)
            if not updated:
                kept.expect(self._kept)
            self._copies.append(kept)

    def glance(self, step: int) -> list[Trip]:
        """Cheap: modes put right where somebody set them; a comparison only if a value was touched."""
        if not self._on:
            return []
        if self._stats:
            for name, layer in self._always.items():
                if layer.training:
                    layer.training = False
                    self._guard(name, layer)
        return self.check(step) if self._kept is not None and self._kept.touched() else []

    def check(self, step: int) -> list[Trip]:
        """Compares all frozen values bit by bit and puts back what moved; what was not known before."""
        if self._kept is None:
            return []
        replaced = self._look_again()
        moved = replaced + self._kept.moved()
        if moved:
            self._kept.put_back()
        else:
            self._kept.rearm()
        return self._new(moved, step)

    def _look_again(self) -> list[Moved]:
        """Layers that were replaced by others of the same name are held from here on, with the kept values."""
        now = batch_norm_layers(self._model)
        replaced = [name for name, layer in self._always.items() if now.get(name, layer) is not layer]
        if not replaced or self._kept is None:
            return []
        for name in replaced:
            self._always[name] = now[name]
        new = {name: now[name] for name in replaced}
        declare_frozen(new, stats=self._stats, affine=self._affine, by=self._by)
        self._hold(new.values())
        self._own_parameters = _affine(self._always)
        self._kept = self._kept.of_others(self._always)
        return [Moved(name, "layer", float("nan"), "replaced by another one") for name in replaced]

    def _new(self, moved: Iterable[Moved], step: int) -> list[Trip]:
        """Of what moved, that which is told for the first time."""
        trips = [Trip(self._explained(one), step) for one in moved]
        new = [trip for trip in trips if (trip.moved.layer, trip.moved.value) not in self._trips]
        self._trips.update({(trip.moved.layer, trip.moved.value): trip for trip in new})
        return new

    def check_copies(self) -> None:
        """Puts averages back to what is expected of them: an average of equal values drifts by its own rounding."""
        for kept in self._copies:
            if kept.moved():
                kept.put_back()

    def drop_own_gradients(self) -> None:
        """After a backward: affine parameters frozen during every batch have no gradient."""
        if self._on and self._affine:
            drop_gradients(self._own_parameters)

    def drop_gradients(self) -> None:
        """Before an optimizer step: no frozen affine parameter has a gradient, those of a task none that is theirs."""
        self.drop_own_gradients()
        if self._on and self._affine:
            drop_zero_gradients(self._task_parameters)

    @contextmanager
    def released(self, step: int) -> Iterator[None]:
        """Inside, the layers are not frozen; afterwards they are, with the values they have then."""
        was_on, task = self._on, self._task
        self.switch(False, step)
        try:
            yield
        finally:
            self.switch(was_on, step)
            self.switch_task(task, step)

    def report(self, step: int) -> FreezeReport:
        """What became of the frozen values so far."""
        steps = self._steps + (0 if self._since is None else step - self._since)
        trips = tuple(self._trips.values())
        return FreezeReport(
            tuple(self._always), steps, trips, tuple(self._task_layers), self._was_on, self._task_batches
        )

    def forget_values(self) -> None:
        """Gives up what was kept: averages stand in the place of the weights, and nothing can be said of either."""
        self._kept, self._copies = None, []

    def _explained(self, moved: Moved) -> Moved:
        if moved.cause:
            return moved
        if moved.value in ("weight", "bias"):
            return replace(moved, cause=self._affine_cause)
        return replace(moved, cause="its training flag was set directly") if moved.layer in self._guarded else moved

    def _hold(self, layers: Iterable[_BatchNorm]) -> None:
        if self._stats:
            for layer in layers:
                hold_in_eval(layer, self._by)

    def _guard(self, name: str, layer: _BatchNorm) -> None:
        """The second time somebody sets a layer's mode behind its back, it is also put right before every forward."""
        if name not in self._guarded:
            self._guarded[name] = None
        elif self._guarded[name] is None:
            self._guarded[name] = layer.register_forward_pre_hook(_put_into_eval)


def _affine(layers: Mapping[str, _BatchNorm]) -> list[nn.Parameter]:
    return [parameter for layer in layers.values() for parameter in affine_parameters(layer)]


def _put_into_eval(layer: nn.Module, _: Any) -> None:
    layer.training = False
