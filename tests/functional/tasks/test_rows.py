"""Batches whose rows belong to several tasks: each row as a layer of its task alone would have it."""

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lightning_bn.functional import FreezeSelection, FreezeSession, freeze_batch_norm, frozen_batch_norm, recalibrate
from lightning_bn.functional._tasks import Listener
from lightning_bn.functional.layers.overlay import Overlay
from lightning_bn.functional.tasks import TaskStatistics, task_statistics
from lightning_bn.functional.tasks.row_parts import put_together, take
from tests.models import BatchNormAct2d, Broken, SmallResNet, bits, fill_statistics, images, seeded, state_bits

TASKS = ["a", "b", "c"]
CLOSE: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}


def layer_of(kind: type[_BatchNorm] = nn.BatchNorm2d, **settings: Any) -> _BatchNorm:
    return fill_statistics(kind(3, **settings)).double().train()  # type: ignore[return-value]


def labels(step: int, rows: int = 9, tasks: list[str] | None = None) -> list[str]:
    """Another split in another order at each step; every fourth step one of the tasks is not there."""
    generator = torch.Generator().manual_seed(1000 + step)
    there = list(tasks or TASKS)
    if step % 4 == 3 and len(there) > 1:
        there.pop(step // 4 % len(there))
    found = [there[int(i)] for i in torch.randint(len(there), (rows - len(there),), generator=generator)] + there
    return [found[int(i)] for i in torch.randperm(rows, generator=generator)]


def batch(which: list[str], seed: int, shape: tuple[int, ...] = (3, 4, 2)) -> Tensor:
    """Rows of each task with a mean and a scale of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(which), *shape, generator=generator, dtype=torch.float64)
    place = torch.tensor([float(TASKS.index(task)) for task in which], dtype=torch.float64)
    place = place.view(-1, *[1] * len(shape))
    return x * (1 + place) + 3 * place


def rows_of(which: list[str], task: str) -> list[int]:
    return [row for row, one in enumerate(which) if one == task]


def copies(model: nn.Module) -> dict[str, nn.Module]:
    """A separate instance for each task, that shares the weights."""
    found = {}
    for task in TASKS:
        found[task] = copy.deepcopy(model)
        for path, ours in model.named_parameters():
            parent, _, name = path.rpartition(".")
            setattr(found[task].get_submodule(parent), name, ours)
    return found


def separately(separate: dict[str, nn.Module], x: Tensor, which: list[str]) -> Tensor:
    """What separate layers give for each task's rows, in the order of the batch."""
    rows: list[Tensor] = [x[0]] * len(x)
    for task in dict.fromkeys(which):
        for row, out in zip(rows_of(which, task), separate[task](x[rows_of(which, task)]), strict=True):
            rows[row] = out
    return torch.stack(rows)


def same_sets(bank: TaskStatistics, model: nn.Module, separate: dict[str, nn.Module]) -> None:
    for task in TASKS:
        with bank.task(task):
            for (name, ours), theirs in zip(model.named_buffers(), separate[task].buffers(), strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE, msg=f"{name} of {task}")


def sets_bits(bank: TaskStatistics) -> dict[tuple[str, str, str], bytes]:
    return {
        (task, name, key): bits(buffer)
        for task, sets in bank.parts()
        for name, one in sets.items()
        for key, buffer in one.items()
    }


def test_the_labels_are_of_any_split_in_any_order() -> None:
    all_of_them = [labels(step) for step in range(60)]
    assert len({tuple(which) for which in all_of_them}) == 60
    assert {len(set(which)) for which in all_of_them} == {2, 3}
    assert any(one != two for which in all_of_them for one, two in pairwise(which))


# Training


@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
def test_training_is_that_of_a_layer_for_each_task(momentum: float | None) -> None:
    layer = layer_of(momentum=momentum)
    separate = copies(layer)
    bank = task_statistics(layer, TASKS, start="shared")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for step in range(60):
        which = labels(step)
        x, target = batch(which, step), batch(which, 500 + step)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        optimizer.zero_grad()
        expected = separately(separate, theirs, which)
        expected.sub(target).square().sum().backward()
        gradients = [theirs.grad, *[weight.grad for weight in layer.parameters()]]
        optimizer.zero_grad()
        with bank.rows(which):
            out = layer(ours)
        out.sub(target).square().sum().backward()
        torch.testing.assert_close(out, expected, **CLOSE)
        for found, right in zip([ours.grad, *[w.grad for w in layer.parameters()]], gradients, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
        optimizer.step()
    same_sets(bank, layer, separate)


def test_whole_network_with_residuals_is_trained_as_one_for_each_task() -> None:
    model = fill_statistics(seeded(SmallResNet)).double().train()
    separate = copies(model)
    bank = task_statistics(model, TASKS, start="shared")
    for step in range(6):
        which = labels(step, 5) * 2
        x = images(10, seed=step, dtype=torch.float64)
        separately(separate, x, which).square().sum().backward()
        expected = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        model.zero_grad()
        with bank.rows(which):
            model(x).square().sum().backward()
        found = [weight.grad for weight in model.parameters() if weight.grad is not None]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        model.zero_grad()
    same_sets(bank, model, separate)


def test_running_statistics_move_with_each_tasks_own_mean_and_variance() -> None:
    layer = layer_of(momentum=0.25)
    bank = task_statistics(layer, TASKS, start="shared")
    before = {task: bank.snapshot(task) for task in TASKS}
    which = ["b", "a", "b", "a", "a"]
    x = batch(which, 0)
    with bank.rows(which):
        out = layer(x)
    for task in ("a", "b"):
        values = x[rows_of(which, task)].transpose(0, 1).flatten(1)
        mean, var = values.mean(1), values.var(1)
        after = bank.snapshot(task)
        torch.testing.assert_close(after.mean, 0.75 * before[task].mean + 0.25 * mean, **CLOSE)
        torch.testing.assert_close(after.var, 0.75 * before[task].var + 0.25 * var, **CLOSE)
        normalized = (values - mean[:, None]) / (values.var(1, correction=0)[:, None] + layer.eps).sqrt()
        right = normalized * layer.weight[:, None] + layer.bias[:, None]
        torch.testing.assert_close(out[rows_of(which, task)].transpose(0, 1).flatten(1), right, **CLOSE)
    assert [bank.snapshot(task).num_batches_tracked.tolist() for task in TASKS] == [[8], [8], [7]]


def test_absent_task_keeps_every_bit() -> None:
    layer = layer_of()
    bank = task_statistics(layer, TASKS, default="c")
    before = sets_bits(bank)
    with bank.rows(["a", "b", "a", "b"]):
        layer(batch(["a", "b", "a", "b"], 0))
    after = sets_bits(bank)
    assert {at[0] for at in before if before[at] != after[at]} == {"a", "b"}


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_task_that_begins_averages_what_its_rows_were(momentum: float | None) -> None:
    layer = layer_of(momentum=momentum)
    bank = task_statistics(layer, TASKS)
    mean, var = torch.zeros(2, 3, dtype=torch.float64)
    updates = 0
    for step in range(60):
        which = labels(step)
        x = batch(which, step)
        with bank.rows(which):
            layer(x)
        if "b" in which:
            updates += 1
            values = x[rows_of(which, "b")].transpose(0, 1).flatten(1)
            factor = max(momentum or 0.0, 1 / updates)
            mean = mean + factor * (values.mean(1) - mean)
            var = var + factor * (values.var(1) - var)
        if updates:
            found = bank.snapshot("b")
            torch.testing.assert_close(found.mean, mean, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found.var, var, rtol=1e-10, atol=1e-10)
    assert bank.snapshot("b").num_batches_tracked.tolist() == [updates]
    assert 40 < updates < 60


# Evaluation


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d, nn.SyncBatchNorm])
def test_evaluation_of_each_row_is_that_of_the_row_by_itself(kind: type[_BatchNorm], grad: bool) -> None:
    layer = layer_of(kind)
    bank = moved_apart(layer)
    layer.eval()
    which = labels(2)
    x = batch(which, 1).requires_grad_(grad)
    single = []
    for row, task in enumerate(which):
        with bank.task(task):
            single.append(layer(x[row : row + 1]))
    before = sets_bits(bank)
    with torch.set_grad_enabled(grad), bank.rows(which):
        out = layer(x)
    torch.testing.assert_close(out, torch.cat(single), **CLOSE)
    assert sets_bits(bank) == before
    if grad:
        wanted = torch.autograd.grad(torch.cat(single).pow(3).sum(), [x, layer.weight, layer.bias])
        found = torch.autograd.grad(out.pow(3).sum(), [x, layer.weight, layer.bias])
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def moved_apart(model: nn.Module) -> TaskStatistics:
    """Statistics per task, each with values of its own."""
    bank = task_statistics(model, TASKS, start="shared")
    for seed, task in enumerate(TASKS):
        with bank.task(task):
            generator = torch.Generator().manual_seed(seed)
            for name, buffer in model.named_buffers():
                if not name.endswith("num_batches_tracked"):
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return bank


