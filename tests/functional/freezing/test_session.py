"""A freeze in a loop of one's own: its phases, what it compares in each, what it tells."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_bn.functional._tasks import task
from lightning_bn.functional.freezing.freeze import freeze_batch_norm
from lightning_bn.functional.freezing.freeze_selection import FreezeSelection
from lightning_bn.functional.freezing.phase import FreezePhase
from lightning_bn.functional.freezing.report import Violation
from lightning_bn.functional.freezing.session import FreezeSession
from lightning_bn.functional.layers.exchange import Entries, ExchangeError, exchanged, holders_of
from lightning_bn.functional.layers.status import is_frozen
from tests.models import fill_statistics, seeded, state_bits


def network() -> nn.Sequential:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))

    return fill_statistics(seeded(build)).train()  # type: ignore[return-value]


def batch(seed: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def train(net: nn.Module, session: FreezeSession, steps: range, **settings: bool | str) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for step in steps:
        session.start_batch(step, **settings)  # type: ignore[arg-type]
        optimizer.zero_grad()
        net(batch(step)).square().sum().backward()
        session.after_backward()
        session.before_step()
        optimizer.step()
        session.end_batch(step + 1)


def move(net: nn.Sequential) -> None:
    net[1].running_mean.add_(1)  # type: ignore[union-attr,operator]


def test_in_a_loop_the_layers_stay_and_all_else_trains() -> None:
    net = network()
    before, session = state_bits(net), FreezeSession(net, FreezeSelection(["1"]))
    train(net, session, range(5))
    report = session.close(5)
    after = state_bits(net)
    assert {key for key in before if before[key] == after[key]} == {key for key in before if key.startswith("1.")}
    assert (report.layers, report.steps, report.identical, report.was_on) == (("1",), 5, True, True)
    assert str(report) == "1 frozen layer bit-identical over 5 steps"
    assert all(module.training for module in net.modules())
    assert not is_frozen(net[1])  # type: ignore[arg-type]


def test_phases_follow_each_other() -> None:
    net = network()
    session = FreezeSession(net, FreezeSelection(["1"]))
    seen = [session.phase]
    steps: list[Callable[[], object]] = [
        lambda: session.switch(True, 0),
        lambda: session.start_batch(0),
        session.suspend,
        session.resume,
        lambda: session.switch(False, 1),
        session.suspend,
        session.resume,
    ]
    for step in steps:
        step()
        seen.append(session.phase)
    off, pinned, verified = FreezePhase.OFF, FreezePhase.PINNED, FreezePhase.VERIFIED
    assert seen == [off, pinned, verified, FreezePhase.SUSPENDED, verified, off, off, off]


@pytest.mark.parametrize("phase", FreezePhase)
def test_values_are_compared_and_restored_where_they_are_verified_only(phase: FreezePhase) -> None:
    net = network()
    told: list[Violation] = []
    session = FreezeSession(net, FreezeSelection(["1"]), tell=told.extend)
    if phase is not FreezePhase.OFF:
        session.switch(True, 0)
    if phase in (FreezePhase.VERIFIED, FreezePhase.SUSPENDED):
        session.start_batch(0)
    if phase is FreezePhase.SUSPENDED:
        session.suspend()
    assert session.phase is phase
    before = state_bits(net)
    move(net)
    session.full_check()
    assert (state_bits(net) == before) == (phase is FreezePhase.VERIFIED)
    assert [(one.change.layer, one.change.value, one.step) for one in told] == (
        [("1", "running_mean", 0)] if phase is FreezePhase.VERIFIED else []
    )


def test_a_value_that_is_moved_while_averages_are_in_place_is_restored_when_they_are_not() -> None:
    net = network()
    told: list[Violation] = []
    session = FreezeSession(net, FreezeSelection(["1"]), tell=told.extend)
    train(net, session, range(2))
    session.suspend()
    before = state_bits(net)
    move(net)
    assert told == []
    session.resume()
    assert state_bits(net) == before
    assert [one.change.value for one in told] == ["running_mean"]


def test_closed_while_averages_are_in_place_nothing_is_restored() -> None:
    net = network()
    session = FreezeSession(net, FreezeSelection(["1"]))
    train(net, session, range(2))
    session.suspend()
    move(net)
    moved = state_bits(net)
    assert session.close(2).identical
    assert state_bits(net) == moved
    assert session.phase is FreezePhase.OFF


def test_without_anyone_to_tell_a_violation_is_a_warning_and_said_once() -> None:
    net = network()
    session = FreezeSession(net, FreezeSelection(["1"]))
    session.start_batch(0)
    move(net)
    with pytest.warns(UserWarning, match=r"changed and was restored: step 1: 1 \(running_mean by up to 1\)"):
        session.end_batch(1)
    move(net)
    session.end_batch(2)  # a second warning would be an error
    assert [one.step for one in session.close(2).violations] == [1]


def test_new_values_are_frozen_after_updates_were_allowed() -> None:
    net = network()
    session = FreezeSession(net, FreezeSelection(["1"]))
    train(net, session, range(2))
    with session.allow_updates():
        assert session.phase is FreezePhase.OFF
        move(net)
    moved = state_bits(net[1])
    assert session.phase is FreezePhase.PINNED
    train(net, session, range(2, 4))
    assert state_bits(net[1]) == moved
    report = session.close(4)
    assert (report.identical, report.steps) == (True, 4)


def test_steps_are_counted_while_it_is_on_only() -> None:
    net = network()
    session = FreezeSession(net, FreezeSelection(["1"]))
    train(net, session, range(3), on=False)
    assert not session.report().was_on
    train(net, session, range(3, 7), on=True)
    assert session.report().steps == 4
    train(net, session, range(7, 9), on=False)
    assert session.close(9).steps == 4


def test_a_context_in_the_loop_freezes_the_layers_of_its_task_for_its_length() -> None:
    net = network()
    session = FreezeSession(net, FreezeSelection(by_task={"seg": ["3"], "det": ["1"]}))
    session.start_batch(0, task="det")
    assert (net[1].training, net[3].training) == (False, True)
    with task("seg"):
        assert (net[1].training, net[3].training) == (True, False)
        assert holders_of(net[3]) == ("shadow_statistics", "blocked_gradients")
    assert (net[1].training, net[3].training) == (False, True)
    session.end_batch(1)
    with task("seg"):
        assert net[3].training
    assert all(module.training for module in net.modules())
    report = session.close(1)
    assert (report.task_layers, report.task_batches, session.tasks_seen) == (("3", "1"), 3, {"seg", "det"})


def test_two_sessions_that_freeze_one_layer_for_one_task_give_it_back_as_it_was() -> None:
    net = network()
    objects = {name: id(value) for name, value in (*net.named_parameters(), *net.named_buffers())}
    first, second = (FreezeSession(net, FreezeSelection(by_task={"det": ["1"]}), owner=name) for name in "ab")
    for step in range(2):
        for session in (first, second):
            session.start_batch(step, task="det")
        net(batch(step)).sum().backward()
        for session in (first, second):
            session.unblock_gradients()
        for session in (first, second):
            session.end_batch(step + 1)
    assert {name: id(value) for name, value in (*net.named_parameters(), *net.named_buffers())} == objects
    assert first.close(2).identical
    assert second.close(2).identical
    assert holders_of(net[1]) == ()
    assert net[1].training


def test_what_was_put_on_top_of_a_task_and_left_there_is_an_error_that_names_both() -> None:
    net = network()
    session = FreezeSession(net, FreezeSelection(by_task={"det": ["1"]}, affine=False))
    session.start_batch(0, task="det")
    own = net[1].running_mean
    above = exchanged("somebody", [Entries("1", net[1], {"running_mean": own.clone()})])
    above.__enter__()
    with pytest.raises(ExchangeError, match=r"layer '1'.*'shadow_statistics'.*'somebody' put something on top"):
        session.end_batch(1)
    above.__exit__(None, None, None)
    session.close(1)
    assert net[1].training
    assert torch.equal(net[1].running_mean, own)


def test_a_layer_that_a_function_froze_too_stays_pinned_when_the_session_ends() -> None:
    net = network()
    freeze_batch_norm(net, "1")
    session = FreezeSession(net, FreezeSelection(["1"]))
    train(net, session, range(2))
    session.close(2)
    assert is_frozen(net.train()[1])  # type: ignore[arg-type]
    assert not net[1].training


@pytest.mark.parametrize("by_task", ["det", ["det"], 3])
def test_tasks_without_modules_are_refused(by_task: object) -> None:
    with pytest.raises(ValueError, match=r"by_task=.*must give the modules of each task"):
        FreezeSelection(by_task=by_task)  # type: ignore[arg-type]
