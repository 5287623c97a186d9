"""The task that the running part of a step belongs to: contexts, and who does something while it runs."""

from collections.abc import Callable

import pytest

import lightning_bn
from lightning_bn.functional._tasks import Listener, current_task, end_batch, nobody_listening, task


def listener(heard: list[str], name: str, batch_task: str | None = None) -> Listener:
    return Listener(
        lambda now: heard.append(f"{name} enters {now}"), lambda: heard.append(f"{name} leaves"), batch_task=batch_task
    )


def test_listeners_leave_in_the_reverse_order_in_which_they_enter() -> None:
    heard: list[str] = []
    first, second = listener(heard, "first"), listener(heard, "second")
    first.begin()
    second.begin()
    heard.clear()
    with task("det"):
        assert heard == ["second leaves", "first leaves", "first enters det", "second enters det"]
        heard.clear()
        with task("seg"):
            assert heard == ["second leaves", "first leaves", "first enters seg", "second enters seg"]
            heard.clear()
        assert heard == ["second leaves", "first leaves", "first enters det", "second enters det"]
        heard.clear()
    assert heard == ["second leaves", "first leaves", "first enters None", "second enters None"]
    heard.clear()
    end_batch()
    assert heard == ["second leaves", "first leaves"]
    with task("det"):
        pass
    assert len(heard) == 2


def test_a_batchs_own_task_runs_outside_of_contexts_and_a_context_of_it_changes_nothing() -> None:
    heard: list[str] = []
    one = listener(heard, "one", "det")
    one.begin()
    with task("det"):
        pass
    assert heard == ["one enters det"]
    with task("seg"):
        pass
    one.end()
    assert heard[1:] == ["one leaves", "one enters seg", "one leaves", "one enters det", "one leaves"]


def test_who_begins_inside_a_context_enters_it() -> None:
    heard: list[str] = []
    one = listener(heard, "one", "det")
    with task("seg"):
        one.begin()
    end_batch()
    assert heard[0] == "one enters seg"
    assert heard[-1] == "one leaves"


def fail() -> None:
    raise RuntimeError("as planned")


@pytest.mark.parametrize("refuse", [True, False])
def test_no_task_is_left_behind_after_a_failure(refuse: bool) -> None:
    told: list[str | None] = []

    def enter(name: str | None) -> None:
        told.append(name)
        if name == "unknown":
            raise ValueError("as planned")

    one = Listener(enter, lambda: None)
    one.begin()
    inside: Callable[[], None] = fail
    try:
        with pytest.raises((ValueError, RuntimeError), match="as planned"), task("unknown" if refuse else "det"):
            inside()
        assert current_task() is None
        with task("seg"):
            assert current_task() == "seg"
    finally:
        one.end()
    assert told == [None, "unknown" if refuse else "det", None, "seg", None]


def test_the_context_is_part_of_the_public_names() -> None:
    assert lightning_bn.task is task


def test_nobody_hears_of_what_runs_apart_from_the_batch() -> None:
    heard: list[str] = []
    first, second = listener(heard, "first", "det"), listener(heard, "second")
    first.begin()
    second.begin()
    heard.clear()
    try:
        with pytest.raises(RuntimeError, match="as planned"), nobody_listening(), task("seg"):
            fail()
    finally:
        end_batch()
    assert heard[:4] == ["second leaves", "first leaves", "first enters det", "second enters None"]
