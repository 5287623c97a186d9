"""A set of statistics for each task: what separate layers would hold, in the same layers, switched by other objects."""

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn.functional import ExchangeError, SelectionError, recalibrate, take_snapshot
from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.tasks import TaskStatistics, task_statistics
from tests.models import Broken, SmallResNet, bits, fill_statistics, images, seeded, state_bits

TASKS = ["a", "b", "c"]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return fill_statistics(seeded(SmallResNet)).to(dtype).train()


def batch(task: str, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of each task with a mean and a scale of its own."""
    place = TASKS.index(task)
    return images(6, seed=seed, dtype=dtype) * (1 + place) + 3 * place


def copies(model: nn.Module, tasks: list[str]) -> dict[str, nn.Module]:
    """A separate instance for each task, that shares the weights."""
    found = {}
    for task in tasks:
        found[task] = copy.deepcopy(model)
        for (path, theirs), ours in zip(found[task].named_parameters(), model.parameters(), strict=True):
            parent, _, name = path.rpartition(".")
            setattr(found[task].get_submodule(parent), name, ours)
            assert theirs is not ours
    return found


def statistics(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(buffer) for name, buffer in model.named_buffers()}


def of_task(bank: TaskStatistics, model: nn.Module, task: str) -> dict[str, bytes]:
    with bank.task(task):
        return statistics(model)


# Right values

ALTERNATING = [TASKS[step % 3] for step in range(60)]
SEQUENTIAL = [TASKS[step // 20] for step in range(60)]
UNEQUAL = ["b" if step % 10 == 9 else "a" for step in range(60)]


@pytest.mark.parametrize("order", [ALTERNATING, SEQUENTIAL, UNEQUAL], ids=["alternating", "sequential", "9 to 1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_task_has_what_a_layer_of_its_own_would_have(order: list[str], dtype: torch.dtype) -> None:
    model = network(dtype)
    separate = copies(model, TASKS)
    bank = task_statistics(model, TASKS, start="shared")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, task in enumerate(order):
        x = batch(task, step, dtype)
        separate[task](x)
        optimizer.zero_grad()
        with bank.task(task):
            model(x).square().mean().backward()
        optimizer.step()
    for task in TASKS:
        assert of_task(bank, model, task) == statistics(separate[task])


def test_joint_steps_have_the_gradients_and_statistics_of_separate_networks() -> None:
    for eval_in in ([], ["layer1"], ["bn1", "layer1", "layer2", "layer10", "head"]):
        model = network()
        for path in eval_in:
            model.get_submodule(path).eval()
        separate = copies(model, TASKS)
        bank = task_statistics(model, TASKS, start="shared")
        loss = sum(separate[task](batch(task, 1)).square().mean() for task in TASKS)
        loss.backward()  # type: ignore[union-attr]
        expected = [bits(weight.grad) for weight in model.parameters() if weight.grad is not None]
        model.zero_grad()
        losses = []
        for task in TASKS:
            with bank.task(task):
                losses.append(model(batch(task, 1)).square().mean())
        sum(losses).backward()  # type: ignore[union-attr]
        assert [bits(weight.grad) for weight in model.parameters() if weight.grad is not None] == expected
        for task in TASKS:
            assert of_task(bank, model, task) == statistics(separate[task])


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_cumulative_start_averages_what_a_task_has_seen(momentum: float | None) -> None:
    layer = fill_statistics(nn.BatchNorm2d(3, momentum=momentum)).double().train()
    bank = task_statistics(layer, ["old", "new"])
    mean, var = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for update in range(1, 31):
        x = batch("b", update)
        with bank.task("new"):
            layer(x)
        weight = max(momentum or 0, 1 / update)
        mean += weight * (x.mean((0, 2, 3)) - mean)
        var += weight * (x.transpose(0, 1).flatten(1).var(1) - var)
        found = bank.snapshot("new")
        assert torch.allclose(found.mean, mean, rtol=1e-12)
        assert torch.allclose(found.var, var, rtol=1e-12)
        assert found.num_batches_tracked.tolist() == [update]
    assert layer.momentum == momentum


def test_new_task_far_away_is_where_it_is_after_eight_batches() -> None:
    layer = nn.BatchNorm1d(4).train()
    bank = task_statistics(layer, ["near", "far"])
    for seed in range(8):
        with bank.task("far"):
            layer(10 + torch.randn(256, 4, generator=torch.Generator().manual_seed(seed)))
    assert float((bank.snapshot("far").mean - 10).abs().max()) < 0.1


def test_the_default_goes_on_as_an_ordinary_moving_average() -> None:
    model, twin = network(), network()
    bank = task_statistics(model, TASKS)
    for seed in range(3):
        twin(batch("a", seed))
        with bank.task("a"):
            model(batch("a", seed))
    assert statistics(model) == statistics(twin)


def test_one_task_changes_nothing() -> None:
    model, twin = network(), network()
    bank = task_statistics(model, ["only"])
    with bank.task("only"):
        model(batch("a", 0))
    twin(batch("a", 0))
    assert state_bits(model) == state_bits(twin)
    assert bank.state_dict()["sets"] == {}


def test_several_uses_in_one_context_are_averaged() -> None:
    layer = nn.BatchNorm1d(2).double().train()
    bank = task_statistics(layer, ["old", "new"])
    one, other = (torch.randn(8, 2, dtype=torch.float64) + shift for shift in (0, 5))
    with bank.task("new"):
        layer(one)
        layer(other)
    mean = (one.mean(0) + other.mean(0)) / 2
    assert torch.allclose(bank.snapshot("new").mean, mean)
    assert bank.snapshot("new").num_batches_tracked.tolist() == [2]


# The same objects, wherever they are looked for


def test_outside_of_contexts_the_layers_hold_their_own_objects() -> None:
    model = network()
    own = {name: id(buffer) for name, buffer in model.named_buffers()}
    bank = task_statistics(model, TASKS, default="b")
    with bank.task("b"):
        assert {name: id(buffer) for name, buffer in model.named_buffers()} == own
    with bank.task("a"):
        assert not set(own.values()) & {id(buffer) for buffer in model.buffers()}
        with bank.task("b"):
            assert {name: id(buffer) for name, buffer in model.named_buffers()} == own
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == own
    assert bank.running == "b"


def test_state_dict_is_that_of_the_default_task_wherever_it_is_taken() -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    outside = state_bits(model)
    with bank.task("b"):
        model(batch("b", 0))
        inside = {name: bits(value) for name, value in model.state_dict().items()}
        stored = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert inside == outside
    assert stored == {name: value.data_ptr() for name, value in model.state_dict().items()}


def test_load_state_dict_inside_a_context_loads_the_default_task() -> None:
    model, other = network(), network()
    other(batch("c", 3))
    bank = task_statistics(model, TASKS)
    held = of_task(bank, model, "b")
    with bank.task("b"):
        model.load_state_dict(other.state_dict())
        assert statistics(model) == held
    assert statistics(model) == statistics(other)
    assert of_task(bank, model, "b") == held
    with pytest.raises(RuntimeError, match="load after the context"), bank.task("b"):
        model.load_state_dict(other.state_dict(), assign=True)
    assert of_task(bank, model, "b") == held


def test_saved_sets_carry_only_their_own_memory() -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    for sets in bank.state_dict()["sets"].values():
        for tensor in sets.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_switch_runs_no_operator() -> None:
    model = network()
    bank = task_statistics(model, TASKS, start="shared")
    with Operators() as operators, bank.task("b"), bank.task("c"):
        pass
    assert operators.seen == []


def test_contexts_nest_and_end_after_exceptions() -> None:
    model = network()
    own = statistics(model)
    bank = task_statistics(model, TASKS)

    def fail() -> None:
        with bank.task("b"), bank.task("c"), bank.task("b"):
            assert bank.running == "b"
            model(batch("b", 0))
            raise Broken

    with pytest.raises(Broken):
        fail()
    assert bank.running == "a"
    assert statistics(model) == own
    assert bank.snapshot("b").num_batches_tracked.unique().tolist() == [1]
    assert bank.snapshot("c").num_batches_tracked.unique().tolist() == [0]


# What others do to the layers


@pytest.fixture
def told() -> Iterator[list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: list[str] = []
        yield found
        found += [str(one.message) for one in caught]


@pytest.mark.parametrize("inside", [False, True])
def test_sets_go_along_where_the_model_changes_its_dtype(inside: bool) -> None:
    model = network(torch.float32)
    bank = task_statistics(model, TASKS)

    def change() -> None:
        if inside:
            with bank.task("b"):
                model.double()
        else:
            model.double()
            bank.snapshot("a")

    with pytest.warns(UserWarning, match=r"were replaced \(by \.to\(\)"):
        change()
    assert {buffer.dtype for name, buffer in model.named_buffers() if "running" in name} == {torch.float64}
    for task in TASKS:
        with bank.task(task):
            model(batch(task, 0))
        assert bank.snapshot(task).mean.dtype == torch.float64
    # Said once: now they are where they belong.
    assert bank.snapshot("b").num_batches_tracked.unique().tolist() == [1]


def test_converted_layers_are_found_again() -> None:
    model = network(torch.float32)
    bank = task_statistics(model, TASKS)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.warns(UserWarning, match="conversion"):
        bank.snapshot("a")
    own = {id(buffer) for buffer in converted.buffers()}
    with bank.task("b"):
        assert all(isinstance(converted.get_submodule(name), nn.SyncBatchNorm) for name in bank.layers)
        assert not own & {id(buffer) for buffer in converted.buffers()}


def test_layer_of_other_channels_is_an_error() -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    name = bank.layers[1]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.BatchNorm2d(7))
    with pytest.raises(ValueError, match=rf"{name}.* has 7 channels now.*call release\(\)"), bank.task("b"):
        pass


def test_exchange_that_was_not_taken_out_is_an_error_with_both_names() -> None:
    layer = nn.BatchNorm1d(2)
    bank = task_statistics(layer, TASKS)
    loan = exchanged("loan", [Entries("bn", layer, {"running_mean": torch.ones(2)})])

    def leave() -> None:
        with bank.task("b"):
            loan.__enter__()

    with pytest.raises(ExchangeError, match=r"'task_statistics'.*'loan'"):
        leave()


def test_loan_around_a_switch_is_back_after_it() -> None:
    layer = nn.BatchNorm1d(2)
    bank = task_statistics(layer, TASKS)
    lent, own = torch.full((2,), 3.0), layer.running_mean
    with exchanged("loan", [Entries("bn", layer, {"running_mean": lent})]):
        with bank.task("b"):
            layer(torch.randn(8, 2))
            assert layer.running_mean is not lent
        assert layer.running_mean is lent
    assert layer.running_mean is own
    assert torch.equal(lent, torch.full((2,), 3.0))
    assert bank.snapshot("b").num_batches_tracked.tolist() == [1]


def test_loan_inside_a_switch_is_back_before_it_ends() -> None:
    layer = nn.BatchNorm1d(2)
    bank = task_statistics(layer, TASKS)
    before = bank.snapshot("b")
    with bank.task("b"), exchanged("loan", [Entries("bn", layer, {"running_mean": torch.ones(2)})]):
        pass
    assert bank.snapshot("b").same_bits(before)


def test_recalibration_inside_a_context_is_the_tasks() -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    own = statistics(model)
    with bank.task("b"):
        recalibrate(model, [batch("b", seed) for seed in range(3)])
        inside = take_snapshot(model)
    assert statistics(model) == own
    assert bank.snapshot("b").same_bits(inside)


def test_forward_outside_of_any_context_is_told_once_with_the_layer() -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    model(batch("a", 0))
    with bank.task("b"):
        model(batch("b", 0))
    model.eval()(batch("a", 0))
    model.train()
    with bank.task("b"):
        pass
    assert bank.outside.times == 0
    model(batch("a", 0))
    with pytest.warns(UserWarning, match=rf"statistics of the default task 'a' in .*{bank.layers[0]}"):
        bank.task("b").__enter__()
    model.load_state_dict(model.state_dict())


# Statistics of tasks as values


def test_snapshot_and_write_are_of_one_task() -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    with bank.task("b"):
        model(batch("b", 0))
    saved = bank.snapshot("b")
    bank.write("c", saved)
    assert bank.snapshot("c").same_bits(saved)
    assert not bank.snapshot("a").same_bits(saved)
    with pytest.raises(ValueError, match="take a snapshot of the same layers"):
        bank.write("c", saved.only(bank.layers[:1]))


def test_added_tasks_begin_as_the_default_or_as_another_one() -> None:
    model = network()
    bank = task_statistics(model, TASKS[:2])
    with bank.task("b"):
        model(batch("b", 0))
    bank.add("c", like="b")
    bank.add("d")
    assert bank.tasks == ("a", "b", "c", "d")
    assert bank.snapshot("c").same_bits(bank.snapshot("b"))
    assert torch.equal(bank.snapshot("d").mean, bank.snapshot("a").mean)
    bank.remove("b")
    assert bank.tasks == ("a", "c", "d")
    with pytest.raises(ValueError, match="cannot be removed: it is running, or it is the default task"):
        bank.remove("a")
    with pytest.raises(ValueError, match="'c' is given twice"):
        bank.add("c")


def test_mixture_is_that_of_all_values_together() -> None:
    layer = nn.BatchNorm1d(3, momentum=1.0).double().train()
    bank = task_statistics(layer, TASKS)
    parts = {
        task: torch.randn(count, 3, dtype=torch.float64) + count for task, count in zip(TASKS, (40, 80, 7), strict=True)
    }
    for task, values in parts.items():
        with bank.task(task):
            layer(values)
    found = bank.mixture({task: len(values) for task, values in parts.items()})
    together = torch.cat(list(parts.values()))
    assert torch.allclose(found.mean, together.mean(0))
    assert torch.allclose(found.var, together.var(0), rtol=0.02)
    two = bank.mixture({"a": 1, "b": 1})
    assert torch.allclose(two.mean, (parts["a"].mean(0) + parts["b"].mean(0)) / 2)


@pytest.mark.parametrize("weights", [{"a": -1.0, "b": 2.0}, {"a": 0}, {}])
def test_weights_that_are_none_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights="):
        task_statistics(nn.BatchNorm1d(2), TASKS).mixture(weights)


# Saved and loaded


def trained(tasks: list[str], **options: Any) -> tuple[nn.Module, TaskStatistics]:
    model = network()
    bank = task_statistics(model, tasks, **options)
    for step, task in enumerate(tasks * 2):
        with bank.task(task):
            model(batch(task, step))
    return model, bank


def saved(bank: TaskStatistics) -> dict[str, Any]:
    """As a checkpoint has it."""
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def resumed(
    model: nn.Module, bank: TaskStatistics, tasks: list[str], **options: Any
) -> tuple[nn.Module, Any, list[str]]:
    again = network()
    again.load_state_dict(model.state_dict())
    given_up = options.pop("given_up", ())
    other = task_statistics(again, tasks, **options)
    return again, other, other.load_state_dict(saved(bank), given_up=given_up)


def test_resumed_statistics_go_on_as_if_nothing_had_happened() -> None:
    model, bank = trained(TASKS)
    again, other, told = resumed(model, bank, TASKS)
    assert told == []
    for step in range(20):
        task = TASKS[step % 3]
        for one, statistics_of in ((model, bank), (again, other)):
            with statistics_of.task(task):
                one(batch(task, 50 + step))
    for task in TASKS:
        assert of_task(bank, model, task) == of_task(other, again, task)


def test_another_default_takes_its_place() -> None:
    model, bank = trained(TASKS)
    again, other, told = resumed(model, bank, TASKS, default="b")
    assert told == ["the default task was 'a' when this was saved, and is 'b' now"]
    for task in TASKS:
        assert other.snapshot(task).same_bits(bank.snapshot(task))
    assert statistics(again) == of_task(bank, model, "b")


def test_task_more_begins_and_task_fewer_has_to_be_given_up() -> None:
    model, bank = trained(TASKS[:2])
    _, other, told = resumed(model, bank, TASKS)
    assert told == ["task 'c' is new and begins with the default task's statistics (start='cumulative')"]
    assert torch.equal(other.snapshot("c").mean, bank.snapshot("a").mean)
    with pytest.raises(ValueError, match=r"have task 'b', but tasks has only a, c: .*given_up"):
        resumed(model, bank, ["a", "c"])
    _, other, _ = resumed(model, bank, ["a", "c"], given_up=["b"])
    assert other.tasks == ("a", "c")


def test_default_that_was_given_up_leaves_its_place_to_another() -> None:
    model, bank = trained(TASKS[:2])
    again, _, _ = resumed(model, bank, ["b"], given_up=["a"])
    assert statistics(again) == of_task(bank, model, "b")


def test_other_layers_and_channels_are_refused_and_nothing_changed() -> None:
    _, bank = trained(TASKS)
    again = network()
    other = task_statistics(again, TASKS, exclude=bank.layers[0])
    with pytest.raises(ValueError, match="are of other layers"):
        other.load_state_dict(saved(bank))
    state = saved(bank)
    state["sets"]["c"][f"{bank.layers[-1]}.running_var"] = torch.ones(3)
    whole = task_statistics(model2 := network(), TASKS)
    before = {task: of_task(whole, model2, task) for task in TASKS}
    with pytest.raises(ValueError, match=bank.layers[-1]):
        whole.load_state_dict(state)
    assert {task: of_task(whole, model2, task) for task in TASKS} == before


# Given up


@pytest.mark.parametrize("keep", [None, "c"])
def test_released_layers_hold_their_own_objects_with_the_values_of_one_task(keep: str | None) -> None:
    model, bank = trained(TASKS)
    own = [id(buffer) for buffer in model.buffers()]
    expected = of_task(bank, model, keep or "a")
    bank.release(keep)
    assert [id(buffer) for buffer in model.buffers()] == own
    assert statistics(model) == expected
    assert not model.get_submodule(next(iter(take_snapshot(model).names)))._state_dict_hooks
    task_statistics(model, TASKS)


def test_release_inside_a_context_is_refused() -> None:
    bank = task_statistics(nn.BatchNorm1d(2), TASKS)
    with bank.task("b"), pytest.raises(RuntimeError, match="has not ended"):
        bank.release()


def test_copies_and_pickles_of_the_model_are_nobodys() -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    with bank.task("b"):
        model(batch("b", 0))
        twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, loaded):
        assert state_bits(other) != state_bits(model)
        task_statistics(other, TASKS)


# Bad input


@pytest.mark.parametrize(
    ("tasks", "found"),
    [
        ([], "no task is given"),
        (["a", "a"], "'a' is given twice"),
        (["a", 3], "3 is not a name"),
        (["a", ""], "'' is not a name"),
        (["mixture"], "'mixture' is not a name"),
    ],
)
def test_names_of_tasks_are_looked_at(tasks: Any, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        task_statistics(nn.BatchNorm1d(2), tasks)


def test_unknown_tasks_are_named_with_the_closest() -> None:
    bank = task_statistics(nn.BatchNorm1d(2), ["detection", "segmentation"])
    with pytest.raises(
        ValueError, match=r"no task 'detektion'; the tasks are 'detection', 'segmentation'.*'detection'"
    ):
        bank.snapshot("detektion")
    with pytest.raises(ValueError, match="default='x'"):
        task_statistics(nn.BatchNorm1d(2), TASKS, default="x")
    with pytest.raises(ValueError, match="start='x'"):
        task_statistics(nn.BatchNorm1d(2), TASKS, start="x")  # type: ignore[arg-type]


def test_layers_that_cannot_have_sets_are_refused() -> None:
    with pytest.raises(SelectionError, match="has no running statistics"):
        task_statistics(nn.BatchNorm1d(2, track_running_stats=False), TASKS)
    with pytest.raises(SelectionError, match="has not seen a batch"):
        task_statistics(nn.LazyBatchNorm1d(), TASKS)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    first = task_statistics(model, TASKS, "0")
    with pytest.raises(RuntimeError, match=r"'0' has statistics per task already"):
        task_statistics(model, TASKS)
    second = task_statistics(model, TASKS, "1")
    with first.task("b"), second.task("c"):
        pass


@pytest.mark.compile
def test_whole_model_compiled_has_no_more_graphs_than_with_one_task() -> None:
    def graphs(tasks: list[str]) -> int:
        torch._dynamo.reset()
        count = 0

        def backend(graph: Any, inputs: Any) -> Any:
            nonlocal count
            count += 1
            return graph.forward

        model = network(torch.float32)
        bank = task_statistics(model, tasks)
        compiled = torch.compile(model, backend=backend)
        for step in range(3):
            for task in tasks:
                with bank.task(task):
                    compiled(images(6, seed=step)).sum().backward()
        return count

    assert graphs([f"task{index}" for index in range(12)]) == graphs(["only"])


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e3), (torch.bfloat16, 1.0)])
def test_what_a_task_begins_from_does_not_round_off_what_it_sees(dtype: torch.dtype, scale: float) -> None:
    layer = nn.BatchNorm1d(64).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        layer((torch.randn(64, 64, generator=generator) * scale).to(dtype))
    bank = task_statistics(layer, ["near", "far"])
    x = (torch.randn(64, 64, generator=generator) * 0.01 + 0.3).to(dtype)
    with bank.task("far"):
        layer(x)
    found = bank.snapshot("far")
    assert torch.allclose(found.mean.double(), x.double().mean(0), rtol=0.01)
    assert torch.allclose(found.var.double(), x.double().var(0), rtol=0.1)


def test_layer_that_is_in_eval_while_others_begin_begins_when_it_trains() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(1), "b": nn.BatchNorm1d(1).eval()})
    bank = task_statistics(model, ["near", "far"])
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) + 100
    for step in range(15):
        model["b"].train(step >= 10)
        with bank.task("far"):
            model["a"](x)
            model["b"](x)
    assert bank.snapshot("far").mean.tolist() == pytest.approx([float(x.mean())] * 2, rel=1e-5)


def test_context_in_which_nothing_trains_leaves_what_a_task_begins_from() -> None:
    model = network()
    bank = task_statistics(model, TASKS)
    before = bank.snapshot("b")
    with bank.task("b"):
        pass
    assert bank.snapshot("b").same_bits(before)


def test_backward_may_come_after_the_context_of_a_task_that_begins() -> None:
    model, copy_ = network(), network()
    bank = task_statistics(model, TASKS)
    for seed in range(3):
        with bank.task("b"):
            first = model(batch("b", seed))
        with bank.task("b"):
            second = model(batch("b", seed + 10))
        loss = first.square().sum() + second.square().sum()
        found = torch.autograd.grad(loss, list(model.parameters()))
        plain = copy_(batch("b", seed)).square().sum() + copy_(batch("b", seed + 10)).square().sum()
        assert all(map(torch.equal, found, torch.autograd.grad(plain, list(copy_.parameters()))))