@pytest.mark.parametrize("which", [labels(2), ["b"] * 4])
def test_backward_of_evaluated_rows_reads_what_its_forward_used(which: list[str]) -> None:
    for kind in (nn.BatchNorm2d, BatchNormAct2d):
        layer = layer_of(kind)
        bank = moved_apart(layer)
        x = batch(which, 1).requires_grad_()
        layer.eval()
        with bank.rows(which):
            layer(x).pow(3).sum().backward()
        right = x.grad.clone()  # type: ignore[union-attr]
        x.grad = None
        with bank.rows(which):
            loss = layer(x).pow(3).sum()
            layer.train()
            layer(batch(which, 2))
        loss.backward()
        assert bits(x.grad) == bits(right)  # type: ignore[arg-type]


# Errors, before any statistic is written


def refused(bank: TaskStatistics, run: Callable[[], object], kind: type[Exception], *found: str) -> None:
    before = sets_bits(bank)
    with pytest.raises(kind) as error:
        run()
    assert sets_bits(bank) == before
    for part in found:
        assert part in str(error.value)


@pytest.mark.parametrize("training", [True, False])
def test_other_numbers_of_rows_are_refused_with_both(training: bool) -> None:
    model = nn.Sequential(nn.Flatten(0, 1), layer_of()).train(training)
    bank = task_statistics(model, TASKS, start="shared")

    def run() -> None:
        with bank.rows(["a", "b"]):
            model(batch(["a", "b"], 0, (6, 3, 4, 2)))

    refused(bank, run, ValueError, "'1'", "12 rows", "of 2", "exclude", "task(name)")


