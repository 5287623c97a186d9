"""Frozen by task: while a batch, or a part of a step, of one task is trained, and only what it contributes."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_bn
from lightning_bn import BatchNormFreezer, PreciseBatchNorm
from lightning_bn.functional import SelectionError, is_frozen
from tests.averages import EMAWeightAveraging
from tests.callbacks.freezing_fits import Hooked, Watch, adamw, layers, modes, rows, sgd, state, trainer_of, values
from tests.models import fill_statistics, seeded

BY_TASK = {"det": ["seg_head"], "seg": ["det_head", "body.1"]}
FROZEN = {"det": {"net.seg_head.1"}, "seg": {"net.det_head.1", "net.body.1"}}
ALL = {"net.body.1", "net.body.4", "net.det_head.1", "net.seg_head.1"}


def head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


class TwoHeads(nn.Module):
    """A shared body with two BatchNorm layers and a head with one for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()
        )
        self.det_head = head()
        self.seg_head = head()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.det_head(features), self.seg_head(features)


class MultiTask(pl.LightningModule):
    """Every batch runs through both heads and has a loss at both."""

    def __init__(self, optimizer: Any = sgd) -> None:
        super().__init__()
        self.net = fill_statistics(seeded(TwoHeads))
        self._optimizer = optimizer

    def loss(self, batch: dict[str, Any]) -> Tensor:
        det, seg = self.net(batch["x"])
        return F.cross_entropy(det, batch["y"]) + 0.5 * F.cross_entropy(seg, 1 - batch["y"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.parameters())


def batch_of(task: Any, seed: int) -> dict[str, Any]:
    x, y = rows(8, seed)
    return {"x": x, "y": y, "task": task}


def batches_of(tasks: Iterable[Any]) -> list[dict[str, Any]]:
    return [batch_of(task, seed) for seed, task in enumerate(tasks)]


def loader_of(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def fit(module: pl.LightningModule, tasks: Iterable[Any], *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    batches = batches_of(tasks)
    trainer = trainer_of(*callbacks, **{"max_epochs": 1, **options})
    trainer.fit(module, loader_of(batches), loader_of(batches[:1]))
    return trainer


unseen = pytest.mark.filterwarnings("ignore:BatchNormFreezer. by_task names")


def freezer(**arguments: Any) -> BatchNormFreezer:
    return BatchNormFreezer(**{"root": "net", "by_task": BY_TASK, "task_key": "task", **arguments})


def by_hand(
    module: MultiTask,
    parts_of_steps: Iterable[list[tuple[str | None, dict[str, Any]]]],
    accumulate: int = 1,
    optimizer: Any = sgd,
    frozen: dict[str, set[str]] | None = None,
) -> None:
    """An oracle in plain torch: what each part of a step contributes to the gradients is computed by itself."""
    frozen = FROZEN if frozen is None else frozen
    stepping = optimizer(module.parameters())
    norms = layers(module)
    affine = {id(p): name for name, layer in norms.items() for p in layer.parameters()}
    parameters = list(module.parameters())
    module.train()
    for index, parts in enumerate(parts_of_steps):
        for task, batch in parts:
            held = frozen.get(task or "", set())
            for name, layer in norms.items():
                layer.train(name not in held)
            gradients = torch.autograd.grad(module.loss(batch) / accumulate, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if affine.get(id(parameter)) not in held:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if (index + 1) % accumulate == 0:
            stepping.step()
            stepping.zero_grad()


# statistics


@pytest.mark.parametrize("interval", [1.0, 1], ids=["validation at the end", "validation after every batch"])
def test_layers_of_a_task_are_frozen_in_its_batches_and_train_in_others(interval: float) -> None:
    module, watch, frozen = MultiTask(), Watch(), freezer()
    tasks = ["det", "seg", "det", "depth", "seg", "seg"]
    fit(module, tasks, watch, frozen, val_check_interval=interval)
    for noted in (watch.stats, watch.affine):
        held = [{name for name, moves in moved.items() if not moves} for moved in noted]
        assert held == [FROZEN.get(task, set()) for task in tasks]
    assert frozen.report is not None
    assert frozen.report.identical
    assert modes(module) == modes(MultiTask())


def test_layers_in_modules_are_frozen_in_the_batches_of_every_task() -> None:
    module, watch, frozen = MultiTask(), Watch(), freezer(modules=["body"])
    fit(module, ["det", "seg", "depth"], watch, frozen)
    body = {"net.body.1", "net.body.4"}
    held = [{name for name, moves in moved.items() if not moves} for moved in watch.stats]
    assert held == [body | {"net.seg_head.1"}, body | {"net.det_head.1"}, body]
    assert frozen.report is not None
    assert {*frozen.report.layers, *frozen.report.task_layers} == ALL
    assert set(frozen.report.layers) == body
    assert values(module, body) == values(MultiTask(), body)


def test_the_schedule_holds_for_the_tasks_too() -> None:
    module, watch = MultiTask(), Watch()
    fit(module, ["det", "seg", "det", "seg"], watch, freezer(start_step=1, stop_step=3))
    held = [{name for name, moves in moved.items() if not moves} for moved in watch.stats]
    assert held == [set(), FROZEN["seg"], FROZEN["det"], set()]


def test_train_called_in_the_step_does_not_thaw_the_layers_of_its_task() -> None:
    class Adversary(MultiTask):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            self.train()
            return super().training_step(batch, batch_idx)

    watch, frozen = Watch(), freezer()
    fit(Adversary(), ["det", "seg"], watch, frozen)
    assert [{n for n, moves in moved.items() if not moves} for moved in watch.stats] == [FROZEN["det"], FROZEN["seg"]]
    assert frozen.report is not None
    assert frozen.report.identical


@pytest.mark.parametrize("in_context", [False, True])
def test_a_flag_set_directly_in_a_batch_of_the_task_is_healed_and_reported(in_context: bool) -> None:
    class Adversary(MultiTask):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            with lightning_bn.task(batch["task"]) if in_context else nullcontext():
                self.net.seg_head[1].training = True
                return super().training_step(batch, batch_idx)

    module, frozen = Adversary(), freezer(task_key=None if in_context else "task", by_task={"det": ["seg_head"]})
    with (
        pytest.warns(UserWarning, match=r"changed and was restored.*net\.seg_head\.1"),
        pytest.warns(UserWarning, match="changed by other code and restored"),
    ):
        fit(module, ["det", "det"], frozen)
    assert values(module, FROZEN["det"]) == values(MultiTask(), FROZEN["det"])


# affine: only what the task's own batch contributes


@unseen
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("tasks", ["det seg", "seg det", "det det", "seg depth", "det seg seg depth depth det"])
def test_accumulated_gradients_lack_only_what_the_batches_of_the_task_contributed(tasks: str, optimizer: Any) -> None:
    sequence = tasks.split() * 2
    module, expected = MultiTask(optimizer), MultiTask()
    fit(module, sequence, freezer(), accumulate_grad_batches=2)
    steps = [[(batch["task"], batch)] for batch in batches_of(sequence)]
    by_hand(expected, steps, accumulate=2, optimizer=optimizer)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_joint_step_lacks_only_what_each_part_contributed(accumulate: int) -> None:
    class Joint(MultiTask):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            other = batch_of(None, seed=100 + batch_idx)
            with lightning_bn.task("det"):
                loss = self.loss(batch)
            with lightning_bn.task("seg"):
                loss = loss + self.loss(other)
            return loss

    module, expected, count = Joint(), MultiTask(), 6
    frozen = freezer(task_key=None)
    fit(module, [None] * count, frozen, accumulate_grad_batches=accumulate)
    batches = batches_of([None] * count)
    steps = [[("det", batch), ("seg", batch_of(None, seed=100 + index))] for index, batch in enumerate(batches)]
    by_hand(expected, steps, accumulate=accumulate)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-7)
    assert frozen.report is not None
    assert frozen.report.identical


def test_a_context_counts_before_the_task_of_the_batch_and_the_innermost_before_all() -> None:
    class Nested(MultiTask):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            first = self.loss(batch)
            with lightning_bn.task("seg"):
                second = self.loss(batch)
                with lightning_bn.task("depth"):
                    third = self.loss(batch)
                fourth = self.loss(batch)
            return first + second + third + fourth + self.loss(batch)

    module, expected = Nested(), MultiTask()
    fit(module, ["det", "det"], freezer())
    order = ["det", "seg", "depth", "seg", "det"]
    by_hand(expected, [[(task, batch) for task in order] for batch in batches_of(["det", "det"])])
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-7)


@unseen
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "checkpointed with reentrant backward"])
def test_activations_recomputed_in_the_backward_contribute_no_more(reentrant: bool) -> None:
    class Checkpointed(MultiTask):
        def loss(self, batch: dict[str, Any]) -> Tensor:
            # Statistics are left out: recomputing updates them a second time, with a freezer or without.
            x = batch["x"].requires_grad_()
            det, seg = checkpoint(self.net, x, use_reentrant=reentrant)
            return F.cross_entropy(det, batch["y"]) + 0.5 * F.cross_entropy(seg, 1 - batch["y"])

    module, before = Checkpointed(adamw), MultiTask()
    fit(module, ["det", "det"], freezer())
    assert values(module, FROZEN["det"]) == values(before, FROZEN["det"])
    assert values(module, ALL - FROZEN["det"]) != values(before, ALL - FROZEN["det"])


