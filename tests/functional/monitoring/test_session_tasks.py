"""Statistics per task in a session: what is measured of which, in whatever state a sample finds the layers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn.functional import TaskStatistics, freeze_batch_norm, take_snapshot, task_statistics
from lightning_bn.functional.monitoring.monitor_state import MonitorState
from lightning_bn.functional.monitoring.sample import Sample
from lightning_bn.functional.monitoring.session import MonitorSession
from lightning_bn.functional.statistics.drift_measures import drift
from tests.models import bits

TASKS = ("det", "seg")
FAR = {"det": -3.0, "seg": 3.0}


class Net(nn.Sequential):
    """Two layers in float64, the second behind a linear one."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).train()


def batch(seed: int, shift: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(32, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype) + shift


def banked(updates: int = 100, tasks: Sequence[str] = TASKS, **options: Any) -> tuple[Net, TaskStatistics]:
    """A network and sets that have seen their tasks' data."""
    model = net()
    bank = task_statistics(model, tasks, **options)
    for seed in range(updates):
        for task in tasks:
            with bank.task(task):
                model(batch(seed, FAR.get(task, 0.0)))
    return model, bank


def layers_of(model: nn.Sequential) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_children() if isinstance(layer, nn.BatchNorm1d)}


def trained(
    model: nn.Module, bank: TaskStatistics, session: MonitorSession, steps: Any, shift: Any = None
) -> list[Sample]:
    """Runs a batch of one task a step; returns what samples found."""
    found = []
    for step, task in steps:
        session.before_batch()
        with bank.task(task):
            model(batch(1000 + step, FAR.get(task, 0.0) + (shift(step) if shift else 0.0)))
        if session.after_batch(batch(0), step):
            sample = session.sample(step, right_after=True)
            assert sample is not None
            found.append(sample)
    return found


def turns(count: int, tasks: Sequence[str] = TASKS, start: int = 0) -> list[tuple[int, str]]:
    return [(step, tasks[step % len(tasks)]) for step in range(start + 1, start + count + 1)]


def said(samples: list[Sample]) -> list[str]:
    return [line for sample in samples for line in sample.messages]


# --- the three that could go wrong unseen --------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [None, "det", "seg"])
def test_whichever_task_lies_in_the_layers_each_is_measured_from_itself(inside: str | None) -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), every_n_steps=100)
    then = {task: bank.snapshot(task) for task in TASKS}
    trained(model, bank, session, turns(9))
    now = {task: bank.snapshot(task) for task in TASKS}
    if inside is None:
        sample = session.sample(9)
    else:
        with bank.task(inside):
            sample = session.sample(9)
    assert sample is not None
    for task in TASKS:
        values = torch.cat([*drift(then[task], now[task]).values()])
        assert sample.tasks[task].mean == pytest.approx(float(values.mean()), rel=1e-12)
        assert sample.tasks[task].max == pytest.approx(float(values.max()), rel=1e-12)
        assert sample.tasks[task].max < 0.5, "the other task's statistics lie 6 sigma away"
    assert sample.summary == sample.tasks["det"]
    assert then["det"].same_bits(session.own.reference)


def test_rates_and_judgments_are_of_a_tasks_own_batches() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), every_n_steps=10)
    # Nine of ten batches are one task's.
    steps = [(step, "seg" if step % 10 == 0 else "det") for step in range(1, 201)]
    samples = trained(model, bank, session, steps)
    assert said(samples) == []

    def twice(step: int, task: str) -> list[str]:
        session.before_batch()
        for use in range(2 if task == "seg" else 1):
            with bank.task(task):
                model(batch(10 * step + use, FAR[task]))
        sample = session.sample(step, right_after=True) if session.after_batch(batch(0), step) else None
        return [] if sample is None else [*sample.messages]

    # Of all batches it is a fifth of an update.
    [line] = [line for step in range(201, 241) for line in twice(step, "seg" if step % 10 == 0 else "det")]
    assert "with the statistics of task 'seg' is updated 2 times per batch" in line