@pytest.mark.parametrize(("tasks", "found"), [(["a", "d"], "'d'"), ([], "rows=[]"), ("ab", "rows='ab'")])
def test_rows_need_known_names(tasks: Any, found: str) -> None:
    layer = layer_of()
    bank = task_statistics(layer, TASKS, start="shared")
    refused(bank, lambda: bank.rows(tasks).__enter__(), ValueError, found)
    assert type(layer) is nn.BatchNorm2d
    assert bank.running == "a"


@pytest.mark.parametrize("start", ["cumulative", "shared"])
def test_one_value_per_channel_of_a_task_is_refused_in_training(start: Any) -> None:
    model = nn.Sequential(layer_of(nn.BatchNorm1d))
    bank = task_statistics(model, TASKS, start=start)

    def run() -> None:
        with bank.rows(["a", "a", "b"]):
            model(batch(["a", "a", "b"], 0, (3,)))

    refused(bank, run, ValueError, "'0'", "'b'", "one value per channel")
    model.eval()
    run()
    model.train()
    with bank.rows(["a", "a", "b"]):
        model(batch(["a", "a", "b"], 0, (3, 2)))  # two positions are two values


def test_layer_that_is_being_recalibrated_is_refused_by_name() -> None:
    model = nn.Sequential(layer_of())
    bank = task_statistics(model, ["a", "b"], start="shared")

    def forward(_: nn.Module, x: Tensor) -> None:
        with bank.rows(["a", "b", "a", "b"]):
            model(x)

    def run() -> None:
        recalibrate(model, [batch(["a"] * 4, 0)], forward=forward, task_of=lambda *_: "a")

    refused(bank, run, RuntimeError, "'0'", "recalibrate")
    assert type(model[0]) is nn.BatchNorm2d


def test_replaced_tensors_are_refused_in_training() -> None:
    layer = layer_of()
    bank = task_statistics(layer, TASKS, start="shared")
    other = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def run() -> None:
        with bank.rows(["a", "b", "a", "b"]):
            torch.func.functional_call(layer, other, (batch(["a"] * 4, 0),))

    refused(bank, run, RuntimeError, "the running statistics of BatchNorm layer")


def test_task_inside_counts_until_it_ends() -> None:
    layer = layer_of()
    bank = task_statistics(layer, TASKS, start="shared")
    which = ["a", "b", "a", "b"]
    with bank.rows(which):
        with bank.task("c"):
            layer(batch(["c"] * 5, 0))
        with bank.task("a"), bank.rows(which):
            layer(batch(which, 0))
        layer(batch(which, 0))
    with bank.task("b"), bank.rows(which):
        layer(batch(which, 0))
    assert [bank.snapshot(task).num_batches_tracked.tolist() for task in TASKS] == [[10], [10], [8]]