class ManualMultiTask(MultiTask):
    """Two steps of two optimizers for every batch."""

    def __init__(self, optimizer: Any = sgd) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        heads = [*self.net.det_head.parameters(), *self.net.seg_head.parameters()]
        return [self._optimizer(self.net.body.parameters()), self._optimizer(heads)]


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_manual_optimization_with_several_steps_for_one_batch(optimizer: Any) -> None:
    module, watch, frozen = ManualMultiTask(optimizer), Watch(), freezer()
    tasks = ["det", "seg", "depth", "det"]
    fit(module, tasks, watch, frozen)
    for noted in (watch.stats, watch.affine):
        held = [{name for name, moves in moved.items() if not moves} for moved in noted]
        assert held == [FROZEN.get(task, set()) for task in tasks]
    assert frozen.report is not None
    assert frozen.report.identical


def test_an_optimizer_that_runs_the_step_several_times_contributes_nothing_in_any_of_them() -> None:
    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)

    module, frozen = MultiTask(lbfgs), freezer(by_task={"det": ["seg_head"]})
    fit(module, ["det"], frozen)
    assert values(module, FROZEN["det"]) == values(MultiTask(), FROZEN["det"])
    assert values(module, ALL - FROZEN["det"]) != values(MultiTask(), ALL - FROZEN["det"])