@pytest.mark.parametrize("every_n_steps", [1, 2, 4, 10, 12, 100])
@pytest.mark.parametrize("tasks", [("det", "seg"), ("det", "seg", "depth")])
def test_sources_that_alternate_inside_of_one_task_are_named_whatever_the_interval(
    every_n_steps: int, tasks: tuple[str, ...]
) -> None:
    model, bank = banked(tasks=tasks)
    session = MonitorSession(layers_of(model), every_n_steps=every_n_steps)

    def shift(step: int) -> float:
        is_seg = tasks[step % len(tasks)] == "seg"
        return (6.0 if step // len(tasks) % 2 else -6.0) if is_seg else 0.0

    lines = said(trained(model, bank, session, turns(max(60, 14 * every_n_steps), tasks), shift))
    [line] = [one for one in lines if "alternate" in one]
    assert "0 with the statistics of task 'seg' gets its batches from sources that alternate" in line
    assert len(lines) == 1, lines


def test_tasks_that_alternate_are_no_fault_of_their_own_sets_and_one_of_a_shared_set() -> None:
    model, bank = banked(modules="2")
    session = MonitorSession(layers_of(model), every_n_steps=2, others=["2.inner"])
    lines = said(trained(model, bank, session, turns(40)))
    [line] = [one for one in lines if "alternate" in one]
    assert "0 gets its batches from sources that alternate" in line
    assert "TaskBatchNorm(modules=['0'])" in line
    assert lines == [line]


def test_a_resumed_session_goes_on_bit_by_bit() -> None:
    def begun() -> tuple[Net, TaskStatistics, MonitorSession]:
        model, bank = banked(updates=20)
        return model, bank, MonitorSession(layers_of(model), 3, warn_above=0.02, act_above=0.03)

    model, bank, whole = begun()
    samples = trained(model, bank, whole, turns(40))
    model, bank, first = begun()
    before = trained(model, bank, first, turns(18))
    state = first.state().state_dict()
    second = MonitorSession(layers_of(model), 3, warn_above=0.02, act_above=0.03, step=18)
    read = MonitorState.from_state_dict(state)
    assert read is not None
    assert second.resume(read) == ""
    after = trained(model, bank, second, turns(22, start=18))
    assert [*map(str, before + after)] == [*map(str, samples)]
    for task in TASKS:
        assert bits(second.tasks[task].history.values()) == bits(whole.tasks[task].history.values())
        assert second.tasks[task].history.marks == whole.tasks[task].history.marks
        assert second.tasks[task].reference.same_bits(whole.tasks[task].reference)
        assert second.tasks[task].warm_up.layers == whole.tasks[task].warm_up.layers
        assert second.tasks[task].warm_up.measured_since == whole.tasks[task].warm_up.measured_since


# --- references ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["cumulative", "shared"])
def test_a_task_that_was_not_seen_has_no_drift_and_all_keys(start: Any) -> None:
    model = net()
    for seed in range(100):
        model(batch(seed))
    bank = task_statistics(model, ["det", "seg", "never"], start=start)
    session = MonitorSession(layers_of(model), 1)
    samples = trained(model, bank, session, turns(30), lambda step: -FAR.get(bank.tasks[step % 2], 0.0))
    keys = {f"bn/{task}/jeffreys_{what}" for task in bank.tasks for what in ("mean", "max")}
    for sample in samples:
        assert keys <= set(sample.metrics("bn", "jeffreys"))
        assert sample.tasks["never"].max == 0
    assert said(samples) == []
    # Of its 15 batches a task that begins has not had enough to be measured from.
    assert (samples[-1].tasks["seg"].max == 0) == (start == "cumulative")


def test_a_task_warms_up_by_its_own_counter() -> None:
    model = net()
    for seed in range(100):
        model(batch(seed))
    bank = task_statistics(model, TASKS)
    session = MonitorSession(layers_of(model), 1)
    steps = [(step, "seg" if step % 4 == 0 else "det") for step in range(1, 201)]
    samples = trained(model, bank, session, steps)
    drifts = [sample.tasks["seg"].max > 0 for sample in samples]
    # (1 - 0.1)^44 is the first below 1 %: the 44th batch of the task is that of step 176.
    assert drifts.index(True) == 180 - 1
    assert not any(drifts[:179])


def test_previous_epoch_moves_the_reference_of_every_task() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 4, reference="previous_epoch")
    trained(model, bank, session, turns(12))
    then = {task: bank.snapshot(task) for task in TASKS}
    session.start_epoch()
    [sample] = trained(model, bank, session, turns(4, start=12))
    for task in TASKS:
        values = torch.cat([*drift(then[task], bank.snapshot(task)).values()])
        assert sample.tasks[task].max == pytest.approx(float(values.max()), rel=1e-12)


def test_a_checkpoint_of_one_task_is_its_reference_and_the_plain_one_that_of_others() -> None:
    model, bank = banked()
    there = bank.snapshot("seg")
    session = MonitorSession(
        layers_of(model), 4, reference="x.ckpt", checkpoint=bank.snapshot("det"), checkpoint_of_tasks={"seg": there}
    )
    [sample] = trained(model, bank, session, turns(4))
    expected = torch.cat([*drift(there, bank.snapshot("seg")).values()])
    assert sample.tasks["seg"].max == pytest.approx(float(expected.max()), rel=1e-12)
    session = MonitorSession(layers_of(model), 4, reference="x.ckpt", checkpoint=bank.snapshot("det"))
    [sample] = trained(model, bank, session, turns(4))
    assert sample.tasks["seg"].max > 10