def test_task_inside_is_refused_while_somebody_follows_tasks() -> None:
    layer = layer_of()
    bank = task_statistics(layer, TASKS, start="shared")
    listener = Listener(lambda task: None, lambda: None, "a")
    listener.begin()
    try:
        with bank.rows(["a", "b"]):
            with pytest.raises(RuntimeError, match="'c' begins inside a context of rows"), bank.task("c"):
                pass
            with bank.task("a"):  # of which nobody is told
                pass
        with bank.task("c"):
            pass
    finally:
        listener.end()


# Everything is put back


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    model = fill_statistics(seeded(SmallResNet)).double().train()
    bank = task_statistics(model, TASKS, start="shared")
    own = [(type(module), dict(module._buffers), {*module.__dict__}) for module in model.modules()]
    try:
        with bank.rows(["a", "b"] * 4), bank.rows(["b", "c"] * 4):
            model(images(8, dtype=torch.float64))
            if fails:
                raise Broken
    except Broken:
        pass
    found = [(type(module), dict(module._buffers), {*module.__dict__}) for module in model.modules()]
    assert [(kind, keys) for kind, _, keys in found] == [(kind, keys) for kind, _, keys in own]
    for (_, now, _), (_, then, _) in zip(found, own, strict=True):
        assert all(now[key] is then[key] for key in then)
    assert bank.running == "a"
    assert [bank.snapshot(task).num_batches_tracked[0].item() for task in TASKS] == [7, 8, 8]


def test_state_dict_inside_is_the_defaults() -> None:
    layer = layer_of()
    bank = moved_apart(layer)
    before = state_bits(layer)
    with bank.rows(["b", "c"]):
        assert state_bits(layer) == before