@unseen
def test_a_zero_gradient_of_a_task_does_not_move_its_layers_by_momentum_or_decay() -> None:
    module, watch = MultiTask(adamw), Watch()
    fit(module, ["depth", "depth", "det", "det"], watch, freezer())
    assert [moved["net.seg_head.1"] for moved in watch.affine] == [True, True, False, False]


def test_stats_alone_by_task_leaves_affine_training_and_the_other_way_round() -> None:
    for stats in (True, False):
        watch = Watch()
        fit(MultiTask(), ["det", "seg"], watch, freezer(stats=stats, affine=not stats))
        held = [{name for name, moves in moved.items() if not moves} for moved in watch.stats]
        assert held == ([FROZEN["det"], FROZEN["seg"]] if stats else [set(), set()])
        held = [{name for name, moves in moved.items() if not moves} for moved in watch.affine]
        assert held == ([set(), set()] if stats else [FROZEN["det"], FROZEN["seg"]])


def test_the_parameters_are_parameters_again_after_every_kind_of_end() -> None:
    class Failing(MultiTask):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            loss = self.loss(batch)
            if batch_idx == 1:
                raise RuntimeError("as planned")
            return loss

    class Ending(MultiTask):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

    def whole(module: pl.LightningModule, before: dict[str, int]) -> bool:
        return {name: id(p) for name, p in module.named_parameters()} == before and all(
            isinstance(p, nn.Parameter) and p.is_leaf
            for layer in layers(module).values()
            for p in layer._parameters.values()
        )

    for kind in (MultiTask, Failing, Ending):
        module, seen = kind(), []
        before = {name: id(p) for name, p in module.named_parameters()}

        def note(trainer: Any, pl_module: Any, *_: Any, before: Any = before, seen: Any = seen) -> None:
            seen.append(whole(pl_module, before))

        hooked = Hooked(on_validation_start=note, on_before_optimizer_step=note, on_train_epoch_end=note)
        with pytest.raises(RuntimeError, match="as planned") if kind is Failing else nullcontext():
            fit(module, ["det", "seg", "det"], freezer(), hooked)
        assert whole(module, before), kind
        assert all(seen), kind
        assert not any(is_frozen(layer) for layer in layers(module).values())


