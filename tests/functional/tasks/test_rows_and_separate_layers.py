"""Rows of several tasks in one batch: what separate layers give, each fed with the rows of its task alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bn.functional import without_updates
from lightning_bn.functional.tasks import TaskStatistics, task_statistics
from tests.functional.tasks.separate import TASKS, Separate, joint, network, rows_of, statistics, values
from tests.models import BatchNormAct2d, BatchRenorm2d, bits, fill_statistics, images

MIXED = ["b", "a", "a", "b", "a", "b", "b", "a"]
SHAPES = {
    "(N, C)": (nn.BatchNorm1d, (4,)),
    "(N, C, L)": (nn.BatchNorm1d, (4, 5)),
    "2d": (nn.BatchNorm2d, (4, 3, 5)),
    "3d": (nn.BatchNorm3d, (4, 2, 3, 2)),
}
FORMATS = [(name, torch.contiguous_format) for name in SHAPES]
FORMATS += [("2d", torch.channels_last), ("3d", torch.channels_last_3d)]


def layer_and_bank(build: Callable[[], nn.Module], start: Any = "shared") -> tuple[Any, TaskStatistics]:
    """A layer with other statistics in each set."""
    layer = fill_statistics(build()).double().train()
    bank = task_statistics(layer, TASKS, start=start)
    for seed, task in enumerate(TASKS):
        with bank.task(task):
            weights = copy.deepcopy(layer.state_dict())
            fill_statistics(layer, 10 + seed)
            with torch.no_grad():
                for name, parameter in layer.named_parameters():
                    parameter.copy_(weights[name])
    return layer, bank


def same_statistics(bank: TaskStatistics, layer: nn.Module, separate: Separate) -> None:
    for task in TASKS:
        with bank.task(task):
            assert statistics(layer) == statistics(separate.models[task]), task


# Where it could be wrong unseen


@pytest.mark.parametrize("momentum", [0.1, None])
def test_tasks_that_begin_average_what_they_have_seen(momentum: float | None) -> None:
    layer = fill_statistics(nn.BatchNorm2d(3, momentum=momentum)).double().train()
    twin = copy.deepcopy(layer)
    bank, others = (task_statistics(one, TASKS) for one in (layer, twin))
    for step in range(20):
        rows = rows_of(8, step, least=0)
        x = values(rows, (3, 2, 2), step)
        with bank.rows(rows):
            layer(x)
            with bank.task("b"):  # as where a context around it has not ended
                pass
            layer(x)
        for task in set(rows):
            with others.task(task):
                twin(x[[row == task for row in rows]])
                twin(x[[row == task for row in rows]])
        for task in TASKS:
            found, expected = bank.snapshot(task), others.snapshot(task)
            assert torch.equal(found.num_batches_tracked, expected.num_batches_tracked), (step, task)
            # Weighed at other places, so rounded there.
            torch.testing.assert_close(found.mean, expected.mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.var, expected.var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("around", [None, *TASKS])
def test_a_task_that_begins_inside_counts_until_it_ends(around: str | None, task: str) -> None:
    layer, bank = layer_and_bank(lambda: nn.BatchNorm1d(4))
    separate = Separate(layer, bank)

    def inside() -> None:
        with bank.rows(MIXED):
            with bank.task(task):
                # Of any length: a layer of points, for which rows would be an error.
                layer(values([task] * 3, (4,)))
            layer(values(MIXED, (4,)))

    if around is None:
        inside()
    else:
        with bank.task(around):
            inside()
    separate.models[task](values([task] * 3, (4,)))
    separate(values(MIXED, (4,)), MIXED)
    same_statistics(bank, layer, separate)


def test_gradients_in_eval_are_of_the_statistics_of_their_forward() -> None:
    for build in (lambda: nn.BatchNorm2d(4), lambda: BatchNormAct2d(4)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            layer, bank = layer_and_bank(build)
            separate = Separate(layer, bank)
            x = values(MIXED, (4, 3, 3)).contiguous(memory_format=memory_format).requires_grad_()
            layer.eval()
            separate.train(False)
            with bank.rows(MIXED):
                output = layer(x)
                layer.train()
                layer(x.detach() + 7)
            [found] = torch.autograd.grad(output.square().sum(), x)
            [expected] = torch.autograd.grad(separate(x, MIXED).square().sum(), x)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# Right values


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "memory_format"), FORMATS)
def test_outputs_gradients_and_statistics_are_those_of_separate_layers(
    shape: str, memory_format: torch.memory_format, training: bool
) -> None:
    kind, size = SHAPES[shape]
    layer, bank = layer_and_bank(lambda: kind(4))
    layer.train(training)
    separate = Separate(layer, bank)
    x = values(MIXED, size).contiguous(memory_format=memory_format)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    with bank.rows(MIXED):
        output = layer(ours)
    expected = separate(theirs, MIXED)
    assert bits(output) == bits(expected)
    assert output.stride() == copy.deepcopy(layer)(x).stride()
    weighed = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    inputs = (layer.weight, layer.bias)
    found = torch.autograd.grad((output * weighed).sum(), (ours, *inputs))
    wanted = torch.autograd.grad((expected * weighed).sum(), (theirs, *inputs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    same_statistics(bank, layer, separate)


@given(rows=st.lists(st.sampled_from(TASKS), min_size=2, max_size=9), training=st.booleans())
def test_any_split_in_any_order(rows: list[str], training: bool) -> None:
    layer, bank = layer_and_bank(lambda: nn.BatchNorm1d(4))
    layer.train(training)
    separate = Separate(layer, bank)
    x = values(rows, (4, 2))
    with bank.rows(rows):
        output = layer(x)
    assert bits(output) == bits(separate(x, rows))
    same_statistics(bank, layer, separate)  # of tasks that are absent too


@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_both_orders_are_right(training: bool) -> None:
    layer, bank = layer_and_bank(lambda: nn.BatchNorm1d(3))
    layer.train(training)
    x = values(["c", "a", "c", "a"], (3, 2)).requires_grad_()

    def run(batch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with bank.rows(["c", "a", "c", "a"]):
            output: Tensor = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (batch,))
            return output

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("start", ["shared", "cumulative"])
def test_sixty_steps_with_a_joint_gradient(start: Any) -> None:
    model = network()
    bank = task_statistics(model, TASKS, start=start)
    separate = Separate(model, bank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(60):
        rows = rows_of(12, step, least=2)
        x = values(rows, (3, 6, 6), step)
        if start == "shared":
            expected = joint(separate.with_weights_of(model), x, rows)
        optimizer.zero_grad()
        with bank.rows(rows):
            out = model(x)
        out.square().mean().backward()
        for name, parameter in model.named_parameters() if start == "shared" else ():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)
        optimizer.step()
    if start == "shared":
        for task in TASKS:
            with bank.task(task):
                for name, buffer in model.named_buffers():
                    other = separate.models[task].get_buffer(name)
                    torch.testing.assert_close(buffer, other, rtol=1e-9, atol=1e-12)
    else:
        assert all(bank.snapshot(task).var.isfinite().all() for task in TASKS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("params", "dtype"), [("half", "half"), ("float", "half"), ("bfloat16", "bfloat16")])
def test_narrow_dtypes_are_those_of_the_layer(params: str, dtype: str, training: bool) -> None:
    layer = fill_statistics(nn.BatchNorm2d(3)).to(getattr(torch, params)).train(training)
    bank = task_statistics(layer, TASKS, start="shared")
    separate = Separate(layer, bank)
    x = values(MIXED, (3, 4, 4), dtype=getattr(torch, dtype))
    with bank.rows(MIXED):
        output = layer(x)
    expected = separate(x, MIXED)
    assert (output.dtype, bits(output)) == (expected.dtype, bits(expected))
    same_statistics(bank, layer, separate)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_gives_what_it_gives_without(training: bool) -> None:
    model = network(torch.float32).train(training)
    bank = task_statistics(model, TASKS, start="shared")
    separate = Separate(model.bn1, bank, "bn1")
    with torch.autocast("cpu", torch.bfloat16):
        x = model.conv1(images(8))
        with bank.rows(MIXED):
            output = model.bn1(x)
        expected = separate(x, MIXED)
    assert x.dtype == torch.bfloat16
    assert (output.dtype, bits(output)) == (expected.dtype, bits(expected))


@pytest.mark.parametrize(
    "arguments", [{"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"affine": False}, {"eps": 0.5}], ids=str
)
def test_settings_are_those_of_the_layer(arguments: dict[str, Any]) -> None:
    for training in (True, False):
        layer, bank = layer_and_bank(lambda: nn.BatchNorm1d(3, **arguments))
        layer.train(training)
        separate = Separate(layer, bank)
        for seed in range(3):
            x = values(MIXED, (3,), seed)
            with bank.rows(MIXED):
                output = layer(x)
            assert bits(output) == bits(separate(x, MIXED))
        same_statistics(bank, layer, separate)


def test_without_tracking_nothing_moves() -> None:
    for outside in (True, False):
        layer, bank = layer_and_bank(lambda: nn.BatchNorm1d(3))
        separate = Separate(layer, bank)
        x = values(MIXED, (3,))
        if outside:
            with without_updates(layer), bank.rows(MIXED):
                output = layer(x)
        else:
            with bank.rows(MIXED), without_updates(layer):
                output = layer(x)
        before = copy.deepcopy(separate)
        assert bits(output) == bits(separate(x, MIXED))
        same_statistics(bank, layer, before)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_of_the_users_own_is_run_for_each_task(training: bool) -> None:
    for kind in (BatchNormAct2d, BatchRenorm2d)[: 1 + training]:  # the second one moves its statistics in eval too
        layer, bank = layer_and_bank(lambda kind=kind: kind(4))  # type: ignore[misc]
        layer.train(training)
        separate = Separate(layer, bank)
        x = values(MIXED, (4, 3, 3))
        with bank.rows(MIXED):
            output = layer(x)
        assert bits(output) == bits(separate(x, MIXED))
        same_statistics(bank, layer, separate)


# What the layers are meanwhile, and afterwards


def test_rows_nest() -> None:
    layer, bank = layer_and_bank(lambda: nn.BatchNorm1d(3))
    separate = Separate(layer, bank)
    inner = ["c", "c", "b", "b", "c"]
    with bank.rows(MIXED):
        layer(values(MIXED, (3,)))
        with bank.rows(inner):
            layer(values(inner, (3,), 1))
        layer(values(MIXED, (3,), 2))
    for rows, seed in ((MIXED, 0), (inner, 1), (MIXED, 2)):
        separate(values(rows, (3,), seed), rows)
    same_statistics(bank, layer, separate)


# With others


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's, at each graph break
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_run_by_row(backend: str) -> None:
    model = network()
    twin = copy.deepcopy(model)
    bank, others = task_statistics(model, TASKS), task_statistics(twin, TASKS)
    compiled = torch.compile(model, backend=backend)
    for step in range(6):
        model.train(step != 4)
        twin.train(step != 4)
        rows = rows_of(8, step, least=2)
        x = values(rows, (3, 6, 6), step)
        with bank.rows(rows), others.rows(rows):
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-9, atol=1e-9)
        with bank.task("b"), others.task("b"):
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-9, atol=1e-9)
    for task in TASKS:
        assert torch.allclose(bank.snapshot(task).var, others.snapshot(task).var, rtol=1e-9)


# Errors, before anything is written


def test_a_forward_that_replaces_its_statistics_is_named() -> None:
    class Replacing(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0).detach()  # type: ignore[operator]
            return x - x.mean(0)

    layer, bank = layer_and_bank(lambda: Replacing(3))
    own = layer.running_mean
    with bank.rows(MIXED), pytest.raises(RuntimeError, match="replaces the tensors of its running statistics"):
        layer(values(MIXED, (3,)))
    assert layer.running_mean is own


def test_a_task_that_runs_in_rows_cannot_be_removed() -> None:
    bank = layer_and_bank(lambda: nn.BatchNorm1d(3))[1]
    with bank.rows(MIXED), pytest.raises(ValueError, match="is running"):
        bank.remove("b")
    with bank.rows(MIXED), pytest.raises(RuntimeError, match="has not ended"):
        bank.release()