@pytest.mark.parametrize("taken", [copy.deepcopy, copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_taken_inside_take_nothing_along(taken: Callable[[nn.Module], nn.Module]) -> None:
    for pinned in (False, True):
        layer = layer_of()
        bank = task_statistics(layer, TASKS, start="shared")
        if pinned:
            freeze_batch_norm(layer, affine=False)
        kind, keys = type(layer), {*layer.__dict__}
        x = batch(["a", "b", "b"], 0)
        right = copy.deepcopy(layer)(x)
        with bank.rows(["a", "b", "b"]):
            other = taken(layer)
            assert type(other) is kind
            assert {*other.__dict__} - keys <= {"_lightning_bn_exchanged_by"}
            assert bits(other(x)) == bits(right)
        assert isinstance(layer, Overlay) is pinned


def test_layers_that_a_freezer_pinned_use_each_rows_own_set() -> None:
    layer = layer_of()
    bank = moved_apart(layer)
    which = labels(2)
    x = batch(which, 1)
    layer.eval()
    with bank.rows(which):
        right = layer(x)
    layer.train()
    before = sets_bits(bank)
    with frozen_batch_norm(layer), bank.rows(which):
        found = layer.train()(x)
    torch.testing.assert_close(found, right, **CLOSE)
    with bank.rows(which), frozen_batch_norm(layer):
        torch.testing.assert_close(layer(x), right, **CLOSE)
    assert sets_bits(bank) == before


def test_layers_frozen_for_a_task_use_each_rows_own_set() -> None:
    model = nn.Sequential(layer_of())
    bank = moved_apart(model)
    which = labels(2)
    x = batch(which, 1)
    model.eval()
    with bank.rows(which):
        right = model(x)
    model.train()
    before = sets_bits(bank)
    session = FreezeSession(model, FreezeSelection(by_task={"a": "0"}))
    session.start_batch(0, task="a")
    with bank.rows(which):
        torch.testing.assert_close(model(x), right, **CLOSE)
    session.end_batch(1)
    with bank.rows(which):
        session.start_batch(1, task="a")
        torch.testing.assert_close(model(x), right, **CLOSE)
        session.end_batch(2)
    session.close(2)
    assert sets_bits(bank) == before


# One label


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("start", ["cumulative", "shared"])
def test_one_label_for_all_rows_has_the_bits_of_its_context(training: bool, start: Any) -> None:
    # While a task begins, its average is weighed at the end of the rows, and rounded once more.
    exact = start == "shared" or not training
    found = []
    for by_row in (True, False):
        layer = layer_of().float()
        bank = task_statistics(layer, TASKS, start=start)
        outs = []
        for step in range(4):
            x = batch(["b"] * 5, step).float().requires_grad_()
            layer.train(training)
            with bank.rows(["b"] * 5) if by_row else bank.task("b"):
                out = layer(x)
                out.pow(3).sum().backward()
            outs += [bits(out), bits(x.grad)]  # type: ignore[arg-type]
        found.append((outs, [bits(weight.grad) for weight in layer.parameters()], sets_bits(bank)))  # type: ignore[arg-type]
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == found[1][2] or not exact


# Shapes, memory formats and dtypes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, (3,)), (nn.BatchNorm1d, (3, 5)), (nn.BatchNorm2d, (3, 4, 2)), (nn.BatchNorm3d, (3, 2, 3, 2))],
)
@pytest.mark.parametrize("settings", [{}, {"affine": False}])
def test_all_dimensions(kind: type[_BatchNorm], shape: tuple[int, ...], settings: Any, training: bool) -> None:
    layer = layer_of(kind, **settings)
    separate = copies(layer)
    bank = task_statistics(layer, TASKS, start="shared")
    which = ["c", "a", "b", "a", "c", "b", "c"]
    for one in (layer, *separate.values()):
        one.train(training)
    with bank.rows(which):
        found = layer(batch(which, 0, shape))
    torch.testing.assert_close(found, separately(separate, batch(which, 0, shape), which), **CLOSE)
    same_sets(bank, layer, separate)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_have_the_memory_format_and_dtype_of_the_layers(training: bool) -> None:
    which = ["c", "a", "b", "a", "c", "b", "c"]
    for dtype in (torch.float32, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            layer = layer_of().float().train(training)
            right = copy.deepcopy(layer)
            bank = task_statistics(layer, TASKS, start="shared")
            x = batch(which, 0).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
            with bank.rows(which):
                out = layer(x)
            out.float().pow(3).sum().backward()
            expected = right(x.detach())
            assert out.dtype == expected.dtype
            assert out.stride() == expected.stride()
            assert x.grad is not None
            if training:
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                with torch.no_grad():
                    part = copy.deepcopy(right)(x[rows_of(which, "b")])
                torch.testing.assert_close(out[rows_of(which, "b")], part, rtol=tolerance, atol=tolerance)
            else:
                torch.testing.assert_close(out, expected)


def test_rows_that_are_taken_and_put_together_have_right_derivatives() -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    indices = [torch.tensor([4, 0]), torch.tensor([1, 2, 3])]

    def squared(x: Tensor) -> Tensor:
        first, second = take(x, indices)
        return put_together([first.square(), second.pow(3)], indices)

    assert torch.autograd.gradcheck(squared, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(squared, x)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_is_that_of_the_layer(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), fill_statistics(nn.BatchNorm2d(3))).train(training)
    bank = task_statistics(model, TASKS, start="shared")
    which = ["c", "a", "c", "a"]
    x = batch(which, 0).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right = copy.deepcopy(model)(x[rows_of(which, "c")])
        with bank.rows(which):
            found = model(x)
    assert found.dtype == right.dtype == torch.bfloat16
    torch.testing.assert_close(found[rows_of(which, "c")], right)
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in model.buffers())


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it where a graph breaks
def test_compiled_model_runs_other_rows_at_each_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer_of()).double()
    bank = task_statistics(model, TASKS, start="shared")
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert isinstance(compiled, nn.Module)
    others = task_statistics(compiled, TASKS, start="shared")
    for step in range(6):
        which = labels(step)
        with bank.rows(which), others.rows(which):
            torch.testing.assert_close(compiled(batch(which, step)), model(batch(which, step)), **CLOSE)
        with bank.task("c"), others.task("c"):
            torch.testing.assert_close(compiled(batch(which, step)), model(batch(which, step)), **CLOSE)
    assert [*sets_bits(bank).values()] == [*sets_bits(others).values()]


def test_backward_inside_may_run_forwards_again() -> None:
    found = []
    for again in (False, True):
        layer = layer_of()
        bank = task_statistics(layer, TASKS, start="shared")
        which = labels(2)
        x = batch(which, 1).requires_grad_()
        with bank.rows(which):
            out = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            assert isinstance(out, Tensor)
            out.pow(3).sum().backward()
        found.append(bits(x.grad))  # type: ignore[arg-type]
    assert found[0] == found[1]


def test_layer_without_sets_is_left_alone() -> None:
    model = nn.Sequential(layer_of(), layer_of())
    bank = task_statistics(model, TASKS, ["0"], start="shared")
    with bank.rows(["a", "b", "a", "b"]):
        assert type(model[1]) is nn.BatchNorm2d
        model(batch(["a", "b", "a", "b"], 0))
    assert [int(layer.num_batches_tracked) for layer in model] == [8, 8]