# where the task is found


def test_the_task_may_come_from_a_function_of_batch_and_index() -> None:
    watch = Watch()
    key = "tests.callbacks.freezing_fits.task_by_index"
    fit(MultiTask(), [None] * 4, watch, freezer(task_key=key))
    held = [{name for name, moves in moved.items() if not moves} for moved in watch.stats]
    assert held == [FROZEN["det"], FROZEN["seg"]] * 2


def test_the_task_may_be_the_list_that_a_default_collate_makes() -> None:
    samples = [{"x": x, "y": y, "task": task} for task in ("det", "seg") for x, y in zip(*rows(8), strict=True)]
    module, watch = MultiTask(), Watch()
    loader = DataLoader(samples, batch_size=8)  # type: ignore[arg-type]
    trainer_of(watch, freezer(), max_epochs=1).fit(module, loader, loader)
    held = [{name for name, moves in moved.items() if not moves} for moved in watch.stats]
    assert held == [FROZEN["det"], FROZEN["seg"]]


def test_a_batch_of_two_tasks_is_an_error_that_names_them() -> None:
    with pytest.raises(MisconfigurationException, match=r"\['det', 'seg'\].*lightning_bn\.task"):
        fit(MultiTask(), [["det", "seg"]], freezer())


def test_a_batch_without_the_key_is_an_error_that_shows_its_keys() -> None:
    with pytest.raises(MisconfigurationException, match=r"task_key='domain'.*\['task', 'x', 'y'\]"):
        fit(MultiTask(), ["det"], freezer(task_key="domain"))


def test_a_task_that_no_batch_was_of_is_said_after_the_first_epoch() -> None:
    with pytest.warns(UserWarning, match=r"by_task names 'seg', but no batch in epoch 0.*seen: 'depth', 'det'"):
        fit(MultiTask(), ["det", "depth"], freezer())


def test_without_task_key_and_context_no_task_is_seen_and_that_is_said() -> None:
    module = MultiTask()
    with pytest.warns(UserWarning, match=r"by_task names 'det', 'seg'.*seen: none"):
        fit(module, ["det", "seg"], freezer(task_key=None))


def test_tasks_are_not_missed_where_the_freeze_never_began() -> None:
    # Nothing can be said of tasks: warnings are errors here.
    fit(MultiTask(), ["det", "seg"], freezer(start_epoch=5))


def test_task_key_without_by_task_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"task_key='task'.*without by_task"):
        BatchNormFreezer("body", root="net", task_key="task")


@pytest.mark.parametrize("by_task", [{"det": ["seg_hed"]}, {"det": []}])
def test_a_path_of_a_task_that_means_nothing_is_an_error_before_training(by_task: dict[str, list[str]]) -> None:
    with pytest.raises(SelectionError):
        fit(MultiTask(), ["det"], freezer(by_task=by_task))


def test_a_single_path_for_a_task_may_be_a_string_as_for_modules() -> None:
    watch, frozen = Watch(), freezer(by_task={"det": "seg_head"})
    fit(MultiTask(), ["det", "depth"], watch, frozen)
    assert [moved["net.seg_head.1"] for moved in watch.stats] == [False, True]


