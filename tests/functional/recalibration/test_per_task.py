"""One pass gives each task what a recalibration of a network of its own, on its own batches alone, would give it."""

import copy
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_bn
from lightning_bn.functional import freeze_batch_norm, recalibrate
from lightning_bn.functional.recalibration.run import PATIENCE
from lightning_bn.functional.statistics.snapshots import Snapshot
from lightning_bn.functional.tasks import TaskStatistics, task_statistics
from tests.functional.recalibration.per_task_ranks import Beside
from tests.models import Broken, SharedNorm, SmallResNet, bits, fill_statistics, images, seeded
from tests.oracle import generators

TASKS = ["a", "b", "c"]
Batch = tuple[Tensor, str]
KINDS = ["cumulative", "shared"]


def network(build: Callable[[], nn.Module] = SmallResNet) -> nn.Module:
    return fill_statistics(seeded(build)).double().train()


def batch(task: str, seed: int, size: int = 6) -> Batch:
    """Of each task with a mean and a scale of its own."""
    place = TASKS.index(task)
    return images(size, seed=seed, dtype=torch.float64) * (1 + place) + 3 * place, task


def batches_of(order: str) -> list[Batch]:
    return [batch(task, seed, 3 + seed % 5) for seed, task in enumerate(order)]


def only(batches: list[Batch], task: str) -> list[Tensor]:
    return [x for x, own in batches if own == task]


def task_of(one: Batch) -> str:
    return one[1]


def labelled(model: nn.Module, one: Batch) -> Any:
    """By contexts, where nothing else tells."""
    with lightning_bn.task(one[1]):
        return model(one[0])


def alternating(task: str) -> dict[str, Any]:
    """The two ways to tell the tasks of batches of one task each."""
    return {"task_of": task_of} if task == "task_of" else {"forward": labelled}


def alone(model: nn.Module, batches: list[Any], **kwargs: Any) -> Any:
    """A separate recalibration of a separate network: its statistics by name, and what it says of itself."""
    separate = copy.deepcopy(model)
    done = recalibrate(separate, batches, **kwargs)
    return done


def same(of_task: Any, expected: Any) -> None:
    """What is said of a task is what is said of a network of its own."""
    assert of_task.layers == expected.layers
    assert (bits(of_task.after.mean), bits(of_task.after.var)) == (bits(expected.after.mean), bits(expected.after.var))
    assert (of_task.num_batches, of_task.num_samples, of_task.skipped_batches) == (
        expected.num_batches,
        expected.num_samples,
        expected.skipped_batches,
    )
    assert of_task.standard_error == expected.standard_error
    assert (of_task.unreached, of_task.nonfinite, of_task.empty) == (
        expected.unreached,
        expected.nonfinite,
        expected.empty,
    )