# --- thresholds and faults -----------------------------------------------------------------------------------------


def test_uses_of_one_layer_by_two_tasks_are_not_taken_for_two_views_and_those_of_one_task_are() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 1)

    def step(number: int, uses: Sequence[tuple[str, float]]) -> list[str]:
        session.before_batch()
        for use, (task, shift) in enumerate(uses):
            with bank.task(task):
                model(batch(10 * number + use, FAR[task] + shift))
        session.after_batch(batch(0), number)
        sample = session.sample(number, right_after=True)
        return [] if sample is None else [line for line in sample.messages if "times per" in line]

    twice = [("det", 0.0), ("seg", 0.0), ("seg", 0.0)]
    apart = [("det", 0.0), ("seg", 0.0), ("seg", 9.0)]
    [line] = [line for number in range(1, 9) for line in step(number, twice)]
    assert "updated 2 times per batch" in line
    model, bank = banked()
    session = MonitorSession(layers_of(model), 1)
    lines = [line for number in range(1, 9) for line in step(number, apart)]
    assert any(
        "with the statistics of task 'seg' is used 2 times per step with inputs whose means lie" in s for s in lines
    )


def test_the_largest_drift_of_all_tasks_is_warned_of_with_its_task() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 2, warn_above=1.0, act_above=1.0)
    samples = trained(model, bank, session, turns(20), lambda step: 5.0 * (step % 2))
    first = next(line for line in said(samples) if "warn_above" in line)
    assert "task 'seg': 0 moved since the start of the fit: new variance" in first
    assert any(sample.exceeded.partition(": ")[2].startswith("task 'seg': ") for sample in samples)
    assert all(sample.summary.max < 1 for sample in samples)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seen", [True, False])
def test_a_nan_in_one_tasks_set_is_found_and_names_it_once(task: str, seen: bool) -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 2, warn_above=1e9)
    with bank.in_place(task):
        model[2].running_var[1] = torch.nan  # type: ignore[index]
    other = next(one for one in TASKS if one != task)
    steps = turns(10) if seen else [(step, other) for step in range(1, 11)]
    lines = [line for line in said(trained(model, bank, session, steps)) if "not finite" in line]
    [line] = lines
    assert f"2 with the statistics of task {task!r} has 1 channel whose running statistics are not finite" in line


def test_a_channel_that_collapses_in_one_tasks_set_is_found_there() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 2)
    with bank.in_place("seg"):
        model[0].running_var[0] = 1e-9  # type: ignore[index]
    # No batch of that task mends it.
    [line] = said(trained(model, bank, session, [(1, "det"), (2, "det")]))
    assert "0 with the statistics of task 'seg' has 1 channel whose variance fell below eps" in line


def test_a_layer_is_not_stalled_while_any_of_its_sets_moves_and_is_if_none_does() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 5)
    assert said(trained(model, bank, session, [(step, "seg") for step in range(1, 41)])) == []
    model, bank = banked()
    session = MonitorSession(layers_of(model), 5)
    lines = said(trained(model[0], bank, session, turns(40)))
    [line] = lines
    assert line.startswith("step 10: 2 is in train mode but was not updated in 10 batches")


def test_a_set_with_a_nan_that_stands_still_does_not_keep_its_layer_from_being_stalled() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 5)
    with bank.in_place("seg"):
        model[2].running_mean[0] = torch.nan  # type: ignore[index]
    lines = said(trained(model[0], bank, session, [(step, "det") for step in range(1, 21)]))
    assert len([line for line in lines if "was not updated" in line]) == 1


def test_each_task_once_in_a_step_is_one_update_and_a_task_twice_is_two() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 4)

    def joint(step: int, tasks: Sequence[str]) -> list[str]:
        session.before_batch()
        for use, task in enumerate(tasks):
            with bank.task(task):
                model(batch(10 * step + use, FAR[task]))
        sample = session.sample(step, right_after=True) if session.after_batch(batch(0), step) else None
        return [] if sample is None else [*sample.messages]

    assert [line for step in range(1, 21) for line in joint(step, TASKS)] == []
    [line] = [line for step in range(21, 61) for line in joint(step, ("det", "seg", "seg"))]
    assert "0 (and 1 more layer) with the statistics of task 'seg' is updated 2 times per batch" in line


def test_a_frozen_set_that_moves_names_its_task() -> None:
    model, bank = banked()
    freeze_batch_norm(model, "2")
    session = MonitorSession(layers_of(model), 2)
    assert said(trained(model, bank, session, turns(4))) == []
    with bank.in_place("seg"):
        model[2].running_mean.add_(1)  # type: ignore[union-attr, operator]
    [line] = said(trained(model, bank, session, turns(4, start=4)))
    assert "2 with the statistics of task 'seg' is frozen by freeze_batch_norm, but its statistics were written" in line