def test_a_list_as_multi_task_configs_write_it_is_taken_as_it_stands() -> None:
    not_train_in_multi_task = ["body", "seg_head"]
    module, frozen = MultiTask(), BatchNormFreezer(not_train_in_multi_task, root="net")
    fit(module, ["det", "seg"], frozen)
    held = {"net.body.1", "net.body.4", "net.seg_head.1"}
    assert values(module, held) == values(MultiTask(), held)
    assert values(module, ALL - held) != values(MultiTask(), ALL - held)


# beside others


def test_a_task_context_outside_of_a_fit_changes_nothing() -> None:
    module = MultiTask()
    before = state(module)
    with lightning_bn.task("det"):
        assert modes(module) == modes(MultiTask())
    assert state(module) == before


@pytest.mark.parametrize("nothing", [Watch, lambda: BatchNormFreezer("body", root="net")])
def test_a_task_context_without_a_by_task_freezer_changes_nothing(nothing: Callable[[], pl.Callback]) -> None:
    class InContext(MultiTask):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            with lightning_bn.task("det"):
                return super().training_step(batch, batch_idx)

    module, expected = InContext(), MultiTask()
    fit(module, ["det"] * 3, nothing())
    fit(expected, ["det"] * 3, nothing())
    assert state(module) == state(expected)


def test_a_task_context_in_validation_changes_nothing() -> None:
    class InContext(MultiTask):
        def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            before = modes(self)
            with lightning_bn.task("det"):
                assert modes(self) == before
                assert all(isinstance(layer.weight, nn.Parameter) for layer in layers(self).values())

    module, expected = InContext(), MultiTask()
    fit(module, ["det", "seg"], freezer())
    fit(expected, ["det", "seg"], freezer())
    assert state(module) == state(expected)


def test_layers_of_a_task_are_left_out_of_a_recalibration_from_batches_of_all_tasks() -> None:
    module, precise = MultiTask(), PreciseBatchNorm(num_batches=2)
    fit(module, ["det", "seg"], precise, freezer())
    assert precise.last is not None
    assert precise.last.layers == ("net.body.4",)


def test_averaged_weights_beside_it_do_not_disturb_the_tasks() -> None:
    watch, frozen = Watch(), freezer(modules=["body.4"])
    fit(MultiTask(adamw), ["det", "seg"] * 3, watch, frozen, EMAWeightAveraging(decay=0.9), val_check_interval=1)
    held = [{name for name, moves in moved.items() if not moves} for moved in watch.stats]
    assert held == [FROZEN[task] | {"net.body.4"} for task in ["det", "seg"] * 3]
    assert frozen.report is not None
    assert frozen.report.identical


def test_after_allow_updates_the_layers_of_the_running_task_are_frozen_again() -> None:
    frozen = freezer()

    class Updating(MultiTask):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            with frozen.allow_updates():
                pass
            return super().training_step(batch, batch_idx)

    watch = Watch()
    fit(Updating(), ["det", "seg"], watch, frozen)
    for noted in (watch.stats, watch.affine):
        held = [{name for name, moves in moved.items() if not moves} for moved in noted]
        assert held == [FROZEN["det"], FROZEN["seg"]]


def test_two_freezers_may_freeze_by_task_at_once() -> None:
    watch = Watch()
    one = freezer(by_task={"det": ["seg_head"]}, name="one")
    other = freezer(by_task={"det": ["seg_head", "body.4"], "seg": ["det_head"]}, name="other")
    module = MultiTask(adamw)
    fit(module, ["det", "seg", "det"], watch, one, other)
    for noted in (watch.stats, watch.affine):
        held = [{name for name, moves in moved.items() if not moves} for moved in noted]
        assert held == [{"net.seg_head.1", "net.body.4"}, {"net.det_head.1"}, {"net.seg_head.1", "net.body.4"}]
    assert all(isinstance(p, nn.Parameter) for layer in layers(module).values() for p in layer._parameters.values())