def everything(model: nn.Module, bank: TaskStatistics) -> Any:
    """Values of every set, the objects that lie in the layers, modes, generators, and which tasks begin."""
    sets = {task: {name: bits(value) for name, value in values(bank, task).items()} for task in bank.tasks}
    objects = {name: id(value) for name, value in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    return sets, objects, modes, generators(), bank.state_dict()["beginning"], bank.running


def values(bank: TaskStatistics, task: str) -> dict[str, Tensor]:
    snapshot = bank.snapshot(task)
    return {"mean": snapshot.mean, "var": snapshot.var, "counters": snapshot.num_batches_tracked}


ORDERS = {"alternating": "abcabcabc", "sequential": "aaabbbccc", "nine to one": "aaaaaaaaab" * 2 + "cc"}

# Three ways in which it could be subtly wrong


@pytest.mark.parametrize("start", KINDS)
@pytest.mark.parametrize("told", ["task_of", "contexts"])
def test_a_frozen_layer_normalizes_with_the_set_of_the_batchs_task(told: str, start: Any) -> None:
    model = network()
    generator = torch.Generator().manual_seed(0)
    frozen_sets = {task: torch.rand(4, generator=generator).double() + at for at, task in enumerate(TASKS)}
    separate = {task: copy.deepcopy(model) for task in TASKS}
    bank = task_statistics(model, TASKS, start=start)
    for task in TASKS:
        separate[task].bn1.running_mean.copy_(frozen_sets[task])
        with bank.task(task):
            model.bn1.running_mean.copy_(frozen_sets[task])
    for one in (model, *separate.values()):
        freeze_batch_norm(one, "bn1", affine=False)
    batches = batches_of(ORDERS["alternating"])
    before = {task: bank.snapshot(task).only(["bn1"]) for task in TASKS}
    done = recalibrate(model, batches, **alternating(told))
    for task in TASKS:
        same(done.tasks[task], recalibrate(separate[task], only(batches, task)))
        assert bank.snapshot(task).only(["bn1"]).same_bits(before[task])
    assert done.frozen == ("bn1",)


class JointTasks(nn.Module):
    """Runs a layer for one task, for another, and for the first again; and beside it one without sets."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.without = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, parts: Mapping[str, Tensor]) -> None:
        for turn in range(2):
            for task, x in parts.items():
                with lightning_bn.task(task):
                    self.shared(x + turn)
                    self.without(x)


def test_a_joint_steps_forwards_go_to_the_task_whose_context_they_run_in() -> None:
    model = network(JointTasks)
    parts = [{task: batch(task, seed)[0] for task in TASKS[seed % 2 :]} for seed in range(4)]
    separate = {task: copy.deepcopy(model) for task in TASKS}
    pooled = copy.deepcopy(model)
    task_statistics(model, TASKS, "shared")
    done = recalibrate(model, parts, forward=lambda net, one: net(one))
    for task in TASKS:
        expected = recalibrate(
            separate[task],
            [{task: one[task]} for one in parts if task in one],
            modules="shared",
            forward=lambda net, one: net(one),
        )
        same(done.tasks[task], expected)
        assert done.tasks[task].uses_apart == expected.uses_apart
    without = recalibrate(pooled, parts, modules="without", forward=lambda net, one: net(one))
    same(done, without)
    assert done.layers == ("without",)


@pytest.mark.parametrize("limit", [{"num_batches": 3}, {"num_samples": 13}, {"max_standard_error": 0.6}, {}])
@pytest.mark.parametrize("told", ["task_of", "contexts"])
@pytest.mark.parametrize("order", ORDERS)
def test_limits_hold_for_each_task_and_what_has_no_sets_is_pooled_as_the_batches_come(
    order: str, told: str, limit: dict[str, Any]
) -> None:
    model = network(Beside)
    batches = batches_of(ORDERS[order] * 3)
    separate = {task: copy.deepcopy(model) for task in TASKS}
    pooled = copy.deepcopy(model)
    task_statistics(model, TASKS, "shared")
    done = recalibrate(model, batches, **limit, **alternating(told))
    for task in TASKS:
        same(done.tasks[task], recalibrate(separate[task], only(batches, task), modules="shared", **limit))
    without = recalibrate(pooled, batches, modules="without", forward=labelled, **limit)
    same(done, without)


@pytest.mark.parametrize("start", KINDS)
def test_a_task_goes_on_from_what_was_written(start: Any) -> None:
    layer = nn.BatchNorm2d(3).double().train()
    bank = task_statistics(layer, TASKS, start=start)
    before = bank.snapshot("b")
    done = recalibrate(layer, batches_of("abcb"), task_of=task_of)
    assert done.tasks["b"].before.same_bits(before)
    assert done.tasks["b"].after.same_bits(bank.snapshot("b"))
    x = batch("b", 9)[0]
    with bank.task("b"):
        layer(x)
    expected = torch.lerp(done.tasks["b"].after.mean, x.mean((0, 2, 3)), 0.1)
    torch.testing.assert_close(bank.snapshot("b").mean, expected, rtol=1e-12, atol=0)


# What is in place


@pytest.mark.parametrize("start", KINDS)
@pytest.mark.parametrize("around", TASKS)
def test_a_context_around_the_call_counts_less_than_task_of_and_is_left_as_it_was(around: str, start: Any) -> None:
    model = network()
    bank = task_statistics(model, TASKS, start=start)
    separate = copy.deepcopy(model)
    batches = batches_of(ORDERS["alternating"])
    with bank.task(around):
        objects = {name: id(buffer) for name, buffer in model.named_buffers()}
        done = recalibrate(model, batches, task_of=task_of)
        assert {name: id(buffer) for name, buffer in model.named_buffers()} == objects
        held = torch.cat([buffer for name, buffer in model.named_buffers() if name.endswith("running_mean")])
        assert torch.equal(held, bank.snapshot(around).mean[: len(held)])
    for task in TASKS:
        same(done.tasks[task], alone(separate, only(batches, task)))
        assert bank.snapshot(task).same_bits(done.tasks[task].after)


@pytest.mark.parametrize("start", KINDS)
def test_a_context_around_the_call_tells_the_task_where_nothing_else_does(start: Any) -> None:
    model = network()
    bank = task_statistics(model, TASKS, start=start)
    separate = copy.deepcopy(model)
    others = {task: bank.snapshot(task) for task in "ac"}
    batches = only(batches_of("bbb"), "b")
    with bank.task("b"):
        done = recalibrate(model, batches)
    same(done.tasks["b"], alone(separate, batches))
    assert bank.snapshot("b").same_bits(done.tasks["b"].after)
    assert all(bank.snapshot(task).same_bits(before) for task, before in others.items())


def test_zeros_are_written_inside_the_context_of_a_task_that_begins() -> None:
    layer = fill_statistics(nn.BatchNorm2d(3)).train()
    bank = task_statistics(layer, TASKS)
    with bank.task("b"):
        done = recalibrate(layer, [torch.zeros(4, 3, 2, 2)])
    assert bits(done.tasks["b"].before.mean) == bits(bank.snapshot("a").mean)
    assert not bank.snapshot("b").mean.any()
    assert not bank.snapshot("b").var.any()


def test_contexts_count_more_than_the_batchs_own_task() -> None:
    model = network()
    separate = copy.deepcopy(model)
    task_statistics(model, TASKS)
    batches = batches_of("abab")
    swapped = {"a": "b", "b": "a"}

    def forward(net: nn.Module, one: Batch) -> None:
        with lightning_bn.task(swapped[one[1]]):
            net(one[0])

    done = recalibrate(model, batches, task_of=task_of, forward=forward)
    for task in "ab":
        same(done.tasks[task], alone(separate, only(batches, swapped[task])))


# Failures leave everything as it was


def fails(model: nn.Module, one: Batch) -> None:
    with lightning_bn.task("b"):
        model(one[0])
        with lightning_bn.task("c"):
            model(one[0])
            raise Broken


def unknown(model: nn.Module, one: Batch) -> None:
    with lightning_bn.task("b"):
        model(one[0])
        with lightning_bn.task("bb"):
            model(one[0])


def writing(model: nn.Module, one: Batch) -> None:
    """Moves a layer that is not collected, in the set of a task."""
    model.bn1.running_mean.add_(7)
    model.bn1.num_batches_tracked.add_(1)
    model(one[0])
    raise Broken


@pytest.mark.parametrize("start", KINDS)
@pytest.mark.parametrize("around", [None, "a", "b"])
@pytest.mark.parametrize("forward", [fails, unknown, writing])
def test_a_failure_leaves_everything_as_it_was(forward: Any, around: Any, start: Any) -> None:
    model = network()
    freeze_batch_norm(model, "bn1", affine=False)
    bank = task_statistics(model, TASKS, start=start)
    before = everything(model, bank)
    with bank.task(around) if around else torch.no_grad():
        inside = everything(model, bank)
        with pytest.raises((Broken, ValueError)):
            recalibrate(model, batches_of("bbc"), forward=forward, task_of=task_of)
        assert everything(model, bank) == inside
    assert everything(model, bank) == before
    assert lightning_bn.functional._tasks.current_task() is None


def test_what_a_forward_writes_to_a_frozen_layers_set_is_put_back() -> None:
    model = network()
    freeze_batch_norm(model, "bn1", affine=False)
    bank = task_statistics(model, TASKS)
    before = {task: bank.snapshot(task).only(["bn1"]) for task in TASKS}

    def forward(net: nn.Module, one: Batch) -> None:
        net(one[0])
        net.bn1.running_mean.add_(7)

    recalibrate(model, batches_of("abc"), forward=forward, task_of=task_of)
    assert all(bank.snapshot(task).only(["bn1"]).same_bits(before[task]) for task in TASKS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"task_of": lambda one: "d"},
            r"task_of says .* task 'd', but there are statistics only for the tasks 'a', 'b', 'c'",
        ),
        ({"task_of": lambda one: 3}, r"task_of says .* task 3, but there are statistics"),
        (
            {"forward": unknown},
            r"a context says .* task 'bb', but there are statistics only for the tasks 'a', 'b', 'c'",
        ),
        ({}, r"'a', 'b', 'c', and it is not known which task .*: pass task_of=.*lightning_bn.task"),
        ({"task_of": lambda one: None}, r"it is not known which task"),
    ],
)
def test_an_unknown_task_is_an_error_that_names_the_known_ones(options: dict[str, Any], words: str) -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    before = everything(model, bank)
    with pytest.raises(ValueError, match=words):
        recalibrate(model, batches_of("abc"), **options)
    assert everything(model, bank) == before


def test_task_of_without_statistics_per_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="no BatchNorm layer of the model has statistics per task"):
        recalibrate(network(), batches_of("a"), task_of=task_of)
    with pytest.raises(TypeError, match="task_of='a' must be a function"):
        recalibrate(network(), batches_of("a"), task_of="a")  # type: ignore[arg-type]


def test_statistics_per_task_of_two_objects_are_refused_unless_one_is_selected() -> None:
    model = network()
    task_statistics(model, TASKS, "layer1")
    other = task_statistics(model, ["x", "y"], "layer2")
    with pytest.raises(ValueError, match=r"'layer2.0.bn1', 'layer2.0.bn2' belong to another object"):
        recalibrate(model, batches_of("abc"), task_of=task_of)
    done = recalibrate(model, batches_of("abc"), modules="layer2", task_of=lambda one: "x")
    assert list(done.tasks) == ["x", "y"]
    assert other.snapshot("x").same_bits(done.tasks["x"].after)


def test_one_task_needs_nobody_to_tell_it() -> None:
    model = network()
    separate = copy.deepcopy(model)
    task_statistics(model, ["only"])
    batches = only(batches_of("aab"), "a")
    same(recalibrate(model, batches).tasks["only"], alone(separate, batches))


def test_what_runs_outside_of_any_task_is_the_defaults_and_is_said() -> None:
    model = network()
    separate = copy.deepcopy(model)
    task_statistics(model, TASKS)
    batches = batches_of("abab")
    done = recalibrate(model, batches, task_of=lambda one: None if one[1] == "a" else one[1])
    for task in "ab":
        same(done.tasks[task], alone(separate, only(batches, task)))
    assert done.untold_batches == 2
    assert "2 batches ran partly outside of any task, which counted for the default task" in str(done)


# Amounts


def test_batches_of_a_task_that_has_enough_are_not_run_and_the_data_are_not_drawn_further() -> None:
    drawn, run = [], []
    model = network(lambda: nn.Sequential(nn.BatchNorm2d(3)))
    task_statistics(model, ["a", "b"])

    def data() -> Iterator[Batch]:
        for one in batches_of("aaaaaaaaabaaab" + "abab"):
            drawn.append(one[1])
            yield one

    def forward(net: nn.Module, one: Batch) -> None:
        run.append(one[1])
        net(one[0])

    recalibrate(model, data(), num_batches=2, task_of=task_of, forward=forward)
    assert "".join(run) == "aabb"
    assert "".join(drawn) == "aaaaaaaaabaaab"


def test_a_task_that_never_comes_ends_the_pass_and_keeps_what_it_had() -> None:
    model = network(lambda: nn.Sequential(nn.BatchNorm2d(3)))
    bank = task_statistics(model, TASKS)
    before = bank.snapshot("c")
    drawn = itertools.count()

    def data() -> Iterator[Batch]:
        for one in itertools.cycle(batches_of("ab")):
            next(drawn)
            yield one

    done = recalibrate(model, data(), num_batches=2, task_of=task_of)
    assert bank.snapshot("c").same_bits(before)
    assert done.tasks["c"].layers == ()
    assert done.tasks["c"].num_batches == 0
    assert "'c' had no batch and was left unchanged" in str(done)
    assert next(drawn) <= PATIENCE + 4


def test_a_task_that_comes_too_rarely_is_named_and_written() -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    for limit, words in (
        ({"num_batches": 3}, r"'b' from 14 samples, standard error [\d.]+ \(the data ended after 2 of 3 batches"),
        (
            {"num_samples": 20},
            r"'b' from 14 samples, standard error [\d.]+ \(the data ended before the task had the requested amount",
        ),
    ):
        done = recalibrate(model, batches_of("aaaabaaccb"), task_of=task_of, **limit)
        assert bank.snapshot("b").same_bits(done.tasks["b"].after)
        assert re.search(words, str(done)), str(done)


def test_samples_of_a_joint_batch_are_those_of_each_part() -> None:
    model = network(JointTasks)
    task_statistics(model, TASKS, "shared")
    parts = {"a": batch("a", 0, 4)[0], "b": batch("b", 0, 7)[0]}
    done = recalibrate(model, [parts, parts], forward=lambda net, one: net(one))
    assert {task: one.num_samples for task, one in done.tasks.items()} == {"a": 8, "b": 14, "c": 0}


def test_a_single_value_per_channel_is_skipped_in_its_task() -> None:
    layer = nn.BatchNorm1d(2).double().train()
    bank = task_statistics(layer, TASKS)
    data = [(torch.randn(n, 2).double(), task) for n, task in ((3, "a"), (1, "b"), (4, "b"), (1, "a"), (2, "a"))]
    done = recalibrate(layer, data, task_of=task_of)
    assert {task: one.skipped_batches for task, one in done.tasks.items()} == {"a": 1, "b": 1, "c": 0}
    assert torch.allclose(bank.snapshot("b").mean, data[2][0].mean(0))


def test_a_batch_that_is_not_finite_is_left_out_of_its_task() -> None:
    model = network()
    separate = copy.deepcopy(model)
    task_statistics(model, TASKS)
    batches = [*batches_of("abab"), (torch.full((3, 3, 8, 8), math.nan).double(), "b")]
    done = recalibrate(model, batches, task_of=task_of)
    for task in "ab":
        same(done.tasks[task], alone(separate, only(batches, task)))
    assert not done.tasks["a"].nonfinite
    assert done.tasks["b"].nonfinite["bn1"] == 1


@pytest.mark.parametrize("options", [{"prior": 16}, {"estimator": "mean_of_batches"}])
@pytest.mark.parametrize("start", KINDS)
def test_prior_and_estimator_are_each_tasks_own(options: dict[str, Any], start: Any) -> None:
    model = network()
    separate = {task: copy.deepcopy(model) for task in TASKS}
    bank = task_statistics(model, TASKS, start=start)
    for place, task in enumerate(TASKS):
        held = bank.snapshot(task)
        held = Snapshot(
            held.layout, held.mean + place, held.var + place, held.num_batches_tracked, held.weight, held.eps
        )
        bank.write(task, held)
        for layer in (
            module for module in separate[task].modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ):
            layer.running_mean.add_(place)
            layer.running_var.add_(place)
    batches = batches_of("abcacb")
    done = recalibrate(model, batches, task_of=task_of, **options)
    for task in TASKS:
        same(done.tasks[task], recalibrate(separate[task], only(batches, task), **options))


def test_uses_of_one_forward_that_lie_apart_are_named_for_their_task() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, one: Batch) -> None:
            self.bn(one[0])
            self.bn(one[0] + 100 * (one[1] == "b"))

    model = network(Twice)
    task_statistics(model, TASKS)
    done = recalibrate(model, batches_of("aabb"), task_of=task_of, forward=lambda net, one: net(one))
    assert not done.tasks["a"].uses_apart
    assert done.tasks["b"].uses_apart["bn"] > 1


# What is said


def test_the_result_is_one_sentence_and_the_same_keys_each_time() -> None:
    model = network()
    task_statistics(model, TASKS, ["layer1"])
    done = recalibrate(model, batches_of("aabbab"), task_of=task_of)
    said = str(done)
    assert said.startswith("6 BatchNorm layers recalibrated from 28 samples in ")
    assert "; 4 BatchNorm layers with statistics per task: 'a' from 14 samples, standard error " in said
    assert "'b' from 14 samples, standard error " in said
    assert "\n" not in said
    again = recalibrate(model, batches_of("abc"), task_of=task_of)
    assert list(again.metrics()) == list(done.metrics())
    assert done.metrics()["a_samples"] == 14
    assert done.metrics()["b_standard_error"] == done.tasks["b"].standard_error
    assert (done.metrics()["c_batches"], done.metrics()["c_drift_max"]) == (0, 0)


def test_the_result_where_every_layer_has_a_set() -> None:
    model = network()
    task_statistics(model, TASKS)
    done = recalibrate(model, batches_of("aabbab"), task_of=task_of)
    assert (done.layers, len(done.before), len(done.after)) == ((), 0, 0)
    assert (done.num_batches, done.num_samples) == (6, 28)
    assert done.standard_error == max(done.tasks[task].standard_error for task in "ab")
    assert str(done).startswith("10 BatchNorm layers with statistics per task recalibrated in ")


def test_layers_without_sets_below_frozen_ones_with_are_pooled_over_all_tasks() -> None:
    model = network(SharedNorm)
    bank = task_statistics(model, TASKS, "first.norm")
    freeze_batch_norm(model, "first.norm", affine=False)
    before = {task: bank.snapshot(task) for task in TASKS}
    done = recalibrate(model, batches_of("abc"), task_of=task_of, num_batches=2)
    assert (done.layers, done.num_batches, done.tasks) == (("own",), 2, {})
    assert all(bank.snapshot(task).same_bits(before[task]) for task in TASKS)


def test_python_generators_are_left_alone() -> None:
    model = network()
    task_statistics(model, TASKS)
    state = random.getstate()
    recalibrate(model, batches_of("abc"), task_of=task_of)
    assert random.getstate() == state