# --- what it costs, and whom it disturbs ---------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts single values that are read, for each of which an accelerator would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("updates", [0, 100])
def test_a_sample_of_several_tasks_reads_no_value_one_by_one_also_while_a_task_begins(updates: int) -> None:
    model, bank = banked(updates)
    session = MonitorSession(layers_of(model), 1)
    trained(model, bank, session, turns(3))
    with Reads() as reads:
        session.before_batch()
        session.after_batch(batch(0), 4)
        session.sample(4, right_after=True)
    assert reads.count == 0


def test_processes_exchange_as_much_as_without_tasks_and_as_often() -> None:
    exchanged: dict[bool, list[str]] = {True: [], False: []}
    for tasks in (True, False):
        model = net()
        bank = task_statistics(model, TASKS if tasks else ["det"])
        if not tasks:
            bank.release()

        def mean(values: Tensor, seen: list[str] = exchanged[tasks]) -> Tensor:
            seen.append(f"mean of {values.numel()}")
            return values

        def largest(values: Tensor, seen: list[str] = exchanged[tasks]) -> Tensor:
            seen.append("max")
            return values

        session = MonitorSession(layers_of(model), 7, mean_over_ranks=mean, max_over_ranks=largest, processes=2)
        for step in range(1, 51):
            session.before_batch()
            if tasks:
                with bank.task(TASKS[step % 2]):
                    model(batch(step))
            else:
                model(batch(step))
            if session.after_batch(batch(0), step):
                session.sample(step, right_after=True)
    assert exchanged[True] == exchanged[False]
    assert exchanged[True].count("max") == 7


def test_a_batch_that_is_not_judged_runs_nothing_on_the_device() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 1000)
    trained(model, bank, session, turns(3))
    seen = batch(0)
    with Reads() as reads:
        session.before_batch()
        session.after_batch(seen, 4)
    assert reads.calls == 0


def test_measuring_uses_no_context_and_leaves_every_bit() -> None:
    states = []
    for watches in (True, False):
        model, bank = banked(3)
        session = MonitorSession(layers_of(model), 1 if watches else 10**9)
        trained(model, bank, session, turns(30))
        states.append([bank.snapshot(task) for task in TASKS])
        assert bank.outside.times == 0
    assert all(one.same_bits(other) for one, other in zip(*states, strict=True))
    # Contexts that are not used yet are not counted as used by a sample either.
    model = net()
    bank = task_statistics(model, TASKS)
    session = MonitorSession(layers_of(model), 1)
    for step in range(1, 5):
        session.before_batch()
        model(batch(step))
        session.after_batch(batch(0), step)
        session.sample(step, right_after=True)
    with bank.task("seg"):
        model(batch(9))
    assert bank.outside.times == 0


def test_layers_that_move_to_another_dtype_in_mid_run_are_still_read() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 2)
    trained(model, bank, session, turns(4))
    model.float()
    with pytest.warns(UserWarning, match="statistics of the tasks .* were converted in the same way"):
        session.before_batch()
    for step in range(5, 9):
        session.before_batch()
        with bank.task(TASKS[step % 2]):
            model(batch(step, FAR[TASKS[step % 2]], torch.float32))
        session.after_batch(batch(0), step)
    sample = session.sample(8)
    assert sample is not None
    expected = drift(session.tasks["seg"].reference, bank.snapshot("seg"))
    assert sample.tasks["seg"].max == pytest.approx(float(torch.cat([*expected.values()]).max()), rel=1e-12)


def test_without_sets_there_are_no_tasks_and_layers_are_read_themselves() -> None:
    model = net()
    layers = layers_of(model)
    session = MonitorSession(layers, 1)
    assert session.tasks == {}
    assert all(session.own.layers[name] is layer for name, layer in layers.items())
    session.before_batch()
    model(batch(0))
    session.after_batch(batch(0), 1)
    sample = session.sample(1)
    assert sample is not None
    assert "tasks" not in session.state().state_dict()
    keys = ("collapsed_channels", "jeffreys_mean", "jeffreys_p95", "jeffreys_max")
    assert [*sample.metrics("bn", "jeffreys")] == [f"bn/{key}" for key in keys]


def test_a_released_bank_leaves_a_session_that_goes_on() -> None:
    model, bank = banked()
    session = MonitorSession(layers_of(model), 1)
    trained(model, bank, session, turns(2))
    kept = bank.snapshot("seg")
    bank.release()
    session.before_batch()
    model(batch(5))
    session.after_batch(batch(0), 3)
    sample = session.sample(3)
    assert sample is not None
    assert session.tasks["seg"].sampled.same_bits(kept)
    assert take_snapshot(model).same_bits(session.own.sampled)
